"""The quality budget: how much the cache bonus may cost, held by steering the bonus, layer by layer.

A bonus buys hits by changing choices. What that costs is *measured* on the tokens that are routed anyway, either as the
gate's probability mass that the changed choices lost (``lost-mass``), or as the share of choices that changed
(``changed``): a number in [0, 1] for each token. The user sets its mean, the *cap*; the controller spends just that.
One strength per layer is steered, whatever the rule by which it acts, and nothing is assumed about its scale: every
step is a factor.

*Who does what.* A worker sums up what its calls spend in private memory, and adds that to the layer's account every
`FLUSH` tokens. Whoever finds that the account covers a period takes it, all of it, by one CAS, and takes one step.
Calls in which the bonus had nothing to say (none or all of the layer's experts resident) do not count.

*The step.* Far from the cap (under half of it or over twice) the controller *searches*: it multiplies the bonus by the
square root of what is missing, by `LEAP` at most. The loss grows at most as the square of a small bonus (as many more
choices change as each of them costs more), so that does not overshoot. Within reach it *tracks*, by Robbins and Monro
(1951): the n-th step is

    ln bonus <- ln bonus + (allowed - spent) / (n · allowed in a period)

whose noise averages out like that of a mean over all periods, down to 1 / `STEADY`. The mean of what is spent is
exactly the cap wherever that comes to rest. (A period ends early once twice its allowance is spent; since a step is
weighed by its tokens, Wald's identity keeps its mean right.) If the moving average leaves the cap by more than `DRIFT`
of it, or a period spends `BURST` times its allowance, the stream has changed, and the search begins anew.

*Where more bonus buys nothing*, in a period without a miss, it does not rise. Otherwise it ends at `MOST`, where no
gate tells it from infinity, and comes down by factors as soon as something is spent.

| word of the layer's bonus line | written by |
|---|---|
| value (`BONUS_VALUE`) | whoever took the account, by CAS; any user, by a store |
| account (`BONUS_ACCOUNT`): missing · tokens · amount, since the last step | workers, by fetch_add; taken by CAS to 0 |
| control (`BONUS_CONTROL`): steps · jumps · adjustments | whoever took the account, by CAS |
| measured (`BONUS_MEASURED`): moving average of the loss | likewise |

Linearization point of a step: the CAS of `control`, from what it was before the account was added to; so two steps
never start from the same state, and one that took too long is dropped. Death windows: before the account's CAS, what a
worker had summed up privately is lost; after it, one period's measurement; between the CAS of control and that of the
value, one step. Lock-free: a failed CAS means that another worker added or stepped.

*Jumps.* What was summed up under another bonus, before a step of the search, would be taken for the effect of the
present one; so the search's steps are counted, and a sum that saw one is thrown away.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from shmroute.config import RuntimeConfig
from shmroute.shared.atomic import cas, fetch_add, i64_array, load
from shmroute.shared.kernel import inner
from shmroute.shared.layout import BONUS_ACCOUNT, BONUS_CONTROL, BONUS_MEASURED, BONUS_VALUE
from shmroute.shared.words import (
    ACCOUNT_ONE_BITS,
    ACCOUNT_STEP_LIMIT,
    BONUS_ONE,
    account_amount,
    account_missing,
    account_tokens,
    control_adjustments,
    control_jumps,
    control_steps,
    pack_account,
    pack_bonus,
    pack_control,
    unpack_bonus,
)

FLUSH: Final = 8
"""Tokens that a worker sums up before it adds them to the layer's account."""

SHORTEST_PERIOD: Final = 32
LONGEST_PERIOD: Final = 1024

START: Final = 2.0**-10
"""The first bonus that a search tries from 0."""
LEAST: Final = 2.0**-20
MOST: Final = 2.0**10
LEAP: Final = 8.0
"""By what factor one step changes the bonus at most."""
STEADY: Final = 256
"""Periods over which the steadiest tracking averages."""
RECENT: Final = 8
"""Periods over which the moving average does."""
DRIFT: Final = 0.6
BURST: Final = 8.0

# Words of a plan's block.
LINE_AT: Final = 0  # address of the layer's bonus line
BY_MASS: Final = 1  # 1 if the cost is lost mass, 0 if it is the share of changed choices
CAP: Final = 2  # value x 2^32
PERIOD: Final = 3  # tokens
TOKENS: Final = 4  # summed up since the last flush
AMOUNT: Final = 5  # likewise, value x 2^32
MISSED: Final = 6  # 1 if one of them missed
JUMPS: Final = 7  # of the control word at the last flush
BLOCK_WORDS: Final = 8


def period_of(cap: float, measure: str, top_k: int) -> int:
    """Tokens of a period: so many that a dozen choices change in it at the cap, or four of those that are counted.

    At a lost mass of c about one token in 1 / (2 √c) changes a choice: the more change, the more each of them costs.
    """
    tokens = 4 / (cap * top_k) if measure == "changed" else 6.4 / math.sqrt(cap)
    return min(max(round(tokens), SHORTEST_PERIOD), LONGEST_PERIOD)


def fill_block(block: npt.NDArray[np.int64], line: int, config: RuntimeConfig) -> None:
    """Prepare a plan's block, int64 [BLOCK_WORDS], for a layer's bonus line; the config has a quality budget."""
    cap = config.router.quality_budget
    assert cap is not None
    block[LINE_AT], block[CAP] = line, max(round(cap * BONUS_ONE), 1)
    block[BY_MASS] = config.router.budget_measure == "lost-mass"
    block[PERIOD] = period_of(cap, config.router.budget_measure, config.top_k)


@inner
def tracked(steps: int, tokens: int, spent: float, period: int) -> float:
    """How far one step of tracking goes, in ln bonus; `spent` in units of what a token is allowed.

    A batch may have brought several periods at once; it is as many steps.
    """
    step = (tokens - spent) / (period * steps + max(tokens, period))
    return float(min(max(step, -math.log(LEAP)), math.log(LEAP)))


@inner
def searched(ratio: float) -> float:
    """How far one step of the search goes, in ln bonus; `ratio` of what was spent to what was allowed."""
    if ratio * LEAP * LEAP <= 1:
        return math.log(LEAP)
    return float(min(max(-0.5 * math.log(ratio), -math.log(LEAP)), math.log(LEAP)))


@inner
def stepped(bonus: float, step: float) -> float:
    """A bonus after a step in its logarithm."""
    if bonus <= 0:
        return START if step > 0 else 0.0
    return float(min(max(bonus * math.exp(step), LEAST), MOST))


@inner
def adjust(mine: npt.NDArray[np.int64], control: int, account: int) -> None:
    """Take an account that covers a period, and take one step; `control` was loaded before the account grew to this."""
    line, period, cap = mine[LINE_AT], mine[PERIOD], mine[CAP] / BONUS_ONE
    value, measured = load(line + BONUS_VALUE), load(line + BONUS_MEASURED)
    if not cas(line + BONUS_ACCOUNT, account, 0):
        return  # another worker added meanwhile: the step is its
    tokens = max(account_tokens(account), 1)
    loss = min(account_amount(account) / (1 << ACCOUNT_ONE_BITS) / tokens, 1.0)
    bonus, average, ratio = unpack_bonus(value), measured / BONUS_ONE, loss / cap
    steps, jumps = control_steps(control), control_jumps(control)
    share = max(1 / RECENT, 1 / (steps + 1)) * min(tokens / period, 1.0)
    average += (loss - average) * (1.0 if steps == 0 else share)
    if steps >= RECENT and abs(average - cap) > DRIFT * cap:
        steps = 0
    if ratio < 1 and account_missing(account) == 0:
        step = 0.0  # all hits already: there is nothing to be bought
    elif bonus <= 0 or ratio >= BURST or (steps == 0 and not 0.5 <= ratio <= 2):
        step = searched(ratio)
        steps, jumps = 0, jumps + 1
    else:
        step = tracked(steps, tokens, tokens * ratio, period)
        steps = min(steps + max(tokens // period, 1), STEADY)
    taken = pack_control(steps, jumps, control_adjustments(control) + 1)
    if cas(line + BONUS_CONTROL, control, taken):  # linearization point
        cas(line + BONUS_VALUE, value, pack_bonus(stepped(bonus, step)))  # a user's store meanwhile stands
        cas(line + BONUS_MEASURED, measured, pack_bonus(average))


@inner
def observe(block: int, tokens: int, amount: int, missed: bool) -> None:
    """Take in what one routing call spent.

    Parameters
    ----------
    block : int
        Address of the plan's block.
    tokens : int
        Of the call, in which the bonus could change choices.
    amount : int
        What they lost in all, value x 2^32 (`MASS_ONE` and `BONUS_ONE` are the same): at most 1 each.
    missed : bool
        Whether a choice missed.
    """
    mine = i64_array(block, BLOCK_WORDS)
    mine[TOKENS] += tokens
    mine[AMOUNT] += min(max(amount, 0), tokens * BONUS_ONE)
    if missed:
        mine[MISSED] = 1
    if mine[TOKENS] < FLUSH:
        return
    line = mine[LINE_AT]
    control = load(line + BONUS_CONTROL)
    tokens, amount, missing = mine[TOKENS], mine[AMOUNT], mine[MISSED]
    known, mine[JUMPS] = mine[JUMPS], control_jumps(control)
    mine[TOKENS] = mine[AMOUNT] = mine[MISSED] = 0
    if known != mine[JUMPS]:
        return  # some of it was spent under another bonus
    while tokens > ACCOUNT_STEP_LIMIT:  # a batch that the account's fields could not take from every worker at once
        tokens, amount = tokens >> 1, amount >> 1
    added = pack_account(missing, tokens, amount >> (32 - ACCOUNT_ONE_BITS))
    mine[AMOUNT] = amount & ((1 << (32 - ACCOUNT_ONE_BITS)) - 1)
    account = fetch_add(line + BONUS_ACCOUNT, added) + added
    allowed = mine[CAP] * mine[PERIOD]
    spent = account_amount(account) << (32 - ACCOUNT_ONE_BITS)
    if account_tokens(account) >= mine[PERIOD] or spent >= 2 * allowed:
        adjust(mine, control, account)
