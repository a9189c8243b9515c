"""Offline replay: what a policy would have done on a recorded trace, without loading anything.

| file | |
|---|---|
| `accesses` | a trace as the pager would meet it: N workers' layers in one order, and the experts wanted in each |
| `publishing` | what routing one token publishes there |
| `serving` | the pager's own eviction policies over those tables, on demand only |
| `belady` | the best that any policy could do, knowing the future |
| `timing` | a model of loads and computation: what waits for what |
| `prefetching` | the names of what is asked for ahead of demand |
| `channel` | which load takes which time, demanded or ahead of demand |
| `player` | the same policies and model of time with the pager's own prefetching |
| `run`, `plots` | all of it for several policies and budgets |
| `choices` | recorded choices, recomputed and compared |
"""
