"""Files of a recording: growing, full, torn, damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtimes import REPOSITORY, run_python, small_config, unique_name

from shmroute.config import RuntimeConfig
from shmroute.errors import RecordingError, TraceError
from shmroute.lifecycle import create
from shmroute.recording import append as a
from shmroute.recording import records as r
from shmroute.recording.append import append_wait
from shmroute.recording.grow import CHUNKS_AHEAD
from shmroute.recording.recorder import Recorder, recorder_of
from shmroute.shared.atomic import WORD
from shmroute.shared.kernel import load_kernels
from shmroute.shared.metrics import LANE_COUNTERS, LaneCounter, snapshot_words
from shmroute.traces.merging import merge, merge_files
from shmroute.traces.recorded_files import read_file, read_run

UUID = "0123456789abcdef" * 2
ROOM = (CHUNKS_AHEAD + 1) * a.CHUNK_RECORDS


@pytest.fixture
def config(tmp_path: Path) -> RuntimeConfig:
    return small_config(num_layers=2, trace=tmp_path)


@pytest.fixture
def counters(memory: Callable[[int], int]) -> int:
    return memory(LANE_COUNTERS * WORD)


@pytest.fixture
def recorder(config: RuntimeConfig, counters: int) -> Iterator[Recorder]:
    """One that grows only when the test says so."""
    load_kernels()
    made = Recorder(config, UUID, 3, 7, counters, growing=False)
    yield made
    if made._header:
        made.close()


def fill(recorder: Recorder, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        append_wait(recorder.address, number % 2, number % 8, number)


def test_a_recorder_that_is_not_grown_in_time_counts_what_it_drops(recorder: Recorder, counters: int) -> None:
    fill(recorder, ROOM + 5)
    recorder.grow_now()
    fill(recorder, 2, first=ROOM + 5)
    recorder.close()
    file = read_file(recorder.path)
    assert file is not None
    assert (file.lane, file.generation, file.run, file.dropped, file.unfinished) == (3, 7, UUID, 5, 0)
    assert file.records["moment"].tolist() == [*range(ROOM), ROOM + 5, ROOM + 6]
    assert file.records["dropped"].tolist() == [0] * ROOM + [5, 5]
    assert snapshot_words(counters, LANE_COUNTERS)[LaneCounter.UNRECORDED] == 5


def test_full_chunks_are_let_go_and_the_file_ends_where_its_records_do(recorder: Recorder) -> None:
    rounds = 4
    for number in range(rounds):
        fill(recorder, ROOM - a.CHUNK_RECORDS, first=number * (ROOM - a.CHUNK_RECORDS))
        recorder.grow_now()
        # Twice as many as were used since the last look, and the one in use.
        assert recorder.mapped_chunks == range((number + 1) * CHUNKS_AHEAD, (number + 3) * CHUNKS_AHEAD + 1)
    fill(recorder, 3)
    recorder.close()
    file = read_file(recorder.path)
    assert file is not None
    assert len(file.records) == rounds * (ROOM - a.CHUNK_RECORDS) + 3
    assert recorder.path.stat().st_size == r.PAGE + len(file.records) * file.records.itemsize
    assert file.dropped == file.unfinished == 0


def test_a_batch_for_which_there_is_no_room_is_recorded_as_far_as_there_is(
    recorder: Recorder, config: RuntimeConfig
) -> None:
    fill(recorder, ROOM - 2)
    # A routing call's records are reserved together.
    reserved = reserve(recorder.address, 5)
    assert reserved == (ROOM - 2) << a.COUNT_BITS | 2
    recorder.close()
    file = read_file(recorder.path)
    assert file is not None
    assert (file.dropped, file.unfinished) == (3, 2)


def reserve(recorder: int, count: int) -> int:
    """`append.reserve`, as the plain function that it is."""
    return int(a.reserve(recorder, count))


def test_a_record_without_its_commit_word_is_counted_and_left_out(recorder: Recorder) -> None:
    fill(recorder, 4)
    recorder.close()
    content = bytearray(recorder.path.read_bytes())
    size = r.RecordLayout(8, 2, False).record_bytes
    content[r.PAGE + size : r.PAGE + size + WORD] = bytes(WORD)
    recorder.path.write_bytes(content)
    file = read_file(recorder.path)
    assert file is not None
    assert file.unfinished == 1
    assert file.records["moment"].tolist() == [0, 2, 3]


def test_a_file_that_was_cut_off_counts_what_is_gone(recorder: Recorder) -> None:
    fill(recorder, 4)
    recorder.close()
    os.truncate(recorder.path, recorder.path.stat().st_size - 10)
    file = read_file(recorder.path)
    assert file is not None
    assert (len(file.records), file.unfinished) == (3, 1)


def test_a_worker_that_died_before_its_header_was_whole_leaves_nothing(recorder: Recorder, tmp_path: Path) -> None:
    shutil.copy(recorder.path, tmp_path / "other.routes")
    with (tmp_path / "other.routes").open("r+b") as file:
        file.write(bytes(WORD))
    assert read_file(tmp_path / "other.routes") is None
    (tmp_path / "empty.routes").touch()
    assert read_file(tmp_path / "empty.routes") is None
    assert [file.path for file in read_run(tmp_path)] == [recorder.path]


def test_the_same_attachment_twice_is_an_error_not_an_overwritten_file(
    recorder: Recorder, config: RuntimeConfig, counters: int
) -> None:
    with pytest.raises(RecordingError, match="File exists"):
        Recorder(config, UUID, 3, 7, counters, growing=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a few calls and waits, alone in its folder."""
    folder = tmp_path_factory.mktemp("whole")
    with create(unique_name(), small_config(num_layers=2, trace=folder), progress=None) as runtime:
        for _ in range(5):
            for layer in range(2):
                runtime.router(layer).route(np.random.default_rng(layer).normal(size=(3, 8)).astype(np.float32))
        recorder = runtime._attachment.one(recorder_of)
        assert recorder is not None
        fill(recorder, 6)
    return recorder.path


LENGTH = r.PAGE + 36 * r.layout_of(small_config(trace="anywhere")).record_bytes


@given(at=st.integers(0, LENGTH - 1), value=st.integers(0, 255))
def test_a_damaged_file_is_refused_or_read_as_a_trace(whole: Path, at: int, value: int) -> None:
    content = bytearray(whole.read_bytes())
    assert len(content) == LENGTH
    content[at] = value
    damaged = whole.with_name("damaged")
    damaged.write_bytes(content)
    try:
        file = read_file(damaged)
        if file is not None:
            reserved = int.from_bytes(content[r.HEADER_NEXT * WORD : (r.HEADER_NEXT + 1) * WORD], "little")
            assert len(file.records) + file.unfinished + file.damaged == reserved
            assert merge_files(whole.parent, [file]).num_tokens <= 30
    except TraceError as error:
        assert str(damaged) in str(error) or str(whole.parent) in str(error)


FULL = """
import json, resource, sys, warnings
import numpy as np
from runtimes import small_config, unique_name
from shmroute import create
from shmroute.errors import RecordingError

config = small_config(num_experts=64, top_k=4, trace=sys.argv[1])
warned = []
warnings.showwarning = lambda message, *rest: warned.append(str(message))
with create(unique_name(), config, progress=None) as runtime:
    if sys.argv[2] == "at once":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            runtime.router(0)
        except RecordingError as error:
            print(json.dumps({"error": str(error)}))
        sys.exit()
    router = runtime.router(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))
    logits = np.zeros((1000, 64), np.float32)
    experts, weights = np.empty((1000, 4), np.int32), np.empty((1000, 4), np.float32)
    counters = {}
    while not counters.get("unrecorded") or not warned:
        router.route_into(logits, experts, weights)
        counters = runtime.metrics().total.counters
print(json.dumps({"warned": warned, "counters": counters}))
"""


def full_disk(folder: Path, when: str) -> dict[str, object]:
    """What a program says whose files may not grow beyond a limit, as on a full disk."""
    path = os.pathsep.join([str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")])
    done = run_python(FULL, str(folder), when, PYTHONPATH=path)
    said: dict[str, object] = json.loads(done.stdout)
    return said


def test_a_disk_that_is_full_at_once_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    error = str(full_disk(tmp_path, "at once")["error"])
    assert "File too large" in error
    assert "bytes for each worker" in error
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_stops_the_recording_and_not_the_worker(tmp_path: Path) -> None:
    said = full_disk(tmp_path, "later")
    (warned,) = said["warned"]  # type: ignore[misc, attr-defined]
    assert "Routing goes on" in warned
    counters: dict[str, int] = said["counters"]  # type: ignore[assignment]
    assert counters["recorded"] + counters["unrecorded"] == counters["tokens"]
    (file,) = read_run(tmp_path)
    assert file.errno > 0
    assert file.dropped >= counters["unrecorded"]
    assert merge(tmp_path).num_tokens == len(file.records) == counters["recorded"]
