"""A segment without a pager, for the pager's parts one by one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.shared.kernel import load_kernels
from shmroute.shared.removal import claim_destruction, unlink_segment
from shmroute.shared.segment import Segment, create_segment


@pytest.fixture
def segment() -> Iterator[Segment]:
    """Of 2 layers with 8 experts, and 4 slots."""
    load_kernels()
    config = RuntimeConfig(
        num_layers=2, num_experts=8, top_k=2, expert_bytes=4096, slots=4, pager=PagerConfig(prefetch=3), max_workers=4
    )
    made = create_segment(f"test-{uuid.uuid4().hex[:12]}", config)
    yield made
    assert claim_destruction(made)
    unlink_segment(made)
    made.close()
    assert not [path for path in Path("/dev/shm").iterdir() if made.uuid in path.name or made.name in path.name]
