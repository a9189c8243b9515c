"""``shmroute serve``: a model behind an OpenAI-compatible HTTP endpoint, its experts shared by all worker processes."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from shmroute.budget import too_few_for_a_cycle, too_few_for_workers
from shmroute.cli.output import complain, note
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
from shmroute.config import PagerConfig, RouterConfig
from shmroute.device_tier import device_slots
from shmroute.errors import ConfigError, SmallBudgetWarning
from shmroute.extras import check_installed
from shmroute.shared.segment import checked_name
from shmroute.shared.words import MAX_LANES
from shmroute.validation import require, require_int

MAX_TEMPLATE_BYTES = 1 << 20


def serve(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face model folder.", show_default=False)],
    workers: Annotated[int, typer.Option(help="Worker processes: so many answers are generated at once.")] = 4,
    threads: Annotated[
        int | None, typer.Option(help="Of each worker; by default the cores are divided.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for any that is free.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="As clients call it; by default the folder's name.", show_default=False)
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file, instead of the checkpoint's own template.", show_default=False)
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and answer; by default all that the model was made for.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="A GPU such as cuda:0, for all workers; by default the CPU.", show_default=False),
    ] = None,
    device_budget: Annotated[
        str | None,
        typer.Option(
            help="With a device: its memory for the experts of each worker, a size or a share.", show_default=False
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait for a worker; more get status 429.")] = 64,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that requests under way have when the server is told to stop.")
    ] = 30.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for each request.")] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Of the cache, for 'shmroute stat'; by default one with this pid.", show_default=False),
    ] = None,
    budget: Budget = "50%",
    io_threads: IoThreads = PagerConfig.io_threads,
    keep_page_cache: KeepPageCache = False,
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
    """Serve a model over HTTP as OpenAI's API does, from several worker processes on one cache of its experts.

    Starts a pager and the workers, and keeps them at work: what a worker that dies was at, another one continues.
    Routes: /v1/completions, /v1/chat/completions (both also as streams), /v1/models, /health, /metrics. Needs the
    extra "serve".

    SIGTERM or Ctrl-C: requests under way are finished, new ones get status 503. A second one stops at once. Exit code
    1 if requests were cut off.

    Example: shmroute serve ./mixtral --workers 4 --budget 25%
    """
    check_installed("serve", "'shmroute serve'")
    from shmroute.serving.server import ServingSettings, context_length, run_server  # noqa: PLC0415 # needs the extra

    name = f"serve-{os.getpid()}" if name is None else name
    checked_name(name)
    require_int("--workers", workers, 1, MAX_LANES)
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // workers) if threads is None else threads
    require_int("--threads", threads, 1, 1024)
    require_int("--port", port, 0, 65535)
    require_int("--max-queue", max_queue, 0, 1 << 20)
    require(0 <= drain_timeout <= 86400, f"--drain-timeout must be 0 to 86400 seconds, not {drain_timeout}")
    require(
        max_model_len is None or max_model_len >= 2,
        f"--max-model-len must be 2 or more, a token of prompt and one of answer, not {max_model_len}",
    )
    if chat_template is not None:
        _check_template(chat_template)
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
    )
    require(
        (device is None) == (device_budget is None),
        f"--device is {device} and --device-budget {device_budget}: give both, or neither to compute on the CPU",
    )
    if device_budget is not None:
        device_slots(config, device_budget)  # whether there is such a device, the workers say
    settings = ServingSettings(
        checkpoint=checkpoint,
        name=name,
        model=checkpoint.resolve().name if served_model_name is None else served_model_name,
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        max_model_len=context_length(checkpoint, max_model_len),
        max_queue=max_queue,
        drain_timeout=drain_timeout,
        chat_template=chat_template,
        device=device,
        device_budget=device_budget,
        verbose=verbose,
    )
    problems = (
        too_few_for_a_cycle(config.slots, config.num_layers, config.top_k),
        too_few_for_workers(config.slots, workers),
    )
    for problem in filter(None, problems):
        complain(f"WARNING: {problem}")
    warnings.simplefilter("ignore", SmallBudgetWarning)  # said above, once for all processes
    # Until the server drains by itself: leave the `with` blocks, which end the workers and remove the cache.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if run_server(settings, config, note, _Loading(workers)):
        raise typer.Exit(1)


def _check_template(path: Path) -> None:
    """See that a chat template can be read; what is wrong with it as a template, requests will say."""
    try:
        with path.open("rb") as file:
            file.read(MAX_TEMPLATE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from error


class _Loading:
    """Shows on standard error how many workers are ready: one line that counts, or one line each in a file."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._shown = -1

    def __call__(self, ready: int) -> None:
        if ready == self._shown:
            return
        self._shown = ready
        line = f"loading the model: {ready} of {self._workers} workers are ready"
        if sys.stderr.isatty():
            end = "\n" if ready == self._workers else ""
            sys.stderr.write(f"\r\x1b[Kshmroute: {line}{end}")
            sys.stderr.flush()
        else:
            note(line)
