"""Which resident expert to give up.

| file | |
|---|---|
| `names` | the policies and their names in `PagerConfig` |
| `table` | the words by which kernels find the pager's private arrays and the shared regions |
| `history` | what the pager learns about experts and workers, from words that the workers publish anyway |
| `recency`, `frequency`, `affinity`, `next_use` | the policies: what an expert is worth |
| `worth` | the same by the pager's policy, among a layer's experts and among all |
| `victims` | the least worth of all, without looking at all of them each time |
| `policy` | all of it as the pager has it |

A policy ranks and nothing else. That an expert can go at all, its word decides: whatever a history says, and however
old it is, only a word RESIDENT without a lease is proposed, and only the CAS of `shmroute.shared.experts.evict` evicts.
"""
