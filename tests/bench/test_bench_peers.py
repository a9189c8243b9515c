"""The peers do the same work as the runtime: they choose the same experts, deliver messages, read the same bytes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from shmroute.bench.checkpoints import checkpoint, disk_folder
from shmroute.bench.measuring import QUICK
from shmroute.bench.paging_peers import PEERS as READERS
from shmroute.bench.partners import Partner, PartnerError
from shmroute.bench.ring_peers import PEERS as TRANSPORTS
from shmroute.bench.ring_peers import Endpoint, RingAndBell
from shmroute.bench.routing import _runtimes, ways
from shmroute.bench.stage import Bench, logits, routing_runtime
from shmroute.shared.kernel import load_kernels
from shmroute.sources import HuggingFaceSource


@pytest.fixture(autouse=True)
def kernels() -> None:
    load_kernels()


@pytest.mark.parametrize("tokens", [None, 3])
def test_all_ways_to_route_choose_alike(tokens: int | None) -> None:
    row = logits(tokens or 1, 64)
    chosen = np.argsort(-row, axis=1, kind="stable")[:, :6]
    best = np.exp(np.take_along_axis(row, chosen, 1))
    shares = best / best.sum(1, keepdims=True)
    if tokens is None:
        row, chosen, shares = row[0], chosen[0], shares[0]
    bench = Bench(QUICK)
    with _runtimes(64, 6) as runtimes:
        for name, way in ways(bench, runtimes, 6, tokens).items():
            if name == "three arrays into compiled code":
                continue
            if "half" in name:
                continue  # its choices are biased towards what is resident
            way.experts[:], way.weights[:] = -1, 0
            way.loop([row])(1)
            assert (way.experts == chosen).all(), name
            np.testing.assert_allclose(way.weights, shares, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["ring + bell", *TRANSPORTS])
def test_a_transport_delivers(name: str) -> None:
    with ExitStack() as stack:
        endpoint: Endpoint
        if name == "ring + bell":
            endpoint = RingAndBell(stack.enter_context(routing_runtime(16, 2)))
        else:
            try:
                endpoint = TRANSPORTS[name]("test-transport")
            except ImportError as error:
                pytest.skip(str(error))
        stack.callback(endpoint.remove)
        receive, send = endpoint.receiver(), endpoint.sender()
        if name != "multiprocessing.SimpleQueue":  # which knows no timeout
            assert not receive(0.01)
        for number in (1, 2):
            send(number)
            assert receive(5.0)


@pytest.mark.parametrize("cold", [False, True])
def test_readers_read_what_the_source_serves(cold: bool) -> None:
    with checkpoint(disk_folder(), experts=3, size=40_000) as made, ExitStack() as resources:
        source = HuggingFaceSource(made.folder)
        resources.callback(source.close)
        size = source.geometry.expert_bytes
        assert (source.geometry.num_experts, size) == (made.experts, made.expert_bytes)
        expected = bytearray(size)
        source.read_into(0, 2, memoryview(expected))
        raw = made.path.read_bytes()[made.offset(2) : made.offset(2) + size]
        gate, down, up = raw[: size // 3], raw[size // 3 * 2 :], raw[size // 3 : size // 3 * 2]
        assert bytes(expected) == gate + up + down
        for name, make in READERS.items():
            buffer = memoryview(bytearray(size))
            make(made, cold, resources)(2, buffer)
            if name in ("safetensors.safe_open", "numpy.fromfile"):
                continue  # into arrays of their own
            assert bytes(buffer) == raw, name
        made.forget()
        folder = made.folder
    assert not folder.exists()


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no room"), checkpoint(tmp_path, experts=1 << 20, size=1 << 40):
        pass


def add(inherited: dict[str, int], number: int) -> int:
    """For a partner."""
    return inherited["one"] + number


def fail(inherited: dict[str, int]) -> None:
    """For a partner."""
    raise ValueError("on purpose")


def test_a_partner_works_and_reports_failures() -> None:
    with Partner(None, {"one": 1}) as partner:
        assert partner.call(add, 2) == 3
        with pytest.raises(PartnerError, match="on purpose"):
            partner.call(fail)
        assert partner.call(add, 3) == 4
        pid = partner.pid
    assert not Path(f"/proc/{pid}").exists()
