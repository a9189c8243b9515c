"""``shmroute replay``: what eviction policies would have done on recorded traces."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from shmroute.budget import parse_bytes, too_few_for_a_cycle, too_few_for_workers
from shmroute.cli.output import complain, console, human_bytes, human_duration, human_share
from shmroute.errors import ConfigError
from shmroute.extras import check_installed
from shmroute.lifecycle import report_compilation
from shmroute.pager.eviction.names import DEFAULT_POLICY, POLICIES
from shmroute.replay.prefetching import CHOICES, NONE, predictors_of
from shmroute.shared.words import MAX_LANES
from shmroute.validation import require, require_float, require_int

if TYPE_CHECKING:
    from shmroute.replay.run import Outcome
    from shmroute.replay.timing import Machine
    from shmroute.traces import Trace

ALL = "all"

COUNTED = {"issued": "ISSUED", "useful": "USED", "overtaken": "LATE", "cancelled": "CANCELLED"}
"""Of `Outcome.prefetches`, the columns of the table."""

EXPERT_SIZE = "16MiB"
"""Of traces that do not say how large their experts are."""


def replay(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="Recorded routing; see below.", show_default=False)
    ],
    slots: Annotated[
        str, typer.Option(help="Budgets: shares of all experts (25%) or numbers of slots, with commas between.")
    ] = "10%,25%,50%",
    policies: Annotated[str, typer.Option(help=f"With commas between: {', '.join(POLICIES)}, belady; or all.")] = ALL,
    workers: Annotated[int, typer.Option(help="Share the trace's tokens, each at a layer of its own.")] = 1,
    tokens: Annotated[
        int | None, typer.Option(help="Only the first so many of each trace.", show_default=False)
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(help="In each layer, for traces that do not say so (all but .npz).", show_default=False),
    ] = None,
    expert_size: Annotated[
        str | None,
        typer.Option(
            help=f"Bytes of one expert, such as 4MiB.  [default: the trace's, or {EXPERT_SIZE}]", show_default=False
        ),
    ] = None,
    bandwidth: Annotated[str, typer.Option(help="Bytes a second of loads, such as 3GB.")] = "3GB",
    compute: Annotated[float, typer.Option(help="Milliseconds that a worker computes a token in one layer.")] = 0.5,
    observe_every: Annotated[
        int, typer.Option(help="The pager looks at what was published once in so many steps (a token in a layer).")
    ] = 1,
    one_by_one: Annotated[
        bool,
        typer.Option(
            "--one-by-one",
            help="Policies learn of each access when it happens, as in textbooks, not of a token's in a layer at once.",
        ),
    ] = False,
    prefetch: Annotated[
        str,
        typer.Option(
            help=f"What is asked for ahead of demand, with commas between: {CHOICES}. oracle is what a worker's next "
            "layer will choose, the most that such a prediction could do. Not for belady."
        ),
    ] = NONE,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Instead: choose again from the recorded logits, residency and bonus, and compare exactly; exits with "
            "1 if anything differs.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    plots: Annotated[
        Path | None,
        typer.Option(
            help="Draw hit rates over slots and experts over time into this directory (needs shmroute\\[plots]).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Replay recorded routing offline, with the pager's own eviction policies, and the best possible one, Belady's.

    Hit: the expert was resident, or being loaded already. On time: it was there when the worker would compute it.
    Stall: what a token waits for loads in all. The model of time: a miss is asked for when its token is
    routed; loads run one after the other at BANDWIDTH; a worker computes a layer's resident experts while others load.
    What is asked for ahead of demand is loaded when nothing that is demanded is; the pager's own predictors and arbiter
    decide what (PagerConfig's predictors; of them gate needs hidden states, which a trace has not). Of these
    prefetches: issued; used before they went; late (demanded before their load began); cancelled (stale, or without
    room); accuracy: those used, of those loaded.

    TRACE is a folder that workers recorded to, or what 'shmroute record' made of it; any .npz with ids (integers
    [tokens, layers, k], -1 for not recorded) and meta (JSON with "experts"); a vLLM response with routed experts
    (.json) or one sequence's as .npy; Megatron Core's router trace (.jsonl); or .csv with the columns token, layer,
    expert.

    Example: shmroute replay trace.npz --slots 10%,25%,50% --policies lru,expected-next-use,belady --workers 4
    --prefetch none,transitions,transitions+affinity,oracle
    """
    # Here, since only this command compiles the kernels of the replay.
    from shmroute.replay.run import replay as replay_trace  # noqa: PLC0415
    from shmroute.replay.timing import Machine  # noqa: PLC0415
    from shmroute.shared.kernel import load_kernels  # noqa: PLC0415
    from shmroute.traces import open_trace  # noqa: PLC0415

    require_int("--workers", workers, 1, MAX_LANES)
    require_int("--observe-every", observe_every, 1, 1 << 30)
    require_float("--compute", compute, 0, 1e9)
    if tokens is not None:
        require_int("--tokens", tokens, 1, 1 << 40)
    if experts is not None:
        require_int("--experts", experts, 1, 1 << 12)
    ahead = chosen_prefetching(prefetch)
    chosen = chosen_policies(policies)
    size = None if expert_size is None else _positive("--expert-size", expert_size)
    speed = float(_positive("--bandwidth", bandwidth))
    if plots is not None:
        check_installed("plots", "--plots")
    opened = [
        trace if tokens is None else trace.tokens(0, tokens) for trace in (open_trace(p, experts) for p in traces)
    ]
    if verify:
        _verify(opened, as_json)
        return
    budgets = [chosen_slots(slots, trace) for trace in opened]
    load_kernels(report_compilation)
    results: list[dict[str, Any]] = []
    for used, budget in zip(opened, budgets, strict=True):
        for warning in warnings(used, budget, workers):
            complain(f"WARNING: {warning}")
        machine = Machine(size or expert_bytes_of(used), speed, compute / 1000)
        outcomes = replay_trace(
            used, budget, chosen, machine, workers=workers, one_by_one=one_by_one, observe_every=observe_every,
            prefetch=ahead,
        )  # fmt: skip
        results.append(as_dict(used, workers, machine, outcomes))
        if not as_json:
            console().print(rendered(used, workers, outcomes))
    if plots is not None:
        from shmroute.replay.plots import draw_hit_rates, draw_timeline  # noqa: PLC0415

        for used, result in zip(opened, results, strict=True):
            draw_hit_rates(result, plots)
            draw_timeline(used, plots)
    if as_json:
        typer.echo(json.dumps({"traces": results}))


def _verify(traces: list[Trace], as_json: bool) -> None:
    """``--verify``."""
    from shmroute.replay.choices import verify  # noqa: PLC0415
    from shmroute.shared.kernel import load_kernels  # noqa: PLC0415

    load_kernels(report_compilation)
    found = [verify(trace) for trace in traces]
    if as_json:
        results = [{"trace": trace.path, **one.as_dict()} for trace, one in zip(traces, found, strict=True)]
        typer.echo(json.dumps({"traces": results}))
    for trace, one in zip(traces, found, strict=True):
        if not as_json:
            left_out = f" ({one.not_recorded} were not recorded)" if one.not_recorded else ""
            typer.echo(
                f"{trace.name}: {one.choices} choices of {trace.num_tokens} tokens chosen again{left_out}: "
                + ("all exactly as recorded" if one.exact else
                   f"{one.different_ids} of other experts, {one.different_weights} with other weights")
            )  # fmt: skip
            if one.first is not None:
                typer.echo(
                    f"first in token {one.first['token']}, layer {one.first['layer']}: recorded "
                    f"{one.first['recorded']['ids']} {one.first['recorded']['weights']}, chosen again "
                    f"{one.first['recomputed']['ids']} {one.first['recomputed']['weights']}"
                )
    if not all(one.exact for one in found):
        raise typer.Exit(1)


def chosen_policies(text: str) -> list[str]:
    """The policies that an option names.

    Raises
    ------
    ConfigError
        If there is no such policy.
    """
    known = [*POLICIES, "belady"]
    names = known if text.strip() == ALL else [name.strip() for name in text.split(",")]
    for name in names:
        require(name in known, f"--policies: there is no policy {name!r}; give {', '.join(known)}, or {ALL}")
    return list(dict.fromkeys(names))


def chosen_prefetching(text: str) -> list[str]:
    """The ways of prefetching that an option names.

    Raises
    ------
    ConfigError
        If there is no such one.
    """
    names = ["+".join(part.strip() for part in name.split("+")) for name in text.split(",")]
    for name in names:
        try:
            predictors_of(name)
        except ConfigError as error:
            raise ConfigError(f"--prefetch: {error}") from error
    return list(dict.fromkeys(names))


def chosen_slots(text: str, trace: Trace) -> list[int]:
    """The budgets that an option names, in slots.

    Raises
    ------
    ConfigError
        If one is no share in (0 %, 100 %] and no number from 1 to all experts.
    """
    total = trace.num_layers * trace.num_experts
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*(%?)\s*", item, re.ASCII)
        if match is None or (not match[2] and "." in match[1]):
            raise ConfigError(f"--slots: {item!r} is neither a share such as 25% nor a number of slots")
        slots = int(total * Fraction(match[1]) / 100) if match[2] else int(match[1])
        share = Fraction(match[1]) if match[2] else Fraction(slots * 100, total)
        if not 0 < share <= 100 or slots < 1:
            raise ConfigError(
                f"--slots: {item.strip()!r} is {slots} slots; {trace.path} has {total} experts "
                f"({trace.num_layers} layers × {trace.num_experts}), so give 1 to {total}, or a share up to 100%"
            )
        found.append(slots)
    return list(dict.fromkeys(found))


def warnings(trace: Trace, budgets: list[int], workers: int) -> list[str]:
    """What is wrong with budgets that can be replayed, but hardly served."""
    found = []
    for slots in budgets:
        found += [too_few_for_workers(slots, workers), too_few_for_a_cycle(slots, trace.num_layers, trace.top_k)]
    return [problem for problem in found if problem is not None]


def expert_bytes_of(trace: Trace) -> int:
    """What a trace says of its experts' size, else `EXPERT_SIZE`."""
    recorded = trace.meta.get("expert_bytes")
    return recorded if isinstance(recorded, int) and recorded > 0 else parse_bytes(EXPERT_SIZE)


def as_dict(trace: Trace, workers: int, machine: Machine, outcomes: list[Outcome]) -> dict[str, Any]:
    """One trace of the JSON object."""
    return {
        "trace": trace.path,
        "tokens": trace.num_tokens,
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "workers": workers,
        "machine": dataclasses.asdict(machine),
        "results": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def rendered(trace: Trace, workers: int, outcomes: list[Outcome]) -> Table:
    """The same for people."""
    total = trace.num_layers * trace.num_experts
    table = Table(
        box=None, pad_edge=False, header_style="bold", title_justify="left",
        title=f"{trace.name}: {trace.num_tokens} tokens, {trace.num_layers} layers × {trace.num_experts} experts, "
        f"top {trace.top_k}, {workers} worker{'s' * (workers > 1)}",
    )  # fmt: skip
    table.add_column("SLOTS", justify="right", no_wrap=True)
    table.add_column("POLICY", no_wrap=True)
    ahead = any(outcome.prefetch != NONE for outcome in outcomes)
    if ahead:
        table.add_column("PREFETCH", overflow="fold")  # a long one makes room for the figures
    labels = ["HIT RATE", "ON TIME", "STALL/TOKEN", "LOADED/TOKEN", *([] if ahead else ["LOADS"])]
    for label in [*labels, *([*COUNTED.values(), "ACCURACY"] if ahead else [])]:
        table.add_column(label, justify="right", no_wrap=True)
    previous = None
    for outcome in outcomes:
        label = f"{outcome.slots} ({human_share(outcome.slots / total)})" if outcome.slots != previous else ""
        if previous not in (None, outcome.slots):
            table.add_section()
        previous = outcome.slots
        table.add_row(
            label,
            outcome.policy + " (default)" * (outcome.policy == DEFAULT_POLICY),
            *([outcome.prefetch] if ahead else []),
            f"{outcome.hit_rate:.3f}",
            f"{outcome.on_time:.3f}",
            human_duration(outcome.stall_per_token * 1e6),
            human_bytes(math.floor(outcome.bytes_per_token)),
            *([] if ahead else [str(outcome.loads)]),
            *([str(outcome.prefetches[count]) for count in COUNTED] if ahead else []),
            *([human_share(outcome.prefetch_accuracy)] if ahead else []),
        )
    return table


def _positive(option: str, text: str) -> int:
    size = parse_bytes(text)
    require(size > 0, f"{option} must be above 0, not {text!r}")
    return size
