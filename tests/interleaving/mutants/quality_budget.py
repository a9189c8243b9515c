"""Broken rules of the quality budget."""

from __future__ import annotations

from ..mutation import Mutant

QUALITY_BUDGET = (
    Mutant(
        "an account wiped out",
        "a step takes the account by CAS, as it was when it covered a period",
        "routing.quality_budget:adjust",
        (
            (
                "    if not cas(line + BONUS_ACCOUNT, account, 0):\n"
                "        return  # another worker added meanwhile: the step is its\n",
                "    cas(line + BONUS_ACCOUNT, load(line + BONUS_ACCOUNT), 0)\n",
            ),
        ),
        ("quality-budget", "quality-budget-batches"),
    ),
    Mutant(
        "steps from one state",
        "a step starts from the state that the last one left",
        "routing.quality_budget:adjust",
        (
            (
                "    if cas(line + BONUS_CONTROL, control, taken):  # linearization point\n",
                "    if cas(line + BONUS_CONTROL, load(line + BONUS_CONTROL), taken):\n",
            ),
        ),
        ("quality-budget-batches", "quality-budget"),
    ),
    Mutant(
        "a user's bonus undone",
        "a step changes the bonus that it started from",
        "routing.quality_budget:adjust",
        (
            (
                "        cas(line + BONUS_VALUE, value, pack_bonus(stepped(bonus, step)))",
                "        cas(line + BONUS_VALUE, load(line + BONUS_VALUE), pack_bonus(stepped(bonus, step)))",
            ),
        ),
        ("quality-budget", "quality-budget-batches"),
    ),
    Mutant(
        "spent under another bonus",
        "what was summed up before a jump is thrown away",
        "routing.quality_budget:observe",
        (("    if known != mine[JUMPS]:\n        return  # some of it was spent under another bonus\n", ""),),
        ("quality-budget",),
    ),
)
