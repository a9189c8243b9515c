"""An HTTP endpoint over worker processes that share one cache of experts (extra ``serve``).

The process that the user starts holds the cache, keeps a pager and the workers alive, and speaks HTTP; it never imports
torch. Each worker holds the dense part of the model and generates for one choice of one request at a time.

A request's way: `app` (routes) → `protocol` (what was asked) → `completion` (its choices) → `crew` (which worker) →
`worker` (another process) → `generation` (tokens) → and back as `messages`.
"""
