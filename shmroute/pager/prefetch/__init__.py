"""What is loaded before anybody demands it.

| file | |
|---|---|
| `names` | the predictors and their names in `PagerConfig` |
| `affinity`, `previous_token`, `transitions` | predictors: how likely each expert of a layer is wanted next |
| `candidates` | the absent experts that a predictor likes best |
| `balance` | what prefetches saved and cost |
| `usage` | what waiting and CPU time are worth, as the cores are used |
| `record` | what became of each predictor's prefetches, and how far it can be trusted |
| `spare` | how much of the loads' bandwidth demands leave |
| `arbiter` | which proposals are loaded, and in whose place |

A fourth predictor, speculation with the next layer's gate, needs hidden states: workers do that (`Runtime.speculate`)
and push requests, marked as such, unless they were told not to (`shmroute.shared.turned_down`). Users' hints
(`Runtime.prefetch`) come the same way.

All proposals meet in one arbiter. None of it decides about correctness: a prefetch is a REQUESTED(PREFETCH) word like
any other, which a demand upgrades.
"""
