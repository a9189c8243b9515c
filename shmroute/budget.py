"""How much memory a user allows, in slots."""

from __future__ import annotations

import re
from fractions import Fraction

from shmroute.errors import ConfigError
from shmroute.shared.layout import PAGE
from shmroute.validation import require


def slot_bytes_of(expert_bytes: int) -> int:
    """Bytes of a slot: an expert, rounded up to whole pages."""
    return -(-expert_bytes // PAGE) * PAGE


UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


NUMBER = r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*"
"""How a budget's number is written."""


def parse_bytes(text: str) -> int:
    """Read a size such as ``"5MiB"``, ``"2 GB"`` or ``"4096"``.

    Raises
    ------
    ConfigError
        If it is no size.
    """
    match = re.fullmatch(rf"{NUMBER}(?:([A-Za-z]+)\s*)?", text, re.ASCII)
    unit = match and (match[2] or "").lower()
    if match is None or unit not in UNITS:
        raise ConfigError(f"{text!r} is no size: write bytes, or a number with kB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return int(Fraction(match[1]) * UNITS[unit])


def too_few_for_a_cycle(slots: int, num_layers: int, top_k: int) -> str | None:
    """What is wrong with a budget that does not hold one token's experts of all layers; None if it does."""
    cycle = num_layers * top_k
    if slots >= cycle:
        return None
    return (
        f"{slots} slots are fewer than one token's cycle of {num_layers} layers × {top_k} experts = {cycle}: what a "
        f"token loads is evicted before the next one comes round; give {cycle} slots or more"
    )


def too_few_for_workers(slots: int, workers: int) -> str | None:
    """What is wrong with a budget that does not hold an expert for each worker and one more; None if it does."""
    if slots >= workers + 1:
        return None
    return (
        f"{slots} slots are fewer than {workers} workers + 1 = {workers + 1}: each worker leases one expert while "
        f"another loads, so workers will wait for each other; give {workers + 1} slots or more"
    )


def slots_of_budget(budget: str | int, experts: int, expert_bytes: int) -> int:
    """How many slots a budget pays for, at most one for each expert.

    Parameters
    ----------
    budget : str or int
        ``"50%"`` of the experts, a size such as ``"2GiB"``, or bytes.
    experts : int
        Experts in all layers together.
    expert_bytes : int

    Raises
    ------
    ConfigError
        If it is no budget, or under one slot.
    """
    slot_bytes = slot_bytes_of(expert_bytes)
    if isinstance(budget, str) and budget.strip().endswith("%"):
        match = re.fullmatch(rf"{NUMBER}%\s*", budget, re.ASCII)
        if match is None:
            raise ConfigError(f"{budget!r} is no share: write a number and %, such as '50%'")
        share = Fraction(match[1]) / 100  # exact: as floats, 29% of 100 are 28
        require(0 < share <= 1, f"a budget's share must be above 0% and at most 100%, not {budget!r}")
        slots = int(experts * share)
    else:
        size = parse_bytes(budget) if isinstance(budget, str) else budget
        require(
            isinstance(size, int) and not isinstance(size, bool),
            f"a budget is bytes (int), a size ('2GiB') or a share ('50%'), not {budget!r}",
        )
        slots = min(size // slot_bytes, experts)
    if slots < 1:
        raise ConfigError(
            f"a budget of {budget!r} holds no expert: one slot takes {slot_bytes} bytes; "
            f"the {experts} experts take {experts * slot_bytes} bytes in all"
        )
    return slots
