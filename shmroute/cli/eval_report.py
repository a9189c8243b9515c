"""What ``shmroute eval`` found: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.table import Table

from shmroute.cli.output import human_share

if TYPE_CHECKING:
    from shmroute.evaluation.comparison import Outcome
    from shmroute.evaluation.loop import Setting

RULE_OPTIONS = ("top_j", "max_rank", "spared_layers")
"""Settings of `RouterConfig` that a ``--rule`` may have."""

NONE = "none"
"""The rule without a bonus."""


def rule_of(setting: Setting) -> str:
    """A rule's name with all that is not as by default, but for its strength."""
    if not setting.config.router.memory_aware:
        return NONE
    factors = "" if set(setting.layer_factors) == {1.0} else f" ×{','.join(f'{f:g}' for f in setting.layer_factors)}"
    router = setting.config.router
    options = "".join(f":{name}={getattr(router, name)}" for name in RULE_OPTIONS if getattr(router, name))
    return router.rule + options + factors


def as_dict(outcomes: list[Outcome], task: Any, tokens: int) -> dict[str, Any]:
    """The JSON object."""
    return {
        **dataclasses.asdict(task),
        "tokens": tokens,
        "results": [
            {
                "budget": config.slots / (config.num_layers * config.num_experts),
                "slots": config.slots,
                "eviction": config.pager.eviction,
                "rule": rule_of(one.setting),
                "strength": config.router.cache_bonus if config.router.memory_aware else 0.0,
                **{name: value for name, value in vars(one).items() if name not in ("setting", "live")},
                **({} if one.live is None else dataclasses.asdict(one.live)),
            }
            for one in outcomes
            for config in (one.setting.config,)
        ],
    }


def rendered(outcomes: list[Outcome]) -> list[Table]:
    """The same for people: a table for each budget and policy, 80 columns wide if no rule has factors."""
    tables: dict[tuple[int, str], Table] = {}
    for one in outcomes:
        config = one.setting.config
        group = config.slots, config.pager.eviction
        if group not in tables:
            share = human_share(config.slots / (config.num_layers * config.num_experts))
            tables[group] = _empty_table(f"{config.slots} slots ({share}), {config.pager.eviction}")
        biased = config.router.memory_aware
        change = f"{one.perplexity_change:+.2%} ({one.low:+.2%} … {one.high:+.2%})"
        tables[group].add_row(
            rule_of(one.setting),
            f"{config.router.cache_bonus:g}" if biased else "",
            f"{one.hit_rate:.3f}",
            human_share(one.misses_left) if biased else "",
            human_share(one.changed) if biased else "",
            f"{one.loads_per_token:.2f}",
            change if biased else f"{one.perplexity:.3f}",
        )
    return list(tables.values())


def costs_rendered(outcomes: list[Outcome]) -> Table:
    """What real processes took, a row for each setting; 80 columns wide."""
    table = Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", title_justify="left",
        title="time and memory (MB: RSS, and PSS that adds up)",
    )  # fmt: skip
    table.add_column("SLOTS", justify="right", no_wrap=True)
    table.add_column("RULE", overflow="fold")
    for label in ("TOKENS/S", "STALL ms", "READ MB", "WORKERS", "PAGER", "TOGETHER"):
        table.add_column(label, justify="right", no_wrap=True)
    for one in outcomes:
        costs, router = one.live, one.setting.config.router
        assert costs is not None, "real processes ran it"
        table.add_row(
            str(one.setting.config.slots),
            f"{rule_of(one.setting)} {router.cache_bonus:g}" if router.memory_aware else NONE,
            f"{costs.tokens_per_second:,.0f}",
            f"{1000 * costs.stall_per_token:.2f}",
            f"{costs.bytes_per_token / 1e6:.2f}",
            f"{costs.workers_rss / 1e6:,.0f}",
            f"{costs.pager_rss / 1e6:,.0f}",
            f"{(costs.workers_pss + costs.pager_pss) / 1e6:,.0f}",
        )
    return table


def _empty_table(title: str) -> Table:
    table = Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", title=title, title_justify="left"
    )  # fmt: skip
    table.add_column("RULE", overflow="fold")
    for label in ("STRENGTH", "HITS", "MISSES", "CHANGED", "LOADS", "PERPLEXITY"):
        table.add_column(label, justify="right", no_wrap=True)
    return table
