"""Checkpoints and runtimes for the tests of Transformers' models. Run by ``make test-transformers``.

Nothing here is skipped where torch is missing: these tests then fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import SHIPPED, make_checkpoint

import shmroute
from shmroute import PagerConfig, RouterConfig, RuntimeConfig


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(family, dtype)``: the folder, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = make_checkpoint(tmp_path_factory.mktemp(family), family, dtype)
        return made[family, dtype]

    return get


@pytest.fixture(scope="session")
def shipped_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped trained model, stored as float32."""
    folder = tmp_path_factory.mktemp("shipped")
    transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def runtime_of() -> Iterator[Callable[..., shmroute.Runtime]]:
    """``runtime_of(folder, bonus=0, budget="50%")``: a runtime with a pager, destroyed after the test."""
    made: list[shmroute.Runtime] = []

    def create(folder: Path, bonus: float = 0.0, budget: str = "50%", **pager: Any) -> shmroute.Runtime:
        config = RuntimeConfig.from_checkpoint(
            folder, budget, router=RouterConfig(cache_bonus=bonus), pager=PagerConfig(**pager)
        )
        made.append(shmroute.create(f"transformers-{os.getpid()}-{len(made)}", config, pager=True))
        return made[-1]

    yield create
    for runtime in made:
        runtime.close()


@pytest.fixture(scope="session")
def servable(shipped_float32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model as float32, with its tokenizer."""
    folder = tmp_path_factory.mktemp("servable")
    shutil.copytree(shipped_float32, folder, dirs_exist_ok=True)
    shutil.copy(SHIPPED / "tokenizer.json", folder)
    return folder
