"""``shmroute eval``: what routing rules gain in hits and cost in perplexity, in the closed loop on held-out text."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from shmroute.budget import too_few_for_a_cycle
from shmroute.cli.eval_report import RULE_OPTIONS, as_dict, costs_rendered, rendered, rule_of
from shmroute.cli.output import complain, console, human_share, note
from shmroute.config import RULES, PagerConfig, RouterConfig, RuntimeConfig
from shmroute.errors import CheckpointError, ConfigError
from shmroute.extras import check_installed
from shmroute.lifecycle import report_compilation
from shmroute.pager.eviction.names import DEFAULT_POLICY, POLICIES
from shmroute.shared.words import MAX_LANES
from shmroute.sources.model_config import read_sizes
from shmroute.validation import require, require_float, require_int

if TYPE_CHECKING:
    from shmroute.evaluation.comparison import Outcome
    from shmroute.evaluation.loop import Setting

DEFAULT_RULES = ("absolute=0.15,0.5", "probability=0.03,0.06,0.1")

PLAIN_INTERVAL = 0.1
"""How much of the whole is done between two progress lines where there is no terminal."""


def eval_(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Mixtral checkpoint.", show_default=False)],
    text: Annotated[
        Path,
        typer.Argument(
            help="Held-out text: an .npz with token ids, an integer array for each text; or plain UTF-8 text, which "
            "needs the extra 'text'.",
            show_default=False,
        ),
    ],
    budgets: Annotated[
        str, typer.Option(help="What the slots may hold, with commas between: shares (25%) or sizes (1GiB).")
    ] = "25%,50%",
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            metavar="NAME=STRENGTH,…",
            help=f"A rule and its strengths, with options such as cache-prior:top_j=1=0.1,0.2; may be given several "
            f"times. Rules: {', '.join(RULES)}. By default {' and '.join(DEFAULT_RULES)}.",
            show_default=False,
        ),
    ] = None,
    layer_factors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FACTOR,…",
            help="By what each layer's strength is multiplied; may be given several times.",
            show_default=False,
        ),
    ] = None,
    policies: Annotated[
        str, typer.Option(help=f"Eviction policies, with commas between: {', '.join(POLICIES)}.")
    ] = DEFAULT_POLICY,
    streams: Annotated[int, typer.Option(help="That share a pool, as workers would.")] = 4,
    window: Annotated[
        int, typer.Option(help="Tokens of each stream; the first is given, the others are predicted.")
    ] = 192,
    pools: Annotated[
        int | None,
        typer.Option(help="At most so many, spread evenly over the text; all by default.", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Settings that run at once; one for each core by default.", show_default=False)
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Real processes, one for each stream, that run the model itself on a runtime with its pager; tells "
            "stalls, bytes and memory too, for every family (needs the extra 'transformers').",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also draw hit rate and perplexity (needs the extra 'plots').", show_default=False
        ),
    ] = None,
) -> None:
    """Decode held-out text with every rule, strength and budget: hit rate, and perplexity against the unbiased choice.

    The loop is closed: choices depend on what is resident, and what is resident on the choices. The experts are chosen
    by the runtime's own routing kernel and kept by the pager's own eviction; every miss is loaded at once. The text is
    cut into windows; STREAMS of them share a pool, at one pace, spread over the layers, and it begins empty. Changes of
    perplexity are on the same tokens; their 95 % intervals are by bootstrap over pools.

    HITS: share of the choices that were resident. MISSES: as a share of those without a bonus. CHANGED: choices that
    the logits alone would not have made. LOADS: for each token, in all layers.

    With --live nothing is simulated: STREAMS workers and a pager decode the text, each at its own pace, and a second
    table tells tokens per second, how long a worker stood still for each of its tokens, what was read, and memory: PSS
    counts a page that n processes map as 1/n for each, so it adds up; RSS does not.

    Example: shmroute eval examples/tiny-mixtral examples/tiny-mixtral/heldout_tokens.npz --budgets 50% --pools 16
    """
    # Here, since only this command compiles the kernels of the evaluation.
    from shmroute.evaluation.comparison import compare  # noqa: PLC0415
    from shmroute.evaluation.decoder import DecoderConfig  # noqa: PLC0415
    from shmroute.evaluation.text import deal, read_texts  # noqa: PLC0415
    from shmroute.evaluation.worker import Task  # noqa: PLC0415
    from shmroute.shared.kernel import load_kernels  # noqa: PLC0415

    require_int("--streams", streams, 1, MAX_LANES)
    require_int("--window", window, 2, 1 << 20)
    for option, value, most in (("--pools", pools, 1 << 30), ("--jobs", jobs, 1024)):
        if value is not None:
            require_int(option, value, 1, most)
    routers = [router for rule in rules or DEFAULT_RULES for router in chosen_routers(rule)]
    if plot is not None:
        _check_plottable(plot)
    if live:
        require(jobs is None, "--jobs is of the simulation: with --live, one setting runs at a time")
        require(not layer_factors, "--layer-factors is of the simulation; it cannot be given with --live")
        check_installed("transformers", "--live")
        vocabulary, positions = _sizes(checkpoint)
    else:
        model = DecoderConfig.read(checkpoint / "config.json")
        vocabulary, positions = model.vocab_size, model.max_positions
    require(window <= positions, f"--window {window} is more than the {positions} positions that the model has")
    settings = chosen_settings(checkpoint, budgets, policies, routers, layer_factors or [], streams)
    windows = deal(read_texts(text, checkpoint, vocabulary), text, window, streams, pools)
    for config in {one.config.slots: one.config for one in settings}.values():
        if (warning := too_few_for_a_cycle(config.slots, config.num_layers, config.top_k)) is not None:
            complain(f"WARNING: {warning}")
    load_kernels(report_compilation)  # here, so that the workers find them
    task = Task(str(checkpoint), str(text), window, streams, pools)
    with _ended_by_sigterm(), _progress() as watch:
        outcomes = compare(task, settings, None if live else jobs or os.cpu_count() or 1, watch)
    tokens = int(windows.shape[0] * streams * (window - 1))
    failed = plot is not None and not _drawn(outcomes, tokens, plot)
    if as_json:
        typer.echo(json.dumps(as_dict(outcomes, task, tokens)))
    else:
        out = console()
        out.print(f"{tokens:,} tokens in {windows.shape[0]} pools of {streams} streams", soft_wrap=True)
        for table in rendered(outcomes):
            out.print("", table)
        if live:
            out.print("", costs_rendered(outcomes))
    if failed:
        raise typer.Exit(1)


# ------------------------------------------------------------------ what is asked for


def chosen_routers(rule: str) -> list[RouterConfig]:
    """What a ``--rule`` names: the routers of each strength.

    Raises
    ------
    ConfigError
        If there is no such rule, it does not take an option, or a strength is none.
    """
    described, _, strengths = rule.rpartition("=")
    name, *options = described.split(":")
    if name not in RULES:
        raise ConfigError(
            f"--rule {rule!r} is no rule; write a name and strengths, such as {DEFAULT_RULES[0]}; "
            f"names are {', '.join(RULES)}"
        )
    more: dict[str, Any] = {}
    for option in options:
        key, _, number = option.partition("=")
        if key not in RULE_OPTIONS or not re.fullmatch(r"[0-9]{1,6}", number):
            raise ConfigError(
                f"--rule {rule!r}: {option!r} is no option; write {' or '.join(f'{one}=N' for one in RULE_OPTIONS)}"
            )
        more[key] = int(number)
    found = []
    for text in strengths.split(","):
        try:
            strength = float(text)
        except ValueError:
            raise ConfigError(f"--rule {rule!r}: the strength {text!r} is no number") from None
        found.append(RouterConfig(cache_bonus=strength, metrics=False, rule=name, **more))
    return found


def chosen_settings(
    checkpoint: Path, budgets: str, policies: str, routers: list[RouterConfig], factors: list[str], streams: int
) -> list[Setting]:
    """For each budget and policy no bonus, then every rule and strength, with all factors.

    Raises
    ------
    ConfigError
        If there is no such policy, a budget holds too few experts, or factors are none, or not one for each layer.
    CheckpointError
        If the checkpoint cannot be served.
    """
    named = list(dict.fromkeys(policy.strip() for policy in policies.split(",")))
    for policy in named:
        require(policy in POLICIES, f"--policies: there is no policy {policy!r}; give {', '.join(POLICIES)}")
    plain = RouterConfig(cache_bonus=0.0, memory_aware=False, metrics=False)
    configs = [
        RuntimeConfig.from_checkpoint(
            checkpoint, budget.strip(), router=router, pager=PagerConfig(eviction=policy), max_workers=streams
        )
        for budget in dict.fromkeys(budgets.split(","))
        for policy in named
        for router in (plain, *routers)
    ]
    for config in configs:
        require(
            config.slots >= config.top_k,
            f"--budgets: {config.slots} slots cannot hold the {config.top_k} experts that a token chooses",
        )
    from shmroute.evaluation.loop import Setting  # noqa: PLC0415 - compiles kernels

    even = (1.0,) * configs[0].num_layers
    given = [_factors(text, len(even)) for text in factors] or [even]
    return [Setting(config, each) for config in configs for each in (given if config.router.memory_aware else [even])]


def _factors(text: str, layers: int) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layer-factors {text!r}: numbers with commas between are expected") from None
    require(
        len(factors) == layers, f"--layer-factors {text!r} has {len(factors)} numbers; the model has {layers} layers"
    )
    for factor in factors:
        require_float("--layer-factors", factor, 0, 1000)
    return factors


def _sizes(checkpoint: Path) -> tuple[int, int]:
    """The vocabulary and the positions of any model."""
    path = str(checkpoint / "config.json")
    vocabulary, positions = read_sizes(path)
    if vocabulary is None or positions is None:
        raise CheckpointError(path, "the keys 'vocab_size' and 'max_position_embeddings' are needed")
    return vocabulary, positions


# ------------------------------------------------------------------ while it runs


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM do as Ctrl-C does: leave the `finally` blocks, which end the workers."""
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def _progress() -> Iterator[Callable[[float, int], None]]:
    """What to call with how many runs are done, and of how many: a bar on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task("decoding")

            def watch(done: float, count: int) -> None:
                bars.update(bar, completed=done, total=count, description=f"decoding, {int(done)} of {count} settings")

            yield watch
        return
    reported = 0.0

    def write(done: float, count: int) -> None:
        nonlocal reported
        if done / count >= reported + PLAIN_INTERVAL or reported < 1 == done / count:
            reported = done / count
            note(f"decoding: {int(done)} of {count} settings done, {reported:.0%} of the work")

    yield write


# ------------------------------------------------------------------ drawing


def _check_plottable(path: Path) -> None:
    check_installed("plots", "--plot")
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib.backend_bases import FigureCanvasBase  # noqa: PLC0415

    kinds = FigureCanvasBase.get_supported_filetypes()
    require(
        path.suffix.lstrip(".").lower() in kinds,
        f"--plot {str(path)!r}: the name must end in one of {', '.join(kinds)}",
    )
    require(path.absolute().parent.is_dir(), f"--plot {str(path)!r}: there is no folder {path.absolute().parent}")


def _drawn(outcomes: list[Outcome], tokens: int, path: Path) -> bool:
    """Draw; whether that went well. What cannot be written is no reason not to print the results."""
    from shmroute.evaluation.plots import draw  # noqa: PLC0415

    lines: dict[str, list[Outcome]] = {}
    several = len({one.setting.config.pager.eviction for one in outcomes}) > 1
    for one in outcomes:
        config = one.setting.config
        if config.router.memory_aware:
            share = human_share(config.slots / (config.num_layers * config.num_experts))
            policy = f", {config.pager.eviction}" * several
            lines.setdefault(f"{rule_of(one.setting)}, {share} in slots{policy}", []).append(one)
    try:
        draw(lines, f"{tokens:,} tokens, change against the unbiased choice", path)
    except OSError as error:
        complain(f"the plot was not written: {error}")
        return False
    return True
