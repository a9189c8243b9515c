"""With a bonus of 0 a model on the shared cache computes what Transformers' own does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import FAMILIES, SHIPPED, stock

import shmroute
import shmroute.speculation
from shmroute.integrations.transformers import SUPPORTED_FAMILIES, load
from shmroute.integrations.transformers.routing import SharedRouting

TOLERANCE = 1e-5
PROMPT = "In the beginning God created the heaven and the earth"


def tokens(count: int, length: int) -> torch.Tensor:
    """Random ones, the same every time."""
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(7))


def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids, **more).logits
    return result


def test_every_supported_family_is_tried() -> None:
    assert set(FAMILIES) == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_batch(family: str, checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]) -> None:
    folder = checkpoint(family)
    ours, theirs = load(folder, runtime_of(folder)), stock(folder)
    assert type(ours) is type(theirs)
    ids = tokens(3, 17)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=TOLERANCE)


def test_biases_and_transposed_experts_in_half_precision(
    checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]
) -> None:
    """Transformers' own two ways to compute experts differ by 0.01 here."""
    folder = checkpoint("gpt_oss", torch.float16)
    ours, theirs = load(folder, runtime_of(folder)), stock(folder, torch.float16)
    assert ours.dtype == torch.float16
    ids = tokens(3, 17)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_and_key_value_cache(
    family: str, checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]
) -> None:
    folder = checkpoint(family)
    ours, theirs = load(folder, runtime_of(folder, budget="40%")), stock(folder)
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5], mask[2, :1] = 0, 0
    ids[mask == 0] = 0
    wanted = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    assert torch.equal(ours.generate(ids, **wanted), theirs.generate(ids, **wanted))
    steps = []
    for model in (ours, theirs):
        with torch.no_grad():
            first = model(ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
            steps.append(model(ids[:, 11:], attention_mask=mask, past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(*steps, rtol=0, atol=TOLERANCE)


def test_the_shipped_model_in_float32(shipped_float32: Path, runtime_of: Callable[..., Any]) -> None:
    ours, theirs = load(shipped_float32, runtime_of(shipped_float32, budget="25%")), stock(shipped_float32)
    ids = transformers.AutoTokenizer.from_pretrained(SHIPPED)(PROMPT, return_tensors="pt").input_ids
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=TOLERANCE)
    assert torch.equal(
        ours.generate(ids, max_new_tokens=48, do_sample=False), theirs.generate(ids, max_new_tokens=48, do_sample=False)
    )


def test_the_shipped_model_as_it_is_stored(runtime_of: Callable[..., Any]) -> None:
    ours, theirs = load(SHIPPED, runtime_of(SHIPPED)), stock(SHIPPED, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    ids = transformers.AutoTokenizer.from_pretrained(SHIPPED)(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(
        ours.generate(ids, max_new_tokens=48, do_sample=False), theirs.generate(ids, max_new_tokens=48, do_sample=False)
    )


def test_results_do_not_depend_on_what_was_resident(runtime_of: Callable[..., Any]) -> None:
    runtime = runtime_of(SHIPPED)
    model = load(SHIPPED, runtime)
    ids = tokens(2, 40)
    cold = logits(model, ids)
    for layer in range(runtime.config.num_layers):
        for expert in (6, 7):
            with runtime.expert(layer, expert):
                pass
    assert torch.equal(logits(model, ids), cold)


def test_several_workers_at_once(shipped_float32: Path, runtime_of: Callable[..., Any]) -> None:
    runtime = runtime_of(shipped_float32, budget="25%")
    program = Path(__file__).with_name("generating_program.py")
    prompts = [tokens(1, 6 + worker)[0].tolist() for worker in range(3)]
    workers = [
        subprocess.Popen(
            [sys.executable, program, str(shipped_float32), runtime.name, json.dumps(prompt)],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for prompt in prompts
    ]  # fmt: skip
    outputs = [json.loads(worker.communicate(timeout=100)[0]) for worker in workers]
    theirs = stock(shipped_float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0].tolist()
        assert output == expected
    assert runtime.metrics().total.counters["hits"] > 0


@pytest.mark.parametrize("bonus", [0.0, 1.0])
def test_the_bonus_reaches_the_models_choice(bonus: float, runtime_of: Callable[..., Any]) -> None:
    """The lever is tied to the model: with it, tokens choose other experts and hit more often."""
    runtime: shmroute.Runtime = runtime_of(SHIPPED, bonus=bonus, budget="50%")
    model = load(SHIPPED, runtime)
    ids = transformers.AutoTokenizer.from_pretrained(SHIPPED)(PROMPT, return_tensors="pt").input_ids
    model.generate(ids, max_new_tokens=64, do_sample=False)
    metrics = runtime.metrics()
    assert metrics.total.counters["hits"] > 0
    assert (metrics.total.counters["changed"] > 0) == (bonus > 0)


def test_the_next_layers_gate_asks_ahead(runtime_of: Callable[..., Any]) -> None:
    """If asked to, decoding speculates by the model's own gates; a long prompt, which chooses all experts, does not."""
    runtime: shmroute.Runtime = runtime_of(SHIPPED, budget="50%", predictors=("gate",))
    load(SHIPPED, runtime).generate(tokens(1, 4), max_new_tokens=24, do_sample=False)
    assert runtime.metrics().pager.predictors["gate"]["issued"] == 0
    model = load(SHIPPED, runtime, speculate=True)
    logits(model, tokens(2, 40))
    assert runtime.metrics().pager.predictors["gate"]["issued"] == 0
    model.generate(tokens(1, 4), max_new_tokens=48, do_sample=False)
    assert runtime.metrics().pager.predictors["gate"]["issued"] > 0


@pytest.mark.parametrize(("withheld", "products"), [(True, 6), (False, 11)])
def test_a_gates_product_is_computed_ahead_only_if_it_is_wanted(
    runtime_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, withheld: bool, products: int
) -> None:
    model = load(SHIPPED, runtime_of(SHIPPED, budget="50%", predictors=("gate",)), speculate=True)
    computed: list[SharedRouting] = []
    product = SharedRouting.logits
    monkeypatch.setattr(shmroute.speculation, "withholds", lambda *_: withheld)
    monkeypatch.setattr(SharedRouting, "logits", lambda self, hidden: computed.append(self) or product(self, hidden))
    logits(model, tokens(1, 1))
    assert len(computed) == products
