"""The closed loop on real text: what a routing rule gains in hits, and what it costs in perplexity.

Choices depend on what is resident, and what is resident on the choices; so a recorded trace cannot tell what a rule
does. Here a whole decoder runs, its experts chosen by the runtime's routing kernel and kept by the pager's eviction.

| file | |
|---|---|
| `decoder` | a Mixtral decoder in NumPy |
| `text` | held-out text as windows of tokens |
| `pools` | caches without bytes: the routing kernel and the pager's eviction policies over private tables |
| `loop` | the decoder and the pools together: hits and losses of one setting |
| `live` | the same by real processes, with the model itself: stalls, bytes and memory too |
| `comparison` | several settings against the unbiased choice, on the same tokens, with intervals |
| `plots` | hit rate and perplexity of each rule |
"""
