"""How the experts of one token foretell those of the next one in the same layer.

Which experts a token uses says something about its successor: a text stays with its subject. So for each pair of a
layer's experts the pager counts how often a token used the second when the same worker's token before had used the
first. A token then raises, or lowers, the probability of each expert for its worker's next token by

    lift = mean over the token's experts i of (F_ie + m · share_e) / (N_i + m) / share_e

with F_ie of N_i tokens that followed one with i and used e, and e's share of many tokens (`history`), which weighs as
much as m tokens. Of W workers under way the next token in a layer is each one's with the same probability, so the lift
is the mean over their last tokens; 1 for one of which nothing is known.

*Whose token it was.* Lanes publish which layer they routed last. Where one token was routed since the last observation
and one lane passed the layer, it was that lane's. Where that cannot be told (several tokens, a batch, a worker that
went round all layers meanwhile) the lane's last token there is forgotten, and nothing is counted.

All of it is the pager's own memory: L · E² counts of 4 bytes (16 MiB for 61 layers of 256 experts), of which the system
gives what has been touched; beyond `MOST_PAIRS` counts none are kept, and nothing is foretold. Once an expert has been
followed `MOST_FOLLOWED` times its counts are halved, so old texts fade.
"""

from __future__ import annotations

from typing import Final

from shmroute.pager.eviction import table as t
from shmroute.shared.atomic import f32_array, f64_array, i64_array
from shmroute.shared.kernel import inner

SHARE_WEIGHT: Final = 4.0
"""m: tokens that an expert's share weighs as much as."""
MOST_FOLLOWED: Final = 512.0
MOST_PAIRS: Final = 1 << 28
NO_TOKEN: Final = -1
SEVERAL_TOKENS: Final = -2
LEAST_SHARE: Final = 0.01
"""Of k / E: no share counts as less."""
LEAST_LIFT: Final = 0.05
"""No foretelling makes an expert less probable than that."""


@inner
def last_token_at(table: int, lane: int, layer: int) -> int:
    """Address of what a lane's last token in a layer used: int64, how many experts, then these."""
    words = i64_array(table, t.TABLE_WORDS)
    return int(words[t.LAST_TOKENS] + (lane * words[t.NUM_LAYERS] + layer) * (1 + words[t.TOP_K]) * 8)


@inner
def new_token_at(table: int, layer: int) -> int:
    """Address of what a layer's one token since the last observation used, likewise; or NO_TOKEN, or SEVERAL_TOKENS."""
    words = i64_array(table, t.TABLE_WORDS)
    return int(words[t.NEW_TOKENS] + layer * (1 + words[t.TOP_K]) * 8)


@inner
def lift_of(table: int, key: int) -> float:
    """By what the workers' last tokens multiply an expert's probability."""
    words = i64_array(table, t.TABLE_WORDS)
    raised = f64_array(words[t.RAISED], words[t.NUM_LAYERS] * words[t.NUM_EXPERTS])[key]
    return float(max(1.0 + raised / words[t.WORKERS], LEAST_LIFT))


@inner
def forget_token(table: int, lane: int, layer: int) -> None:
    """Forget a lane's last token in a layer, and what it foretells."""
    words = i64_array(table, t.TABLE_WORDS)
    layers, experts = words[t.NUM_LAYERS], words[t.NUM_EXPERTS]
    last = i64_array(last_token_at(table, lane, layer), 1)
    if last[0] == 0:
        return
    last[0] = 0
    raised = f64_array(words[t.RAISED], layers * experts)
    own = f32_array(words[t.RAISED_BY] + (lane * layers + layer) * experts * 4, experts)
    for expert in range(experts):
        raised[layer * experts + expert] -= own[expert]
        own[expert] = 0
    i64_array(words[t.CHANGED], layers)[layer] = t.OUTDATED


@inner
def forget_lane(table: int, lane: int) -> None:
    """Forget all last tokens of a lane that is not under way any more."""
    words = i64_array(table, t.TABLE_WORDS)
    known = i64_array(words[t.KNOWN], words[t.MAX_WORKERS])
    if known[lane] == 1:
        for layer in range(words[t.NUM_LAYERS]):
            forget_token(table, lane, layer)
        known[lane] = 0


@inner
def _count_pair(table: int, layer: int, first: int, new_at: int, count: int) -> None:
    """Count that a token that used expert `first` was followed by one that used `count` experts."""
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    key = layer * experts + first
    followed = f32_array(words[t.FOLLOWED_BY] + key * experts * 4, experts)
    times = f64_array(words[t.FOLLOWED], words[t.NUM_LAYERS] * experts)
    new = i64_array(new_at, 1 + count)
    if times[key] >= MOST_FOLLOWED:
        times[key] /= 2
        for expert in range(experts):
            followed[expert] /= 2
    times[key] += 1
    for i in range(count):
        followed[new[1 + i]] += 1


@inner
def _foretell(table: int, lane: int, layer: int) -> None:
    """Raise each expert of a layer by what a lane's last token there foretells, instead of what the one before did."""
    words = i64_array(table, t.TABLE_WORDS)
    layers, experts = words[t.NUM_LAYERS], words[t.NUM_EXPERTS]
    size = layers * experts
    last = i64_array(last_token_at(table, lane, layer), 1 + words[t.TOP_K])
    raised, times = f64_array(words[t.RAISED], size), f64_array(words[t.FOLLOWED], size)
    slow = f64_array(words[t.SLOW], size)
    own = f32_array(words[t.RAISED_BY] + (lane * layers + layer) * experts * 4, experts)
    count, least = last[0], LEAST_SHARE * f64_array(words[t.NUMBERS], 4)[t.PRIOR]
    for expert in range(experts):
        raised[layer * experts + expert] -= own[expert]
        own[expert] = 0
    for i in range(count):
        key = layer * experts + last[1 + i]
        followed = f32_array(words[t.FOLLOWED_BY] + key * experts * 4, experts)
        weight = 1 / (count * (times[key] + SHARE_WEIGHT))
        for expert in range(experts):
            share = max(slow[layer * experts + expert], least)
            # (F + m·share) / (N + m) / share - 1, of which the terms without F are the same for all
            own[expert] += followed[expert] / share * weight + SHARE_WEIGHT * weight - 1 / count
    for expert in range(experts):
        raised[layer * experts + expert] += own[expert]


@inner
def learn_token(table: int, lane: int, layer: int) -> None:
    """Take the one new token of a layer for a lane's: it followed the lane's last one there, and foretells the next."""
    words = i64_array(table, t.TABLE_WORDS)
    if words[t.FOLLOWED_BY] == 0:
        return
    new_at = new_token_at(table, layer)
    last, new = i64_array(last_token_at(table, lane, layer), 1 + words[t.TOP_K]), i64_array(new_at, 1 + words[t.TOP_K])
    for i in range(last[0]):
        _count_pair(table, layer, last[1 + i], new_at, new[0])
    for i in range(1 + new[0]):
        last[i] = new[i]
    i64_array(words[t.KNOWN], words[t.MAX_WORKERS])[lane] = 1
    _foretell(table, lane, layer)
