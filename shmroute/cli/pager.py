"""``shmroute pager``: being the pager of a segment, which is created, adopted or waited for."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from shmroute.budget import too_few_for_a_cycle
from shmroute.cli.inspection import Users
from shmroute.cli.output import complain, human_bytes, note
from shmroute.cli.rule_options import HostShare, MaxRank, Rule, SparedLayers, TopJ
from shmroute.cli.runtime_options import (
    Bonus,
    Budget,
    BudgetMeasure,
    Eviction,
    IoThreads,
    KeepPageCache,
    QualityBudget,
    Trace,
    TraceLogits,
    chosen_config,
)
from shmroute.config import PagerConfig, RouterConfig, RuntimeConfig
from shmroute.errors import PagerStartError, SegmentClosingError, SegmentExistsError, SegmentNotFoundError
from shmroute.lifecycle import create_or_reclaim, reclaim, report_compilation
from shmroute.pager.process import run_pager
from shmroute.shared.kernel import load_kernels
from shmroute.shared.removal import claim_destruction, unlink_segment, wait_until_gone
from shmroute.shared.segment import Segment, attach_segment, checked_name

ATTEMPTS = 10
REMOVAL_TIMEOUT = 10.0
"""Seconds to wait for another process to finish removing the segment of that name."""


def pager(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face model folder.", show_default=False)],
    name: Annotated[str, typer.Option(help="By which workers attach.", show_default=False)],
    budget: Budget,
    standby: Annotated[
        bool, typer.Option("--standby", help="If another pager is at work, wait for its end and take over.")
    ] = False,
    io_threads: IoThreads = PagerConfig.io_threads,
    keep_page_cache: KeepPageCache = False,
    max_workers: Annotated[int, typer.Option(help="Worker processes at once.")] = RuntimeConfig.max_workers,
    bonus: Bonus = RouterConfig.cache_bonus,
    quality_budget: QualityBudget = RouterConfig.quality_budget,
    budget_measure: BudgetMeasure = RouterConfig.budget_measure,
    rule: Rule = RouterConfig.rule,
    top_j: TopJ = RouterConfig.top_j,
    max_rank: MaxRank = RouterConfig.max_rank,
    spared_layers: SparedLayers = RouterConfig.spared_layers,
    host_share: HostShare = RouterConfig.host_share,
    eviction: Eviction = PagerConfig.eviction,
    trace: Trace = None,
    trace_logits: TraceLogits = False,
) -> None:
    """Serve a cache of a checkpoint's experts until stopped.

    Creates the segment NAME, or adopts one with the same settings that has no pager; its resident experts stay. If it
    has a pager, that is an error, or with --standby this one waits and takes over when the other ends or dies.

    SIGTERM or Ctrl-C: hands over to a standby if there is one; else serves on until no worker is left and removes the
    segment. A second one leaves at once; the segment stays to be adopted.

    The budget is what the slots hold; the control part comes on top ('shmroute stat' shows both).

    Example: shmroute pager ./mixtral --name demo --budget 50%
    """
    checked_name(name)
    config = chosen_config(
        checkpoint,
        budget,
        RouterConfig(
            cache_bonus=bonus,
            rule=rule,
            top_j=top_j,
            max_rank=max_rank,
            spared_layers=spared_layers,
            host_share=host_share,
            quality_budget=quality_budget,
            budget_measure=budget_measure,
        ),
        io_threads=io_threads,
        keep_page_cache=keep_page_cache,
        eviction=eviction,
        trace=trace,
        trace_logits=trace_logits,
        max_workers=max_workers,
    )
    if problem := too_few_for_a_cycle(config.slots, config.num_layers, config.top_k):
        complain(f"WARNING: {problem}")
    load_kernels(report_compilation)
    segment, created = _segment(name, config)
    with contextlib.closing(segment):
        try:
            # No owner to watch: whoever made the segment, this pager was started by hand and is stopped by hand.
            outcome = run_pager(segment, standby=standby, announce=note)
        except PagerStartError:
            raise  # another pager is at work, even on a segment that was made here a moment ago
        except BaseException:
            if created:
                _remove_if_unused(segment)
            raise
        note(f"{name!r}: {outcome.value}")


def _segment(name: str, config: RuntimeConfig) -> tuple[Segment, bool]:
    """The segment to serve, and whether it was created: the one of that name if it has these settings, else a new one.

    An abandoned segment with the same settings is adopted, not replaced: its resident experts are still good.
    """
    for _ in range(ATTEMPTS):
        try:
            segment = attach_segment(name)
        except SegmentNotFoundError:
            with contextlib.suppress(SegmentExistsError):  # somebody else was faster: look again
                segment = create_or_reclaim(name, config)
                note(f"created {name!r}: {_size(segment)}")
                return segment, True
            continue
        except SegmentClosingError:
            # Of a dead remover the work is finished here; a live one is waited for.
            if not reclaim(name) and not wait_until_gone(name, REMOVAL_TIMEOUT):
                raise
            continue
        if segment.config.fingerprint == config.fingerprint:
            note(f"found {name!r}: {_size(segment)}")
            return segment, False
        with contextlib.closing(segment):
            users = Users.of(segment).living()
        if users or not reclaim(name):
            raise SegmentExistsError(
                f"{name!r} was made with other settings: {differences(segment.config, config)}. It is in use by "
                f"{', '.join(users) or 'somebody'}: give the same settings, choose another --name, or remove it with "
                f"'shmroute destroy {name} --force'"
            )
        note(f"removed an abandoned segment {name!r} of other settings")
    raise SegmentExistsError(f"the name {name!r} is being taken and freed by others all the time")


def _size(segment: Segment) -> str:
    config = segment.config
    experts = config.num_layers * config.num_experts
    control = segment.layout.total_bytes - config.budget_bytes
    return (
        f"{config.slots} slots for {experts} experts, {human_bytes(config.budget_bytes)} "
        f"and {human_bytes(control)} of control"
    )


def _remove_if_unused(segment: Segment) -> None:
    """After a failure: keep the segment only if somebody else may go on with it."""
    users = Users.of(segment)
    if users.live_workers or users.standby.lives:
        return
    if claim_destruction(segment):
        unlink_segment(segment)


def differences(there: RuntimeConfig, wanted: RuntimeConfig) -> str:
    """The settings in which two runtimes differ, in words: ``slots is 24 there, 12 wanted``."""
    mine, theirs = _flat(dataclasses.asdict(wanted)), _flat(dataclasses.asdict(there))
    if there.source_fingerprint != wanted.source_fingerprint:
        where = (_path(there), _path(wanted))
        words = [f"the checkpoint is {where[0]} there, {where[1]} wanted" + ", changed since" * (where[0] == where[1])]
    else:
        words = []
    words += [
        f"{key} is {theirs.get(key)!r} there, {mine.get(key)!r} wanted"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]
    return ", ".join(words)


def _path(config: RuntimeConfig) -> str:
    return "none" if config.source is None else str(config.source.arguments.get("path", config.source.factory))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, without those that a user does not set and cannot read."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in ("source", "source_fingerprint", "tensors", "layer_numbers"):
            continue  # the checkpoint's, told in its own words
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
