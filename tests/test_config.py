"""Settings: what is allowed, what is said of the rest, and how they are kept in a segment's header."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmroute.budget import parse_bytes, slots_of_budget
from shmroute.config import AffinityConfig, PagerConfig, RouterConfig, RuntimeConfig, open_configured_source
from shmroute.errors import ConfigError
from shmroute.sources import SourceSpec, TensorLayout

PLAIN: dict[str, Any] = {"num_layers": 4, "num_experts": 8, "top_k": 2, "expert_bytes": 10_000, "slots": 5}
FULL = RuntimeConfig(
    **PLAIN,
    router=RouterConfig(cache_bonus=0.1, memory_aware=False, renormalize=False, metrics=False),
    affinity=AffinityConfig(decay=0.5, activation_boost=0.25, max_score=0.75),
    pager=PagerConfig(
        io_threads=3,
        drop_page_cache=False,
        tick=0.5,
        prefetch=0,
        prefetch_stale=2,
        retry_after=0.5,
        eviction="lru",
        predictors=("gate", "affinity"),
    ),
    max_workers=7,
    layer_numbers=(1, 3, 5, 7),
    hidden_size=128,
    tensors=(TensorLayout("gate", 0, (10, 100), "float32"), TensorLayout("up", 4000, (30, 100), "float16")),
    source=SourceSpec("package.module:factory", {"path": "/somewhere ü", "seed": 3}),
    source_fingerprint="abc",
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "field", "allowed", "values"),
    [
        (RuntimeConfig, "num_layers", "from 1 to 1024", [0, -1, 1025]),
        (RuntimeConfig, "num_experts", "from 1 to 4096", [0, -1, 4097]),
        (RuntimeConfig, "top_k", "from 1 to num_experts = 8", [0, -1, 9]),
        (RuntimeConfig, "expert_bytes", "from 1 to 1099511627776", [0, -1, (1 << 40) + 1]),
        (RuntimeConfig, "slots", "from 1 to 32", [0, -1, 33]),
        (RuntimeConfig, "max_workers", "from 1 to 32", [0, -1, 33]),
        (RuntimeConfig, "hidden_size", "from 0 to 16777216", [-1, (1 << 24) + 1]),
        (AffinityConfig, "decay", r"in \(0, 1\]", [0, 0.0, -0.5, 1.0001, 2, 10**400]),
        (AffinityConfig, "activation_boost", r"in \[0, 1\]", [-0.1, 1.5]),
        (AffinityConfig, "max_score", r"in \(0, 1\]", [0, -1, 1.1]),
        (RouterConfig, "cache_bonus", r"in \[0, 1e\+06\]", [-0.001, 1e7, 10**400]),
        (PagerConfig, "io_threads", "from 1 to 64", [0, 65]),
        (PagerConfig, "tick", r"in \[0.01, 10\]", [0, -1, 11]),
        (PagerConfig, "prefetch", "from 0 to 1024", [-1, 1025]),
        (PagerConfig, "prefetch_stale", r"in \(0, 3600\]", [0, -1, 3601]),
        (PagerConfig, "retry_after", r"in \[0.001, 30\]", [0, 31]),
    ],
)
def test_a_number_outside_its_range_or_no_number_is_refused(
    kind: type, field: str, allowed: str, values: list[object]
) -> None:
    others = PLAIN if kind is RuntimeConfig else {}
    for value in [*values, NAN, INF, -INF, True, False, "1", None, [1], 1 + 0j]:
        with pytest.raises(ConfigError, match=rf"{field} must be .*{allowed}, not ") as refused:
            kind(**(others | {field: value}))
        assert isinstance(refused.value, ValueError)
        assert refused.value.args[0].endswith(repr(value))


@pytest.mark.parametrize("field", ["num_layers", "num_experts", "top_k", "slots", "max_workers", "expert_bytes"])
def test_a_fraction_is_no_count(field: str) -> None:
    for value in (1.0, 2.5, np.float32(1)):
        with pytest.raises(ConfigError, match=f"{field} must be an integer"):
            RuntimeConfig(**(PLAIN | {field: value}))


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (RouterConfig, "memory_aware"),
        (RouterConfig, "renormalize"),
        (RouterConfig, "metrics"),
        (PagerConfig, "drop_page_cache"),
    ],
)
@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_a_switch_is_true_or_false(kind: type, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be True or False"):
        kind(**{field: value})


@pytest.mark.parametrize("value", ["fifo", "LRU", "", 0, None, True, ["lru"]])
def test_an_eviction_policy_is_one_that_there_is(value: object) -> None:
    with pytest.raises(ConfigError, match=r"eviction must be one of lru, lfu, .*expected-next-use, not "):
        PagerConfig(eviction=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [["gate"], ("gate", "gate"), ("oracle",), ("hint",), "gate", None, (1,)])
def test_predictors_are_some_that_there_are_each_once(value: object) -> None:
    with pytest.raises(ConfigError, match=r"predictors must be a tuple of some of affinity, .*gate, each once, not "):
        PagerConfig(predictors=value)  # type: ignore[arg-type]


def test_there_may_be_no_predictors() -> None:
    assert PagerConfig(predictors=()).predictors == ()


def test_the_command_of_a_pager_names_a_quality_budget() -> None:
    assert "--quality-budget" not in RuntimeConfig(**PLAIN).pager_command("n")
    budget = RouterConfig(quality_budget=0.02, budget_measure="changed")
    command = RuntimeConfig(**PLAIN, router=budget).pager_command("n")
    assert "--quality-budget 0.02 --budget-measure changed" in command


def test_the_command_of_a_pager_names_its_policy_unless_it_is_the_default() -> None:
    assert "--eviction" not in RuntimeConfig(**PLAIN).pager_command("n")
    assert "--eviction lfu" in RuntimeConfig(**PLAIN, pager=PagerConfig(eviction="lfu")).pager_command("n")


def test_the_command_of_a_pager_names_its_rule_unless_it_is_the_default() -> None:
    assert "--rule" not in RuntimeConfig(**PLAIN).pager_command("n")
    for router, words in (
        (RouterConfig(rule="max-rank", max_rank=4, top_j=1), "--rule max-rank --top-j 1 --max-rank 4"),
        (RouterConfig(spared_layers=1), "--spared-layers 1"),
        (RouterConfig(host_share=0.25), "--host-share 0.25"),
        (RouterConfig(rule="probability"), "--rule probability --io-threads"),
    ):
        config = RuntimeConfig(**PLAIN, router=router)
        assert words in config.pager_command("n").replace(f"--max-workers {config.max_workers} ", "")


def test_the_bonus_is_on_the_logits() -> None:
    with pytest.raises(ConfigError, match="bonus_on must be 'logits', not 'weights'"):
        RouterConfig(bonus_on="weights")


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ((1, 2), "layer_numbers must name 4 layers, not 2"),
        (("a", "b", "c", "d"), "a layer's number must be an integer"),
        ((0, 1, 2, None), "a layer's number must be an integer"),
        ((0, 1, 2, -1), "a layer's number must be an integer"),
    ],
)
def test_layers_are_numbered_by_integers(numbers: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        RuntimeConfig(**PLAIN, layer_numbers=numbers)


def test_layers_are_numbered_from_zero_by_default() -> None:
    assert RuntimeConfig(**PLAIN).layer_numbers == (0, 1, 2, 3)


@pytest.mark.parametrize("offset", [-4, 10_000 - 3])
def test_a_tensor_lies_inside_its_expert(offset: int) -> None:
    with pytest.raises(ConfigError, match="tensor 'up' ends beyond expert_bytes = 10000"):
        RuntimeConfig(**PLAIN, tensors=(TensorLayout("up", offset, (1,), "float32"),))


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.slots = 3  # type: ignore[misc]


@pytest.mark.parametrize(("expert_bytes", "slot_bytes"), [(1, 4096), (4096, 4096), (4097, 8192), (196_608, 196_608)])
def test_a_slot_is_an_expert_in_whole_pages(expert_bytes: int, slot_bytes: int) -> None:
    config = RuntimeConfig(**(PLAIN | {"expert_bytes": expert_bytes}))
    assert config.slot_bytes == slot_bytes
    assert config.budget_bytes == 5 * slot_bytes


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("5B", 5), ("1kB", 1000), ("1KB", 1000), ("1KiB", 1024), ("5MiB", 5 << 20),
        ("2 GB", 2 * 10**9), (" 1.5 GiB ", 3 << 29), ("1tb", 10**12), ("1TiB", 1 << 40), ("0.1kB", 100),
        ("4.5MiB", 24 * 196_608), ("9007199254740993", 2**53 + 1),
    ],
)  # fmt: skip
def test_sizes_are_read_exactly(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "+1", "1e9", "1 2", "1.GiB", ".5GiB", "5 XB", "5MiBs", "NaN", "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size: write bytes, or a number with kB"):
        parse_bytes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except ConfigError as error:
        assert "is no size" in str(error)


@pytest.mark.parametrize(
    ("budget", "slots"),
    [
        ("100%", 24), ("50%", 12), ("4.2%", 1), (" 25 % ", 6), ("4.5MiB", 24), (24 * 196_608, 24),
        (24 * 196_608 - 1, 23), ("4.49MiB", 23), (196_608, 1), ("1TiB", 24), (1 << 60, 24),
    ],
)  # fmt: skip
def test_a_budget_pays_for_whole_slots_and_no_more_than_there_are_experts(budget: str | int, slots: int) -> None:
    assert slots_of_budget(budget, 24, 196_608) == slots


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_share_of_a_hundred_experts_is_exact(percent: int) -> None:
    assert slots_of_budget(f"{percent}%", 100, 4096) == percent


@pytest.mark.parametrize("budget", [196_607, 0, -1, "0", "191KiB", "1%", "4%"])
def test_a_budget_under_one_slot_is_refused_with_the_numbers(budget: str | int) -> None:
    with pytest.raises(ConfigError, match="holds no expert: one slot takes 196608 bytes; the 24 experts take 4718592"):
        slots_of_budget(budget, 24, 196_608)


@pytest.mark.parametrize("budget", ["0%", "101%", "1000%"])
def test_a_share_is_above_nothing_and_at_most_all(budget: str) -> None:
    with pytest.raises(ConfigError, match="share must be above 0% and at most 100%"):
        slots_of_budget(budget, 24, 4096)


@pytest.mark.parametrize("budget", ["%", "x%", "-5%", "nan%", "inf%", "1e1%", "50%%"])
def test_what_is_no_share_is_refused(budget: str) -> None:
    with pytest.raises(ConfigError, match="is no share: write a number and %"):
        slots_of_budget(budget, 24, 4096)


@pytest.mark.parametrize("budget", [1.5, NAN, True, None, [4096]])
def test_a_budget_of_another_kind_is_refused(budget: Any) -> None:
    with pytest.raises(ConfigError, match=r"a budget is bytes \(int\), a size \('2GiB'\) or a share"):
        slots_of_budget(budget, 24, 4096)


# ------------------------------------------------------------------ JSON


@pytest.mark.parametrize("config", [RuntimeConfig(**PLAIN), FULL])
def test_settings_survive_json(config: RuntimeConfig) -> None:
    again = RuntimeConfig.from_json(config.to_json())
    assert again == config
    assert again.fingerprint == config.fingerprint
    assert again.to_json() == config.to_json()


@given(
    decay=st.floats(0, 1, exclude_min=True),
    boost=st.floats(0, 1),
    bonus=st.floats(0, 1e6),
    numbers=st.lists(st.integers(0, 1000), min_size=4, max_size=4),
)
def test_numbers_survive_json_to_the_last_bit(decay: float, boost: float, bonus: float, numbers: list[int]) -> None:
    config = RuntimeConfig(
        **PLAIN,
        affinity=AffinityConfig(decay, boost),
        router=RouterConfig(bonus),
        layer_numbers=tuple(numbers),
    )
    assert RuntimeConfig.from_json(config.to_json()) == config


def read_or_config_error(text: str) -> None:
    """Reading gives settings that survive JSON, or a ConfigError; any other exception fails the test."""
    try:
        config = RuntimeConfig.from_json(text)
    except ConfigError:
        return
    assert RuntimeConfig.from_json(config.to_json()) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.one_of(st.text(max_size=30), JSON.map(json.dumps)))
def test_arbitrary_text_is_never_another_error(text: str) -> None:
    read_or_config_error(text)


@settings(max_examples=300)
@given(data=st.data())
def test_settings_with_anything_in_one_place_are_never_another_error(data: st.DataObject) -> None:
    fields = json.loads(FULL.to_json())
    target = fields
    while True:
        if isinstance(target, dict):
            key: Any = data.draw(st.sampled_from(sorted(target)))
        elif target:
            key = data.draw(st.integers(0, len(target) - 1))
        if not isinstance(target[key], dict | list) or not target[key] or data.draw(st.booleans()):
            break
        target = target[key]
    if isinstance(target, dict) and data.draw(st.booleans()):
        del target[key]
    else:
        target[key] = data.draw(JSON)
    read_or_config_error(json.dumps(fields))


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "1", '"text"', "{", "{}", "[" * 100_000, '{"a": 1}', "9" * 5000, "\ud800", "\0"],
    ids=lambda text: repr(text[:10]),
)
def test_what_to_json_did_not_write_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a runtime's settings"):
        RuntimeConfig.from_json(text)


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_never_another_error(junk: bytes) -> None:
    read_or_config_error(junk.decode("utf-8", "surrogateescape"))
    read_or_config_error(junk)  # type: ignore[arg-type]


def test_a_setting_that_is_not_known_is_refused() -> None:
    fields = json.loads(FULL.to_json()) | {"colour": "red"}
    with pytest.raises(ConfigError, match="colour"):
        RuntimeConfig.from_json(json.dumps(fields))


def test_a_bad_value_in_json_is_named() -> None:
    fields = json.loads(FULL.to_json()) | {"top_k": 9}
    with pytest.raises(ConfigError, match="top_k must be an integer from 1 to num_experts = 8, not 9"):
        RuntimeConfig.from_json(json.dumps(fields))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RuntimeConfig) if field.name != "source"])
def test_the_fingerprint_tells_settings_apart(field: str) -> None:
    other: dict[str, Any] = {
        "num_layers": {"num_layers": 5, "layer_numbers": ()}, "num_experts": 9, "top_k": 3, "expert_bytes": 10_001,
        "slots": 6, "router": RouterConfig(), "affinity": AffinityConfig(), "pager": PagerConfig(), "max_workers": 8,
        "layer_numbers": (0, 1, 2, 3), "hidden_size": 64, "tensors": (), "source_fingerprint": "abd",
        "trace": "/elsewhere",
    }  # fmt: skip
    change = other[field] if isinstance(other[field], dict) else {field: other[field]}
    assert dataclasses.replace(FULL, **change).fingerprint != FULL.fingerprint


def test_how_the_source_is_opened_is_not_in_the_fingerprint() -> None:
    assert dataclasses.replace(FULL, source=SourceSpec("elsewhere:factory")).fingerprint == FULL.fingerprint


def test_without_a_source_there_is_nothing_to_open() -> None:
    with pytest.raises(ConfigError, match="made without a checkpoint"):
        open_configured_source(RuntimeConfig(**PLAIN))
