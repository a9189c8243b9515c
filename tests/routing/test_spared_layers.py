"""The first layers may be spared: no bonus there, and no budget that would raise one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from runtimes import Residency, small_config

from shmroute import RouterConfig, Runtime
from shmroute.errors import ConfigError


@pytest.mark.parametrize("budget", [None, 0.01])
def test_spared_layers_are_routed_as_the_model_would(
    make_runtime: Callable[..., Runtime], budget: float | None
) -> None:
    router = RouterConfig(cache_bonus=4.0, spared_layers=2, quality_budget=budget)
    runtime = make_runtime(num_layers=3, slots=12, router=router)
    residency = Residency(runtime)
    for layer in range(3):
        residency.load(layer, 4, 5, 6, 7)
    logits = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    own = np.sort(np.argsort(-logits, axis=1)[:, :2], axis=1)
    for layer in range(3):
        chosen = np.concatenate([runtime.router(layer).route(part).experts for part in np.split(logits, 25)])
        assert (np.sort(chosen, axis=1) == own).all() == (layer < 2)
    assert [runtime.router(layer).cache_bonus for layer in range(2)] == [0, 0]
    runtime.router(0).cache_bonus = 4.0  # only where it begins is a setting
    assert (np.sort(runtime.router(0).route(logits).experts, axis=1) != own).any()


def test_more_layers_than_there_are_cannot_be_spared() -> None:
    with pytest.raises(ConfigError, match="spared_layers must be an integer from 0 to num_layers = 3, not 4"):
        small_config(num_layers=3, router=RouterConfig(spared_layers=4))
