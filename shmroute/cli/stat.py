"""``shmroute stat``: what a segment holds, who uses it, and how well it goes."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from shmroute.cli.inspection import Users
from shmroute.cli.output import console, human_bytes, human_duration, human_share, note
from shmroute.lifecycle import report_compilation
from shmroute.metrics import read_metrics
from shmroute.shared.kernel import load_kernels
from shmroute.shared.layout import (
    BONUS_CONTROL,
    BONUS_MEASURED,
    HEADER_TURNED_DOWN,
    LANE_CURSOR,
    LANE_WAIT,
    LINE,
    SLOT_HEADER_BYTES,
)
from shmroute.shared.metrics import Predictor, snapshot_words
from shmroute.shared.removal import is_published
from shmroute.shared.segment import Segment, attach_segment
from shmroute.shared.turned_down import is_turned_down
from shmroute.shared.words import (
    FAILED,
    LOADING,
    LOW32,
    REQUESTED,
    RESIDENT,
    STATE_BITS,
    STATE_SHIFT,
    control_adjustments,
    request_expert,
    request_layer,
    unpack_bonus,
)

DEFAULT_INTERVAL = 1.0
LOOK = 0.2
"""Longest time, in seconds, for which a watch does not notice that the segment went away."""

BAR = 24


class StatCommand(TyperCommand):
    """A command whose ``--watch`` may stand without its number, which neither Typer nor its parser offers."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare ``--watch`` its default."""
        return super().parse_args(ctx, with_interval(args))


def with_interval(arguments: list[str]) -> list[str]:
    """`arguments`, with the default interval after a ``--watch`` that no number follows."""
    completed = []
    for i, argument in enumerate(arguments):
        completed.append(argument)
        if argument == "--watch" and not _is_number(arguments[i + 1 : i + 2]):
            completed.append(str(DEFAULT_INTERVAL))
    return completed


def _is_number(following: list[str]) -> bool:
    with contextlib.suppress(ValueError, IndexError):
        float(following[0])
        return True
    return False


def stat(
    name: Annotated[str, typer.Argument(help="Of the segment.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object; with --watch one line each time.")] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            metavar="[SECONDS]", min=0.1, show_default=False, help="Go on, at this interval; 1 second if none is given."
        ),
    ] = None,
) -> None:
    """Show what a segment holds, who uses it, and how well it goes.

    Takes no worker lane. A watch ends when the segment goes away (exit code 0) or with Ctrl-C (130).

    Keys of the JSON object:

    name, uuid, state (live or closing), time (seconds since 1970), checkpoint, num_layers, num_experts, top_k,
    max_workers, quality_budget (or null), budget_measure (lost-mass or changed);

    expert_bytes, slots, resident, slot_bytes, budget_bytes (what the slots hold), control_bytes (all else),
    slot_header_bytes (the part of control_bytes that grows with the slots), total_bytes;

    owner, pager, standby: each pid and state (alive, stopped, dead or none);

    workers: lane, pid, state, layer (routed last), waits_for (layer and expert, or null), hit_rate, the counters of
    a lane (lost_mass: the probability that changed choices lost, summed over tokens), route and wait (count, p50_us,
    p99_us, p999_us);

    total: the same counters of all workers that ever were (device_hits: hits whose expert was in the worker's GPU;
    device_copies: experts copied there); hit_rate: of these;

    pager_counters: loads, bytes_read, evictions, failures, prefetches, queued …, load (as route), prefetch_accuracy
    (useful of the completed) and predictors (of each: issued, completed, useful, wasted, overtaken, cancelled);

    turned_down: predictors that cost more than they save as things are: workers have withheld so many speculations;

    layers: layer, number (in the model), resident, requested, loading, failed, leased (experts), bonus; with
    a quality budget spent (of late, for each token, or null) and adjustments (of the bonus).

    Example: shmroute stat demo --watch 2
    """
    if watch is not None and not math.isfinite(watch):
        raise typer.BadParameter(f"{watch} is no number of seconds", param_hint="'--watch'")
    load_kernels(report_compilation)
    with contextlib.closing(attach_segment(name)) as segment:
        if watch is None:
            _print(snapshot(segment), as_json)
        else:
            _watch(segment, watch, as_json)


def _print(shot: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(shot))
    else:
        console().print(render(shot))


def _watch(segment: Segment, interval: float, as_json: bool) -> None:
    out = console()
    with contextlib.ExitStack() as stack:
        live = None
        if out.is_terminal and not as_json:
            live = stack.enter_context(Live(console=out, auto_refresh=False))
        while not _gone(segment):
            shot = snapshot(segment)
            if live is not None:
                live.update(render(shot), refresh=True)
            elif as_json:
                typer.echo(json.dumps(shot))
            else:
                out.print(render(shot), Text())
            until = time.monotonic() + interval
            while (left := until - time.monotonic()) > 0 and not _gone(segment):
                time.sleep(min(left, LOOK))
    note(f"the segment {segment.name!r} is gone")


def _gone(segment: Segment) -> bool:
    """Whether the segment is being removed, or its name stands for another one or none."""
    return not is_published(segment) or segment.closing


# ------------------------------------------------------------------ looking


def snapshot(segment: Segment) -> dict[str, Any]:
    """What `shmroute stat --json` prints; its help says what the keys mean."""
    config, layout = segment.config, segment.layout
    metrics, users = read_metrics(segment), Users.of(segment)
    layers = [_layer(segment, layer) for layer in range(config.num_layers)]
    workers = []
    for worker in metrics.workers:
        if worker.lane not in users.workers:
            continue  # it left between the two looks
        lane = layout.lane(worker.lane)
        wait = segment.read(lane + LANE_WAIT)
        workers.append(
            worker.as_dict()
            | asdict(users.workers[worker.lane])
            | {
                # A lane's cursor outlives its worker: before the first route it is somebody else's.
                "layer": segment.read(lane + LANE_CURSOR) if worker.counters["calls"] else None,
                "waits_for": {"layer": request_layer(wait - 1), "expert": request_expert(wait - 1)} if wait else None,
            }
        )
    return {
        "name": segment.name,
        "uuid": segment.uuid,
        "state": "closing" if segment.closing else "live",
        "time": time.time(),
        "checkpoint": config.source and str(config.source.arguments.get("path", config.source.factory)),
        "num_layers": config.num_layers,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "max_workers": config.max_workers,
        "quality_budget": config.router.quality_budget,
        "budget_measure": config.router.budget_measure,
        "expert_bytes": config.expert_bytes,
        "slots": config.slots,
        "resident": sum(layer["resident"] for layer in layers),
        "slot_bytes": config.slot_bytes,
        "budget_bytes": config.budget_bytes,
        "control_bytes": metrics.control_bytes,
        "slot_header_bytes": config.slots * SLOT_HEADER_BYTES,
        "total_bytes": layout.total_bytes,
        "owner": asdict(users.owner),
        "pager": asdict(users.pager),
        "standby": asdict(users.standby),
        "workers": workers,
        "total": {key: value for key, value in metrics.total.as_dict().items() if key not in ("lane", "pid")},
        "hit_rate": metrics.hit_rate,
        "turned_down": _turned_down(segment),
        "pager_counters": {key: value for key, value in metrics.pager.as_dict().items() if key != "pid"},
        "layers": layers,
    }


def _turned_down(segment: Segment) -> list[str]:
    """The predictors that the pager has turned down."""
    word = segment.read(HEADER_TURNED_DOWN)
    return [predictor.name.lower() for predictor in Predictor if is_turned_down(word, predictor)]


def _layer(segment: Segment, layer: int) -> dict[str, Any]:
    """One layer's experts by state, from their words: those are the truth, the bitmap is the router's copy."""
    config, layout = segment.config, segment.layout
    words = snapshot_words(segment.address + layout.row(layout.experts, layer), config.num_experts)
    states = (words >> STATE_SHIFT) & ((1 << STATE_BITS) - 1)
    control = segment.read(layout.bonus + layer * LINE + BONUS_CONTROL)
    spent = round(unpack_bonus(segment.read(layout.bonus + layer * LINE + BONUS_MEASURED)), 9) if control else None
    return {
        "layer": layer,
        "number": config.layer_numbers[layer],
        "resident": int(np.count_nonzero(states == RESIDENT)),
        "requested": int(np.count_nonzero(states == REQUESTED)),
        "loading": int(np.count_nonzero(states == LOADING)),
        "failed": int(np.count_nonzero(states == FAILED)),
        "leased": int(np.count_nonzero(words & LOW32)),
        "bonus": round(unpack_bonus(segment.read(layout.bonus + layer * LINE)), 9),
        "spent": spent,
        "adjustments": control_adjustments(control),
    }


# ------------------------------------------------------------------ showing


def render(shot: dict[str, Any]) -> RenderableType:
    """A snapshot for people."""
    parts: list[RenderableType] = [_summary(shot), Text()]
    if shot["workers"]:
        parts += [_workers(shot), Text()]
    return Group(*parts, _layers(shot))


def _printable(text: str) -> str:
    """`text` as a terminal can show it: a path may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _process(one: dict[str, Any]) -> str:
    return "-" if one["pid"] is None else f"{one['pid']} {one['state']}"


def _summary(shot: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    total, pager = shot["total"], shot["pager_counters"]
    load, route = pager["load"], total["route"]
    live = sum(worker["state"] != "dead" for worker in shot["workers"])
    rows = {
        "segment": f"{shot['name']}  {shot['uuid']}" + "  (closing)" * (shot["state"] == "closing"),
        "checkpoint": _printable(shot["checkpoint"] or "none: routing alone"),
        "geometry": f"{shot['num_layers']} layers × {shot['num_experts']} experts, top {shot['top_k']}, "
        f"{human_bytes(shot['expert_bytes'])} each",
        "budget": f"{human_bytes(shot['budget_bytes'])} in {shot['slots']} slots, {shot['resident']} resident",
        "control": f"{human_bytes(shot['control_bytes'])} on top of the budget, "
        f"{human_bytes(shot['slot_header_bytes'])} of it slot headers; {human_bytes(shot['total_bytes'])} in all",
        "processes": f"owner {_process(shot['owner'])}, pager {_process(shot['pager'])}, "
        f"standby {_process(shot['standby'])}, {live} of {shot['max_workers']} workers",
        **(
            {"quality budget": f"{shot['quality_budget']:.2%} of a token ({shot['budget_measure']})"}
            if shot["quality_budget"] is not None
            else {}
        ),
        "total": f"{total['tokens']} tokens in {total['calls']} calls, hit rate {human_share(shot['hit_rate'])}, "
        f"route p50 {human_duration(route['p50_us'])} p99 {human_duration(route['p99_us'])}, "
        f"{total['changed']} choices changed for a lost mass of {total['lost_mass']:.3g}, "
        f"{total['leases']} leases, {total['waits']} waits, {total['load_errors']} load errors"
        + f", {total['recorded']} recorded, {total['unrecorded']} dropped"
        * (total["recorded"] + total["unrecorded"] > 0),
        **({"GPU": _gpu(total, shot["expert_bytes"])} if total["device_copies"] else {}),
        "prefetches": _prefetches(pager["predictors"], pager["prefetch_accuracy"])
        + f"; turned down now: {', '.join(shot['turned_down'])}" * bool(shot["turned_down"])
        + f"; {total['withheld']} speculations withheld" * bool(total["withheld"]),
        "pager": f"{pager['loads']} loads ({pager['prefetches']} prefetched, {pager['failures']} failed), "
        f"{human_bytes(pager['bytes_read'])} read, p50 {human_duration(load['p50_us'])} "
        f"p99 {human_duration(load['p99_us'])}, {pager['evictions']} evictions, {pager['queued']} queued, "
        f"{pager['takeovers']} takeovers, {pager['reaped_lanes']} reaped lanes",
    }
    for label, value in rows.items():
        table.add_row(label, Text(value))
    return table


def _gpu(total: dict[str, Any], expert_bytes: int) -> str:
    """What the workers' caches in GPUs did."""
    share = total["device_hits"] / max(total["hits"] + total["misses"], 1)
    copies = total["device_copies"]
    return f"hit rate {human_share(share)}, {copies} experts copied ({human_bytes(copies * expert_bytes)})"


def _prefetches(predictors: dict[str, dict[str, int]], accuracy: float | None) -> str:
    """Of each predictor that did something: useful, of those loaded."""
    active = [f"{name} {of['useful']} of {of['completed']}" for name, of in predictors.items() if of["issued"]]
    return f"{human_share(accuracy)} useful: {', '.join(active)}" if active else "none"


def _spent(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.2%}"


def _workers(shot: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for label in ("LANE", "PID", "STATE", "LAYER", "WAITS FOR", "TOKENS", "HITS", "ROUTE P50", "P99", "WAITS", "P99"):
        table.add_column(label, justify="right", no_wrap=True)
    for worker in shot["workers"]:
        waits_for = worker["waits_for"]
        table.add_row(
            str(worker["lane"]),
            str(worker["pid"]),
            Text(worker["state"], style={"alive": "green", "stopped": "yellow"}.get(worker["state"], "red")),
            "-" if worker["layer"] is None else str(worker["layer"]),
            f"{waits_for['layer']}.{waits_for['expert']}" if waits_for else "-",
            str(worker["tokens"]),
            human_share(worker["hit_rate"]),
            human_duration(worker["route"]["p50_us"]),
            human_duration(worker["route"]["p99_us"]),
            str(worker["waits"]),
            human_duration(worker["wait"]["p99_us"]),
        )
    return table


def _layers(shot: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("LAYER", justify="right")
    table.add_column("RESIDENT", no_wrap=True)
    steered = shot["quality_budget"] is not None
    for label in ("LEASED", "LOADING", "REQUESTED", "FAILED", "BONUS", *(("SPENT", "ADJUSTED") if steered else ())):
        table.add_column(label, justify="right", no_wrap=True)
    experts = shot["num_experts"]
    for layer in shot["layers"]:
        width = min(BAR, experts)
        filled = -(-layer["resident"] * width // experts)  # one resident expert always shows
        table.add_row(
            str(layer["layer"]) + f" ({layer['number']})" * (layer["number"] != layer["layer"]),
            Text.assemble(("█" * filled, "green"), ("░" * (width - filled), "dim"), f" {layer['resident']}/{experts}"),
            *(str(layer[key]) for key in ("leased", "loading", "requested", "failed")),
            f"{layer['bonus']:g}" if layer["bonus"] else "0",
            *((_spent(layer["spent"]), str(layer["adjustments"])) if steered else ()),
        )
    return table
