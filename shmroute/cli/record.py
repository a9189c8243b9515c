"""``shmroute record``: what workers recorded, looked at or merged into one trace."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from shmroute.cli.output import complain, console, note
from shmroute.errors import RecordingError
from shmroute.traces.npz import save_trace
from shmroute.traces.trace import Trace


def record(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where workers recorded.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the merged trace there (.npz).", show_default=False)
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Which run, by how its name begins; if DIR holds several.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Merge what the workers of a run recorded into one trace, or just say what is there.

    Recording is a setting of a cache: 'shmroute pager CHECKPOINT … --trace DIR', 'shmroute demo --trace DIR' or
    RuntimeConfig(trace=DIR). Then every worker appends to a file of its own in DIR; one that is killed leaves what it
    had written. This may be run at any time, also while workers record.

    UNFINISHED: records that a worker had begun as it was killed; DROPPED: those for which its file had no room in time.
    Neither is in the trace.

    'shmroute replay' reads a trace, or DIR itself.

    Example: shmroute record traces/monday --output monday.npz
    """
    # Here, since reading needs no more than NumPy, and other commands not even that.
    from shmroute.traces.merging import merge_files  # noqa: PLC0415
    from shmroute.traces.recorded_files import read_run  # noqa: PLC0415

    files = read_run(folder, run)
    trace = merge_files(folder, files)
    if output is not None:
        try:
            save_trace(trace, output)
        except OSError as error:
            raise RecordingError(f"{output} cannot be written: {error.strerror}") from error
    workers = [file.as_dict() for file in files]
    found = summary(trace) | {"output": None if output is None else str(output), "workers": workers}
    for worker in workers:
        if worker["errno"]:
            what = "its disk was full" if worker["errno"] == errno.ENOSPC else os.strerror(worker["errno"])
            complain(f"WARNING: {worker['file']} stopped growing: {what}; {worker['dropped']} records were dropped")
    if as_json:
        typer.echo(json.dumps(found))
        return
    console().print(headline(trace, found), soft_wrap=True)
    console().print(table_of(found))
    if output is not None:
        note(f"wrote {output}")


def summary(trace: Trace) -> dict[str, Any]:
    """A recorded trace in numbers."""
    recorded = trace.ids >= 0
    misses = int(trace.misses().sum())
    assert trace.stall_ns is not None
    return {
        "run": trace.meta["run"],
        "checkpoint": trace.meta["checkpoint"],
        "tokens": trace.num_tokens,
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "logits": trace.logits is not None,
        "incomplete_tokens": int((~recorded).any(axis=(1, 2)).sum()),
        "hit_rate": 1 - misses / int(recorded.sum()),
        "stall_ms_per_token": float(trace.stall_ns.sum()) / 1e6 / trace.num_tokens,
        **{name: trace.meta[name] for name in ("unfinished", "damaged", "dropped")},
    }


def headline(trace: Trace, found: dict[str, Any]) -> str:
    """The same in a line."""
    text = (
        f"{trace.name}, run {found['run'][:8]}: {found['tokens']} tokens, {found['num_layers']} layers × "
        f"{found['num_experts']} experts, top {found['top_k']}, {'with' if found['logits'] else 'without'} logits; "
        f"hit rate {found['hit_rate']:.3f}, {found['stall_ms_per_token']:.2f} ms of waiting a token"
    )
    return text + (f"; {found['incomplete_tokens']} tokens lack a layer" if found["incomplete_tokens"] else "")


def table_of(found: dict[str, Any]) -> Table:
    """What each worker recorded."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for label in ("LANE", "GENERATION", "PID", "ROUTED", "WAITS", "UNFINISHED", "DAMAGED", "DROPPED"):
        table.add_column(label, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for worker in found["workers"]:
        keys = ("lane", "generation", "pid", "routed", "waits", "unfinished", "damaged", "dropped")
        table.add_row(*(f"{worker[key]}" for key in keys), "" if worker["ended"] else "killed, or still records")
    return table
