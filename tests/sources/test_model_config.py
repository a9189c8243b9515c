"""config.json is read by family, and every rule that the router does not have is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoint_builder import FAMILIES, HIDDEN, TOP_K
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmroute.errors import CheckpointError, UnsupportedDtypeError, UnsupportedScoringError
from shmroute.sources import ModelScoring
from shmroute.sources.model_config import MAX_CONFIG_BYTES, ModelConfig, read_model_config

SIGMOID = [name for name, family in FAMILIES.items() if family.correction_bias]


def config_of(family_name: str, **changes: Any) -> dict[str, Any]:
    family = FAMILIES[family_name]
    return {
        "model_type": family_name,
        "hidden_size": HIDDEN,
        "num_hidden_layers": family.layers,
        "num_experts_per_tok": TOP_K,
        **family.config,
        **changes,
    }


def read(tmp_path: Path, content: dict[str, Any]) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return read_model_config(str(path))


def refusal(tmp_path: Path, content: dict[str, Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, content)
    assert caught.value.path == str(tmp_path / "config.json")
    return caught.value


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_number_of_experts_has_three_names(tmp_path: Path, model_type: str, key: str) -> None:
    config = config_of(model_type)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        config.pop(name, None)
    assert read(tmp_path, {**config, key: 8}).num_experts == 8
    assert "contradict" in str(refusal(tmp_path, {**config_of(model_type, num_experts=9), "n_routed_experts": 7}))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_number_of_chosen_experts_has_two_names(tmp_path: Path, model_type: str) -> None:
    config = config_of(model_type)
    config.pop("num_experts_per_tok")
    assert read(tmp_path, {**config, "experts_per_token": 1}).top_k == 1
    assert "contradict" in str(refusal(tmp_path, config_of(model_type, experts_per_token=TOP_K + 1)))


@pytest.mark.parametrize(
    ("model_type", "given_as", "expected"),
    [(family, given_as, True) for family in ("mixtral", "minimax", "gpt_oss") for given_as in (False, None)]
    + [
        (family, given_as, bool(given_as))
        for family in ("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v2", "dots1")
        for given_as in (True, False, None)
    ]
    + [
        (family, given_as, given_as is not False)
        for family in ("qwen3_next", *SIGMOID)
        if family != "dots1"
        for given_as in (True, False, None)
    ],
)
def test_renormalisation_follows_the_family_s_default(
    tmp_path: Path, model_type: str, given_as: bool | None, expected: bool
) -> None:
    assert read(tmp_path, config_of(model_type, norm_topk_prob=given_as)).scoring.renormalize is expected


@pytest.mark.parametrize(
    ("model_type", "keys", "layers"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [3]}, (0, 1, 2, 4)),
        ("qwen3_moe", {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3, 5)),
        ("qwen3_moe", {"mlp_only_layers": None}, (0, 1, 2, 3)),
        ("deepseek_v2", {"first_k_dense_replace": None, "moe_layer_freq": None}, (0, 1, 2, 3, 4)),
        ("deepseek_v2", {"first_k_dense_replace": 2, "moe_layer_freq": 1}, (2, 3, 4)),
    ],
)
def test_dense_layers_are_skipped(
    tmp_path: Path, model_type: str, keys: dict[str, Any], layers: tuple[int, ...]
) -> None:
    assert read(tmp_path, config_of(model_type, **keys)).moe_layers == layers


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "key",
    ["model_type", "hidden_size", "num_hidden_layers", "num_experts_per_tok", "intermediate", "experts"],
)
def test_a_missing_key_is_named(tmp_path: Path, model_type: str, key: str) -> None:
    config = config_of(model_type)
    if key == "intermediate":
        key = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    if key == "experts":
        key = next(name for name in config if name.endswith("_experts"))
    del config[key]
    assert f"{key}" in str(refusal(tmp_path, config))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 1025},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 2.0},
        {"num_hidden_layers": "2"},
        {"num_local_experts": 4097},
        {"num_local_experts": -1},
        {"num_experts_per_tok": 5},
        {"num_experts_per_tok": 0},
        {"hidden_size": 2**40},
        {"intermediate_size": []},
        {"routed_scaling_factor": "1"},
        {"routed_scaling_factor": True},
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert next(iter(changes)) in str(refusal(tmp_path, config_of("mixtral", **changes)))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2_moe", {"norm_topk_prob": 1}),
        ("qwen2_moe", {"mlp_only_layers": 3}),
        ("qwen2_moe", {"mlp_only_layers": ["3"]}),
        ("qwen2_moe", {"decoder_sparse_step": 0}),
        ("deepseek_v2", {"moe_layer_freq": 0}),
        ("deepseek_v2", {"first_k_dense_replace": -1}),
    ],
)
def test_a_family_s_own_key_out_of_range_is_named(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    assert next(iter(changes)) in str(refusal(tmp_path, config_of(model_type, **changes)))


def test_a_model_without_any_moe_layer_is_refused(tmp_path: Path) -> None:
    assert "none of the model's 5 layers" in str(refusal(tmp_path, config_of("deepseek_v2", first_k_dense_replace=5)))


@pytest.mark.parametrize(
    ("model_type", "changes", "what"),
    [
        ("mixtral", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; for this family, 'softmax' can be routed"),
        ("mixtral", {"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0; this family knows only 1"),
        ("olmoe", {"topk_method": "group_limited_greedy"}, "topk_method is 'group_limited_greedy'"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "'greedy' and 'group_limited_greedy' can be routed"),
        ("deepseek_v2", {"norm_topk_prob": True, "routed_scaling_factor": 16.0}, "applies only one"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; for this family, 'sigmoid'"),
        ("glm4_moe", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ],
)
def test_another_scoring_rule_is_refused(tmp_path: Path, model_type: str, changes: dict[str, Any], what: str) -> None:
    error = refusal(tmp_path, config_of(model_type, **changes))
    assert type(error) is UnsupportedScoringError
    assert what in str(error)


@pytest.mark.parametrize(
    ("model_type", "changes", "scoring"),
    [
        ("mixtral", {}, ModelScoring(True)),
        ("olmoe", {}, ModelScoring(False)),
        ("deepseek_v2", {"routed_scaling_factor": 16}, ModelScoring(False, routed_scaling_factor=16.0)),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            ModelScoring(False, n_group=4, topk_group=2),
        ),
        ("deepseek_v2", {"topk_method": "greedy", "n_group": 8, "topk_group": 3}, ModelScoring(False)),
        (
            "deepseek_v2",
            {"topk_method": None, "n_group": None, "topk_group": None, "routed_scaling_factor": None},
            ModelScoring(False),
        ),
        ("deepseek_v3", {}, ModelScoring(True, "sigmoid", 2, 1, "top2-sum", 2.5)),
        (
            "deepseek_v3",
            {"n_routed_experts": 256, "n_group": None, "topk_group": None, "routed_scaling_factor": None,
             "scoring_func": None, "topk_method": None, "norm_topk_prob": None},
            ModelScoring(True, "sigmoid", 8, 4, "top2-sum", 2.5),
        ),
        ("glm4_moe", {"n_group": None, "topk_group": None}, ModelScoring(True, "sigmoid", 1, 1, "top2-sum", 1.0)),
        ("minimax", {}, ModelScoring(True)),
        ("qwen3_next", {}, ModelScoring(True)),
        ("qwen3_next", {"norm_topk_prob": False}, ModelScoring(False)),
        ("flex_olmo", {}, ModelScoring(False)),
        ("dots1", {}, ModelScoring(False, "sigmoid", 1, 1, "top2-sum", 2.5)),
        ("solar_open", {}, ModelScoring(True, "sigmoid", 1, 1, "top2-sum", 1.0)),
        ("gpt_oss", {}, ModelScoring(True)),
    ],
)  # fmt: skip
def test_a_family_s_scoring_is_read(
    tmp_path: Path, model_type: str, changes: dict[str, Any], scoring: ModelScoring
) -> None:
    config = read(tmp_path, config_of(model_type, **changes))
    assert config.scoring == scoring
    assert config.has_correction_bias is (model_type in SIGMOID)
    assert config.has_gate_bias is config.interleaved is (model_type == "gpt_oss")


@pytest.mark.parametrize(
    ("model_type", "changes", "what"),
    [
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": None, "topk_group": 1},
            "'n_group' is missing",
        ),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "topk_group": None}, "'topk_group' is missing"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, which does not divide 4 experts"),
        ("deepseek_v3", {"topk_group": 3}, "topk_group is 3, but there are only n_group = 2 groups"),
        ("deepseek_v3", {"num_experts_per_tok": 3}, "topk_group = 1 groups of 2 experts hold only 2"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2}, "groups of one expert have no two best"),
        ("deepseek_v3", {"routed_scaling_factor": 0}, "'routed_scaling_factor' is 0; a number above 0"),
        ("deepseek_v3", {"routed_scaling_factor": 1e9}, "'routed_scaling_factor' is 1000000000.0"),
    ],
)
def test_groups_and_factors_that_cannot_be_are_named(
    tmp_path: Path, model_type: str, changes: dict[str, Any], what: str
) -> None:
    error = refusal(tmp_path, config_of(model_type, **changes))
    assert type(error) is CheckpointError
    assert what in str(error)


@pytest.mark.parametrize(("model_type", "method"), [("mixtral", "fp8"), ("gpt_oss", "mxfp4")])
def test_a_quantised_model_is_refused(tmp_path: Path, model_type: str, method: str) -> None:
    config = config_of(model_type, quantization_config={"quant_method": method})
    assert type(refusal(tmp_path, config)) is UnsupportedDtypeError


@pytest.mark.parametrize("model_type", ["llama", 7, ["mixtral"], {}, "Mixtral"])
def test_an_unknown_family_is_named_along_with_the_supported_ones(tmp_path: Path, model_type: object) -> None:
    message = str(refusal(tmp_path, config_of("mixtral", model_type=model_type)))
    for name in (repr(model_type), *FAMILIES):
        assert name in message


def test_a_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, MAX_CONFIG_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most"):
        read_model_config(str(path))


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = sorted(
    {key for family in FAMILIES for key in config_of(family)}
    | {"norm_topk_prob", "mlp_only_layers", "n_group", "topk_group", "quantization_config"}
)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 9)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([*FAMILIES, "greedy", "group_limited_greedy", "softmax", "sigmoid", "noaux_tc"])
    | st.lists(st.integers(0, 4) | st.text(max_size=2), max_size=3)
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
)


def answers_or_refuses(path: Path) -> None:
    try:
        config = read_model_config(str(path))
    except CheckpointError as error:
        assert error.path == str(path)
        return
    assert 1 <= config.top_k <= config.num_experts <= 4096
    assert config.moe_layers == tuple(sorted(set(config.moe_layers)))
    assert 0 <= config.moe_layers[0] <= config.moe_layers[-1] < config.num_hidden_layers <= 1024


@fuzz
@given(content=st.binary(max_size=100))
def test_arbitrary_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    answers_or_refuses(path)


@fuzz
@given(
    model_type=st.sampled_from(list(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
def test_arbitrary_keys_are_read_or_refused(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config_of(model_type), **changes}))
    answers_or_refuses(path)
