"""What is recorded is what was routed, by however many threads, attachments and forks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from runtimes import REPOSITORY, Residency, clock_of, run_python, small_config, unique_name

from shmroute.config import RouterConfig, RuntimeConfig, TraceConfig
from shmroute.errors import ConfigError, RecordingError
from shmroute.lifecycle import attach, create
from shmroute.recording.append import append_wait
from shmroute.recording.recorder import recorder_of
from shmroute.runtime import Runtime
from shmroute.shared.atomic import COMPILED
from shmroute.traces.merging import merge
from shmroute.traces.recorded_files import read_run

LAYERS, EXPERTS, TOP_K = 3, 70, 3  # a residency of two words
RNG = np.random.default_rng(5)


def recording(folder: Path, **settings: object) -> RuntimeConfig:
    """Settings that record, with logits."""
    shape = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "slots": 8}
    return small_config(**(shape | {"trace": TraceConfig(str(folder), logits=True)} | settings))


def route_through(
    runtime: Runtime, logits: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Route [T, layers, experts] through all layers; ids and weights."""
    ids = np.zeros((len(logits), LAYERS, TOP_K), np.int32)
    weights = np.zeros(ids.shape, np.float32)
    for layer in range(LAYERS):
        decision = runtime.router(layer).route(logits[:, layer])
        ids[:, layer], weights[:, layer] = decision.experts, decision.weights
    return ids, weights


def logits_of(tokens: int) -> npt.NDArray[np.float32]:
    return RNG.normal(size=(tokens, LAYERS, EXPERTS)).astype(np.float32)


def test_everything_that_was_routed_is_recorded(make_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = make_runtime(recording(tmp_path / "a" / "b"))
    Residency(runtime).load(1, 0, 65, 69)
    runtime.router(1).cache_bonus = 0.25
    one, batch = logits_of(1), logits_of(17)
    first, second = route_through(runtime, one), route_through(runtime, batch)
    hits = runtime.metrics().total.counters["hits"]
    runtime.close()

    trace = merge(tmp_path / "a" / "b")
    assert trace.logits is not None
    assert trace.weights is not None
    assert trace.resident is not None
    assert trace.strength is not None
    assert trace.tick is not None
    assert trace.lane is not None
    np.testing.assert_array_equal(trace.ids, np.concatenate([first[0], second[0]]))
    np.testing.assert_array_equal(trace.weights, np.concatenate([first[1], second[1]]))
    np.testing.assert_array_equal(trace.logits, np.concatenate([one, batch]))
    np.testing.assert_array_equal(trace.tick, np.repeat(np.arange(18)[:, None], LAYERS, axis=1))
    bits = np.unpackbits(trace.resident, axis=2, bitorder="little")
    assert [np.flatnonzero(bits[t, layer]).tolist() for t in (0, 17) for layer in range(3)] == [[], [0, 65, 69], []] * 2
    assert (trace.strength[:, 1] == 0.25).all()
    assert (trace.strength[:, [0, 2]] == 0).all(), "nothing was resident there, so no bonus could change anything"
    assert int((trace.ids.shape[2] - trace.misses()).sum()) == hits
    assert trace.meta["layer_numbers"] == [0, 1, 2]
    assert set(trace.lane.tolist()) == set(trace.seq_id.tolist()) == {0}


def test_nothing_is_recorded_unless_asked_for(make_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = make_runtime(recording(tmp_path, trace=None))
    route_through(runtime, logits_of(3))
    assert runtime.metrics().total.counters["recorded"] == 0
    assert list(tmp_path.iterdir()) == []


def test_logits_are_recorded_only_if_asked_for(make_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = make_runtime(recording(tmp_path, trace=tmp_path))
    ids, weights = route_through(runtime, logits_of(4))
    runtime.close()
    trace = merge(tmp_path)
    assert trace.logits is None
    assert trace.weights is not None
    np.testing.assert_array_equal(trace.ids, ids)
    np.testing.assert_array_equal(trace.weights, weights)


def test_each_thread_is_a_sequence_in_its_own_order(make_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = make_runtime(recording(tmp_path))
    given = [logits_of(40) for _ in range(4)]
    routed: dict[int, npt.NDArray[np.int32]] = {}
    together = threading.Barrier(4)

    def work(number: int) -> None:
        together.wait()
        pieces = [route_through(runtime, given[number][at : at + 2])[0] for at in range(0, 40, 2)]
        routed[number] = np.concatenate(pieces)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock_of(runtime) == 160
    runtime.close()
    trace = merge(tmp_path)
    assert trace.logits is not None
    assert trace.num_tokens == 160
    assert len(set(trace.seq_id.tolist())) == 4
    for sequence in set(trace.seq_id.tolist()):
        rows = trace.seq_id == sequence
        number = next(n for n in range(4) if (given[n][0] == trace.logits[rows][0]).all())
        np.testing.assert_array_equal(trace.logits[rows], given[number])
        np.testing.assert_array_equal(trace.ids[rows], routed[number])


def test_all_runtimes_of_a_process_share_one_file(tmp_path: Path) -> None:
    with create(unique_name(), recording(tmp_path), progress=None) as owner:
        for tokens in (2, 3):
            with attach(owner.name, progress=None) as runtime:
                route_through(runtime, logits_of(tokens))
    (only,) = read_run(tmp_path)
    assert len(only.records) == 5 * LAYERS
    assert only.ended


def test_a_lane_that_is_taken_again_gets_another_file(tmp_path: Path) -> None:
    with create(unique_name(), recording(tmp_path), progress=None) as owner:
        code = (
            "import sys, numpy as np, shmroute\n"
            "with shmroute.attach(sys.argv[1]) as runtime:\n"
            "    runtime.router(0).route(np.zeros((2, 70), np.float32))\n"
        )
        for _ in range(2):
            run_python(code, owner.name)
    files = read_run(tmp_path)
    assert [(file.lane, file.generation, len(file.records)) for file in files] == [(0, 0, 2), (0, 1, 2)]
    assert len({file.pid for file in files}) == 2
    assert merge(tmp_path).num_tokens == 4


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_leaves_its_parents_file_alone(tmp_path: Path) -> None:
    with create(unique_name(), recording(tmp_path), progress=None) as runtime:
        route_through(runtime, logits_of(1))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with attach(runtime.name, progress=None) as own:
                    route_through(own, logits_of(5))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        route_through(runtime, logits_of(2))
    parent, forked = read_run(tmp_path)
    assert (parent.pid, len(parent.records)) == (os.getpid(), 3 * LAYERS)
    assert (forked.pid, len(forked.records)) == (child, 5 * LAYERS)
    assert parent.ended
    assert forked.ended
    assert merge(tmp_path).num_tokens == 8


def test_waits_are_put_to_the_token_that_waited(make_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = make_runtime(recording(tmp_path))
    ids, _ = route_through(runtime, logits_of(4))
    recorder = runtime._attachment.one(recorder_of)
    assert recorder is not None
    address = recorder.address
    wanted = int(ids[2, 1, 0])
    first = next(token for token in range(4) if wanted in ids[token, 1])
    append_wait(address, 1, wanted, 700)
    append_wait(address, 1, wanted, 50)
    append_wait(address, 2, next(e for e in range(EXPERTS) if e not in ids[:, 2]), 11)
    ids, _ = route_through(runtime, logits_of(1))
    append_wait(address, 2, int(ids[0, 2, 1]), 9)
    runtime.close()
    trace = merge(tmp_path)
    assert trace.stall_ns is not None
    assert {(int(t), int(layer)): int(trace.stall_ns[t, layer]) for t, layer in np.argwhere(trace.stall_ns)} == {
        (first, 1): 750,
        (4, 2): 9,
    }
    assert trace.meta["stall_elsewhere_ns"] == 11


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="cannot be made a folder"):
        create(unique_name(), recording(tmp_path / "file" / "below"), progress=None)


@pytest.mark.parametrize("trace", ["", ".", 3, TraceConfig])
def test_settings_that_are_no_folder_are_refused(trace: object) -> None:
    with pytest.raises(ConfigError, match="trace"):
        small_config(trace=trace)


def test_settings_survive_the_header(tmp_path: Path) -> None:
    for trace in (None, tmp_path, TraceConfig(str(tmp_path), logits=True)):
        config = small_config(trace=trace)
        assert RuntimeConfig.from_json(config.to_json()) == config
    assert small_config(trace="here").recording == TraceConfig(str(Path.cwd() / "here"))
    command = small_config(trace=TraceConfig(str(tmp_path), logits=True)).pager_command("n")
    assert f"--trace {tmp_path} --trace-logits" in command


ALLOCATING = """
import sys, gc
import numpy as np
from runtimes import small_config, unique_name
from shmroute import create
from shmroute.config import TraceConfig

config = small_config(num_experts=64, top_k=4, trace=TraceConfig(sys.argv[1], logits=True))
with create(unique_name(), config, progress=None) as runtime:
    route_into = runtime.router(0).route_into
    logits = np.random.default_rng(0).normal(size=64).astype(np.float32)
    experts, weights = np.empty(4, np.int32), np.empty(4, np.float32)
    repetitions = [None] * 500

    def route_often():
        for _ in repetitions:
            route_into(logits, experts, weights)

    route_often()
    gc.disable()
    blocks = sys.getallocatedblocks()
    route_often()
    print(sys.getallocatedblocks() - blocks < 10, runtime.metrics().total.counters["recorded"])
"""


@pytest.mark.skipif(not COMPILED, reason="interpreted kernels allocate")
def test_recording_allocates_nothing(tmp_path: Path) -> None:
    path = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    assert run_python(ALLOCATING, str(tmp_path), PYTHONPATH=path).stdout == "True 1000\n"


def test_a_router_that_is_not_memory_aware_records_no_bonus(
    make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    runtime = make_runtime(recording(tmp_path, router=RouterConfig(cache_bonus=1.0, memory_aware=False)))
    Residency(runtime).load(0, 5)
    route_through(runtime, logits_of(2))
    runtime.close()
    trace = merge(tmp_path)
    assert trace.strength is not None
    assert (trace.strength == 0).all()
    assert not trace.meta["router"]["memory_aware"]
