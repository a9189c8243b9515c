"""Validated settings of a runtime, and their form in the segment's header (JSON)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shmroute.budget import slot_bytes_of, slots_of_budget
from shmroute.errors import CheckpointError, ConfigError
from shmroute.pager.eviction.names import DEFAULT_POLICY, POLICIES
from shmroute.pager.prefetch.names import DEFAULT_PREDICTORS, PREDICTORS
from shmroute.shared.words import MAX_EXPERTS, MAX_LANES, MAX_LAYERS, MAX_SLOTS
from shmroute.sources import ExpertGeometry, ExpertSource, SourceSpec, TensorLayout, open_source
from shmroute.validation import require, require_float, require_int

BUDGET_MEASURES = ("lost-mass", "changed")
"""What a quality budget may be measured by."""
SCORINGS = ("softmax", "sigmoid")
"""How a model makes probabilities of an expert's logit, in the order of the kernels' codes."""
RULES = ("absolute", "cache-prior", "max-rank", "cumulative-threshold", "probability")
"""How residency is let into the choice, likewise; `shmroute.routing.rules` says what each does."""
GROUP_SCORES = ("max", "top2-sum")
"""What a group of experts is chosen by, likewise."""
_GUARDED_RULES = ("cache-prior", "max-rank", "cumulative-threshold")

NO_SOURCE = "this runtime was made without a checkpoint: it routes, but there are no weights to load"


@dataclass(frozen=True)
class AffinityConfig:
    """How affinity grows with use and decays without.

    Attributes
    ----------
    decay : float
        Factor per routed token of the layer, in (0, 1].
    activation_boost : float
        Added at each activation, in [0, 1].
    max_score : float
        Scores are clamped to it, in (0, 1].
    """

    decay: float = 0.99
    activation_boost: float = 1.0
    max_score: float = 1.0

    def __post_init__(self) -> None:
        require_float("decay", self.decay, 0, 1, above=True)
        require_float("activation_boost", self.activation_boost, 0, 1)
        require_float("max_score", self.max_score, 0, 1, above=True)


@dataclass(frozen=True)
class RouterConfig:
    """How experts are chosen.

    Attributes
    ----------
    cache_bonus : float
        The strength of the rule. For ``absolute``: added to a resident expert's choosing score (its gate logit, or
        its sigmoid plus the correction bias), never to its weight. The initial value: it can be changed for each layer
        while the runtime lives. 0 is the model's own routing, whatever the rule.
    bonus_on : {"logits"}
        What the bonus of the rule ``absolute`` is added to, in a model that chooses by logits.
    memory_aware : bool
        Without it the bonus is never applied; hits, misses and requests are as ever.
    renormalize : bool
        Scale the chosen experts' weights to sum to 1. A checkpoint's own scoring replaces this, and what is below from
        `scoring` on.
    metrics : bool
        Time every routing call. Hits, misses and requests are counted in any case.
    quality_budget : float or None
        What the bonus may cost, in (0, 0.5]: each layer's bonus is steered so that the mean cost of a token in that
        layer is just this, from `cache_bonus` on. A token counts where some but not all experts of the layer are
        resident. None leaves every bonus as it is set.
    budget_measure : {"lost-mass", "changed"}
        What the cost of a token is: the probability mass of its choices that the bonus lost, or the share of them that
        it changed.
    rule : str
        How residency is let into the choice: one of `RULES`.
    top_j : int
        So many of a token's best experts are chosen (``cache-prior``: raised as resident ones are) in any case; at
        most top_k. Only for the rules from the paper: ``cache-prior``, ``max-rank``, ``cumulative-threshold``.
    max_rank : int
        For ``max-rank``: residents among so many of the best are preferred at strength 1; from top_k to num_experts.
    spared_layers : int
        So many of the first layers begin with a bonus of 0, and no quality budget steers theirs: in the first layers a
        changed choice may cost far more than in the others.
    host_share : float
        In a worker with a cache in its GPU: what share of the strength counts for an expert that is in host memory
        only, 0 to 1; for one in the GPU all of it does. Other workers have no use for it.
    scoring : {"softmax", "sigmoid"}
        How a model makes probabilities of logits. With ``sigmoid`` an expert is chosen by its probability plus its
        correction bias (see `MemoryAwareRouter.correction_bias`) and weighted by its probability.
    n_group, topk_group : int
        Experts are in `n_group` groups of equal size, one after the other, and a token's come from its best
        `topk_group` of them.
    group_score : {"max", "top2-sum"}
        What a group's score is: the largest choosing score in it, or the sum of the two largest.
    routed_scaling_factor : float
        By which all weights are multiplied at the end.
    """

    cache_bonus: float = 0.15
    bonus_on: str = "logits"
    memory_aware: bool = True
    renormalize: bool = True
    metrics: bool = True
    quality_budget: float | None = None
    budget_measure: str = "lost-mass"
    rule: str = "absolute"
    top_j: int = 0
    max_rank: int = 0
    spared_layers: int = 0
    host_share: float = 0.5
    scoring: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        require_float("cache_bonus", self.cache_bonus, 0, 1e6)
        for name, allowed in (("rule", RULES), ("scoring", SCORINGS), ("group_score", GROUP_SCORES)):
            value = getattr(self, name)
            require(
                isinstance(value, str) and value in allowed,
                f"{name} must be one of {', '.join(allowed)}, not {value!r}",
            )
        require_int("top_j", self.top_j, 0, MAX_EXPERTS)
        require(
            self.top_j == 0 or self.rule in _GUARDED_RULES,
            f"top_j is {self.top_j}, but the rule {self.rule!r} keeps none of the best experts in any case; "
            f"leave it at 0, or choose one of {', '.join(_GUARDED_RULES)}",
        )
        require_int("max_rank", self.max_rank, 0, MAX_EXPERTS)
        require(
            (self.max_rank > 0) == (self.rule == "max-rank"),
            f"max_rank is {self.max_rank} and the rule {self.rule!r}: the rule 'max-rank' needs one, of at least "
            f"top_k, and no other rule has any use for it",
        )
        require_int("spared_layers", self.spared_layers, 0, MAX_LAYERS)
        require_float("host_share", self.host_share, 0, 1)
        require_int("n_group", self.n_group, 1, MAX_EXPERTS)
        require_int("topk_group", self.topk_group, 1, MAX_EXPERTS)
        require(
            self.topk_group <= self.n_group,
            f"topk_group must be an integer from 1 to n_group = {self.n_group}, not {self.topk_group}",
        )
        require_float("routed_scaling_factor", self.routed_scaling_factor, 0, 1e6, above=True)
        require(self.bonus_on == "logits", f"bonus_on must be 'logits', not {self.bonus_on!r}")
        for name in ("memory_aware", "renormalize", "metrics"):
            require(isinstance(getattr(self, name), bool), f"{name} must be True or False")
        require(
            isinstance(self.budget_measure, str) and self.budget_measure in BUDGET_MEASURES,
            f"budget_measure must be one of {', '.join(BUDGET_MEASURES)}, not {self.budget_measure!r}",
        )
        if self.quality_budget is not None:
            require_float("quality_budget", self.quality_budget, 0, 0.5, above=True)
            require(self.memory_aware, "a quality_budget is spent by the cache bonus: it needs memory_aware=True")

    def initial_bonus(self, layer: int) -> float:
        """The bonus with which a layer begins."""
        return 0.0 if layer < self.spared_layers else self.cache_bonus

    @property
    def is_plain(self) -> bool:
        """Whether the kernel's shortest way will do: softmax over all experts, and the absolute rule."""
        return (
            (self.rule, self.scoring) == ("absolute", "softmax")
            and self.topk_group == self.n_group
            and self.routed_scaling_factor == 1
        )

    def check_fits(self, num_experts: int, top_k: int) -> None:
        """Raise `ConfigError` if a layer of these sizes cannot be routed so."""
        require(
            self.top_j <= top_k,
            f"top_j is {self.top_j}, but only top_k = {top_k} experts are chosen for a token",
        )
        require(
            self.rule != "max-rank" or top_k <= self.max_rank <= num_experts,
            f"max_rank must be an integer from top_k = {top_k} to num_experts = {num_experts}, not {self.max_rank}",
        )
        require(
            num_experts % self.n_group == 0,
            f"n_group is {self.n_group}, which does not divide num_experts = {num_experts} into equal groups",
        )
        size = num_experts // self.n_group
        require(
            self.topk_group * size >= top_k,
            f"top_k is {top_k}, but topk_group = {self.topk_group} groups of {size} experts hold only "
            f"{self.topk_group * size}",
        )
        require(
            self.topk_group == self.n_group or self.group_score != "top2-sum" or size >= 2,
            f"group_score is 'top2-sum', but n_group = {self.n_group} leaves one expert in a group",
        )


@dataclass(frozen=True)
class PagerConfig:
    """How the pager works.

    Attributes
    ----------
    io_threads : int
        Loads under way at once.
    drop_page_cache : bool
        After a load, drop the file's pages from the page cache, so that memory is paid once.
    tick : float
        Seconds an idle pager sleeps at most; each tick sweeps the tables and looks for the dead.
    prefetch : int
        Prefetches of the pager's own idea that may be queued or loading at once; 0 turns them off.
    predictors : tuple of str
        Whose idea they may be: ``affinity`` (what was used much of late), ``previous-token`` (what the last tokens
        used), ``transitions`` (what follows the experts just chosen in the layer before, as learnt), and ``gate``:
        what workers speculate (`Runtime.speculate`). Users' hints are taken in any case.
    prefetch_stale : float
        Seconds after which a prefetch that has not started is cancelled.
    retry_after : float
        Seconds before an expert that failed to load is tried again on demand; doubles up to 30 s.
    eviction : str
        Which resident expert goes first when a slot is needed: one of ``lru``, ``lfu``, ``lfru``,
        ``decayed-frequency``, ``least-stale``, ``affinity`` and ``expected-next-use``.
    """

    io_threads: int = 2
    drop_page_cache: bool = True
    tick: float = 0.25
    prefetch: int = 2
    predictors: tuple[str, ...] = DEFAULT_PREDICTORS
    prefetch_stale: float = 1.0
    retry_after: float = 0.1
    eviction: str = DEFAULT_POLICY

    def __post_init__(self) -> None:
        require_int("io_threads", self.io_threads, 1, 64)
        require_float("tick", self.tick, 0.01, 10)
        require_int("prefetch", self.prefetch, 0, 1024)
        require(
            isinstance(self.predictors, tuple)
            and all(isinstance(name, str) and name in PREDICTORS for name in self.predictors)
            and len(set(self.predictors)) == len(self.predictors),
            f"predictors must be a tuple of some of {', '.join(PREDICTORS)}, each once, not {self.predictors!r}",
        )
        require_float("prefetch_stale", self.prefetch_stale, 0, 3600, above=True)
        require_float("retry_after", self.retry_after, 0.001, 30)
        require(isinstance(self.drop_page_cache, bool), "drop_page_cache must be True or False")
        require(
            isinstance(self.eviction, str) and self.eviction in POLICIES,
            f"eviction must be one of {', '.join(POLICIES)}, not {self.eviction!r}",
        )


@dataclass(frozen=True)
class TraceConfig:
    """Where workers record what they route; see `shmroute.recording`.

    Attributes
    ----------
    folder : str
        Made if need be; each process writes a file of its own there. A relative one is taken from where the runtime is
        created.
    logits : bool
        Also record every logit: then choices can be verified, and the files are larger by 4 bytes an expert, token and
        layer.
    """

    folder: str
    logits: bool = False

    def __post_init__(self) -> None:
        require(
            isinstance(self.folder, str | Path) and str(self.folder) not in ("", "."),
            f"trace's folder must be the path of a folder, not {self.folder!r}",
        )
        object.__setattr__(self, "folder", str(Path(self.folder).absolute()))
        require(isinstance(self.logits, bool), "trace's logits must be True or False")


@dataclass(frozen=True)
class RuntimeConfig:
    """Everything that the processes of one runtime agree on; it is fixed when the segment is created.

    Attributes
    ----------
    num_layers, num_experts, top_k : int
        MoE layers, experts in each, experts chosen per token.
    expert_bytes : int
        Bytes of one expert.
    slots : int
        Experts that memory holds at once, over all layers; at most all of them.
    max_workers : int
        Worker processes at once, at most 32.
    layer_numbers : tuple of int
        The model's own number of each MoE layer; 0, 1, … by default.
    hidden_size : int
        Columns of a gate; 0 when there is no source.
    tensors : tuple of TensorLayout
        What an expert's bytes are; empty when only the bytes are served.
    source : SourceSpec or None
        Where the experts come from; None for routing alone.
    source_fingerprint : str
        Differs whenever the source's content does.
    trace : TraceConfig, str, Path or None
        Where workers record what they route, a folder; None for nowhere.
    """

    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int
    slots: int
    router: RouterConfig = field(default_factory=RouterConfig)
    affinity: AffinityConfig = field(default_factory=AffinityConfig)
    pager: PagerConfig = field(default_factory=PagerConfig)
    max_workers: int = 32
    layer_numbers: tuple[int, ...] = ()
    hidden_size: int = 0
    tensors: tuple[TensorLayout, ...] = ()
    source: SourceSpec | None = None
    source_fingerprint: str = ""
    trace: TraceConfig | str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.trace, str | Path):
            object.__setattr__(self, "trace", TraceConfig(str(self.trace)))
        require(
            self.trace is None or isinstance(self.trace, TraceConfig),
            f"trace must be a folder, a TraceConfig or None, not {self.trace!r}",
        )
        for name, kind in (("router", RouterConfig), ("affinity", AffinityConfig), ("pager", PagerConfig)):
            require(isinstance(getattr(self, name), kind), f"{name} must be a {kind.__name__}")
        require(self.source is None or isinstance(self.source, SourceSpec), "source must be a SourceSpec or None")
        require(
            isinstance(self.tensors, tuple) and all(isinstance(tensor, TensorLayout) for tensor in self.tensors),
            "tensors must be a tuple of TensorLayout",
        )
        require(isinstance(self.layer_numbers, tuple), "layer_numbers must be a tuple of integers")
        require_int("num_layers", self.num_layers, 1, MAX_LAYERS)
        require_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        require(
            isinstance(self.top_k, int) and not isinstance(self.top_k, bool) and 1 <= self.top_k <= self.num_experts,
            f"top_k must be an integer from 1 to num_experts = {self.num_experts}, not {self.top_k!r}",
        )
        self.router.check_fits(self.num_experts, self.top_k)
        require(
            self.router.spared_layers <= self.num_layers,
            f"spared_layers must be an integer from 0 to num_layers = {self.num_layers}, not "
            f"{self.router.spared_layers}",
        )
        require_int("expert_bytes", self.expert_bytes, 1, 1 << 40)
        require_int("slots", self.slots, 1, min(MAX_SLOTS, self.num_layers * self.num_experts))
        require_int("max_workers", self.max_workers, 1, MAX_LANES)
        require_int("hidden_size", self.hidden_size, 0, 1 << 24)
        if not self.layer_numbers:
            object.__setattr__(self, "layer_numbers", tuple(range(self.num_layers)))
        for number in self.layer_numbers:
            require_int("a layer's number", number, 0, (1 << 31) - 1)
        require(
            len(self.layer_numbers) == self.num_layers,
            f"layer_numbers must name {self.num_layers} layers, not {len(self.layer_numbers)}",
        )
        require(
            isinstance(self.source_fingerprint, str),
            f"source_fingerprint must be a str, not {self.source_fingerprint!r}",
        )
        for tensor in self.tensors:
            require(
                tensor.offset >= 0 and tensor.offset + tensor.nbytes <= self.expert_bytes,
                f"tensor {tensor.name!r} ends beyond expert_bytes = {self.expert_bytes}",
            )

    @property
    def recording(self) -> TraceConfig | None:
        """`trace` in full, also where a path was given."""
        assert self.trace is None or isinstance(self.trace, TraceConfig), "made so when the settings were"
        return self.trace

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: an expert, rounded up to whole pages."""
        return slot_bytes_of(self.expert_bytes)

    @property
    def budget_bytes(self) -> int:
        """What the slots hold in all."""
        return self.slots * self.slot_bytes

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything in which two segments must agree to be the same runtime.

        How the source is opened is left out (the same checkpoint may be reached by two paths); its content,
        which `source_fingerprint` stands for, is not.
        """
        settings = dataclasses.asdict(dataclasses.replace(self, source=None))
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path | ExpertSource,
        budget: str | int,
        *,
        router: RouterConfig | None = None,
        affinity: AffinityConfig | None = None,
        pager: PagerConfig | None = None,
        max_workers: int = 32,
        trace: TraceConfig | str | Path | None = None,
    ) -> RuntimeConfig:
        """Take the geometry from a checkpoint and the number of slots from a budget.

        Parameters
        ----------
        checkpoint : str, Path or ExpertSource
            A Hugging Face folder, or any source.
        budget : str or int
            What the slots may hold: a share of all experts (``"50%"``), a size (``"2GiB"``) or bytes.
        router : RouterConfig, optional
            Its `renormalize`, and what it has from `scoring` on, are replaced by the checkpoint's own.
        affinity, pager, max_workers, trace
            As in `RuntimeConfig`.

        Raises
        ------
        CheckpointError
            If the checkpoint cannot be served.
        ConfigError
            If the budget is no size, or holds no expert.
        """
        geometry, spec = describe(checkpoint)
        return cls(
            num_layers=geometry.num_layers,
            num_experts=geometry.num_experts,
            top_k=geometry.top_k,
            expert_bytes=geometry.expert_bytes,
            slots=slots_of_budget(budget, geometry.num_layers * geometry.num_experts, geometry.expert_bytes),
            router=dataclasses.replace(router or RouterConfig(), **dataclasses.asdict(geometry.scoring)),
            affinity=affinity or AffinityConfig(),
            pager=pager or PagerConfig(),
            max_workers=max_workers,
            layer_numbers=geometry.layer_numbers,
            hidden_size=geometry.hidden_size,
            tensors=geometry.tensors,
            source=spec,
            source_fingerprint=geometry.fingerprint,
            trace=trace,
        )

    def pager_command(self, name: str) -> str:
        """The shell command that serves a segment of these settings, or adopts one."""
        path = "CHECKPOINT" if self.source is None else self.source.arguments.get("path", "CHECKPOINT")
        words = ["shmroute", "pager", str(path), "--name", name, "--budget", str(self.budget_bytes)]
        words += ["--bonus", str(self.router.cache_bonus), "--max-workers", str(self.max_workers)]
        if self.router.quality_budget is not None:
            words += ["--quality-budget", str(self.router.quality_budget)]
            words += ["--budget-measure", self.router.budget_measure]
        words += [] if self.router.rule == RouterConfig.rule else ["--rule", self.router.rule]
        words += ["--top-j", str(self.router.top_j)] if self.router.top_j else []
        words += ["--max-rank", str(self.router.max_rank)] if self.router.max_rank else []
        words += ["--spared-layers", str(self.router.spared_layers)] if self.router.spared_layers else []
        if self.router.host_share != RouterConfig.host_share:
            words += ["--host-share", str(self.router.host_share)]
        words += ["--io-threads", str(self.pager.io_threads)]
        words += [] if self.pager.drop_page_cache else ["--keep-page-cache"]
        words += [] if self.pager.eviction == DEFAULT_POLICY else ["--eviction", self.pager.eviction]
        if self.recording is not None:
            words += ["--trace", self.recording.folder, *(["--trace-logits"] if self.recording.logits else [])]
        return shlex.join(words)

    def to_json(self) -> str:
        """The settings as JSON, from which `from_json` makes an equal object."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RuntimeConfig:
        """Read what `to_json` wrote.

        Raises
        ------
        ConfigError
            If it is anything else.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            source, trace, pager = data.pop("source"), data.pop("trace"), data.pop("pager")
            return cls(
                router=RouterConfig(**data.pop("router")),
                affinity=AffinityConfig(**data.pop("affinity")),
                pager=PagerConfig(**(pager | {"predictors": tuple(pager["predictors"])})),
                layer_numbers=tuple(data.pop("layer_numbers")),
                tensors=tuple(
                    TensorLayout(**(tensor | {"shape": tuple(tensor["shape"])})) for tensor in data.pop("tensors")
                ),
                source=None if source is None else SourceSpec(**source),
                trace=None if trace is None else TraceConfig(**trace),
                **data,
            )
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"not a runtime's settings: {error!r}") from error


def describe(checkpoint: str | Path | ExpertSource) -> tuple[ExpertGeometry, SourceSpec]:
    """What a checkpoint's experts are, and how another process opens it; a source that is given stays open."""
    source = open_source(checkpoint)
    try:
        return source.geometry, source.spec
    finally:
        if source is not checkpoint:
            source.close()


def open_configured_source(config: RuntimeConfig) -> ExpertSource:
    """Open the source that a runtime was made for, in this process.

    Raises
    ------
    ConfigError
        If it was made without one.
    CheckpointError
        If the source cannot be opened, or its content is not what it was then.
    """
    if config.source is None:
        raise ConfigError(NO_SOURCE)
    source = config.source.open()
    if source.geometry.fingerprint != config.source_fingerprint:
        source.close()
        raise CheckpointError(
            str(config.source.arguments.get("path", config.source.factory)),
            "its files are not those that the runtime was made for; create a runtime for them",
        )
    return source
