"""What a worker does between two routes: is it resident, lease and release, and a look at the layer's affinity."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator

import numpy as np

from shmroute.bench import kernels
from shmroute.bench.measuring import Contestant, Loop, contest
from shmroute.bench.report import Table, table
from shmroute.bench.stage import Bench, routing_runtime, segment_of
from shmroute.runtime import Runtime
from shmroute.shared.layout import LINE
from shmroute.shared.lease_table import give_back, lease_table, take_lease

EXPERTS, TOP_K = 256, 8


def measure(bench: Bench) -> Iterator[Table]:
    """Three tables."""
    with routing_runtime(EXPERTS, TOP_K, resident=range(0, EXPERTS, 2)) as runtime:
        runtime.affinity(0).update([0])
        yield _residency(bench, runtime)
        yield _leases(bench, runtime)
        yield _affinity(bench, runtime)


def _residency(bench: Bench, runtime: Runtime) -> Table:
    segment, seconds = segment_of(runtime), bench.scale.loop_seconds
    row = segment.address + segment.layout.resident
    bits = np.zeros(EXPERTS // 64, np.int64)
    check, plain = kernels.check_residency.compiled(), kernels.check_plain.compiled()
    resident, lock = set(runtime.resident(0)), multiprocessing.Lock()
    flags = np.zeros(EXPERTS, np.bool_)

    def from_python(count: int) -> None:
        for _ in range(count):
            runtime.resident(0)

    def one_from_python(count: int) -> None:
        for i in range(count):
            runtime.is_resident(0, i & 255)

    def in_set(count: int) -> None:
        for i in range(count):
            _ = i & 255 in resident

    def in_array(count: int) -> None:
        for i in range(count):
            _ = flags[i & 255]

    def in_locked_array(count: int) -> None:
        for i in range(count):
            with lock:
                _ = flags[i & 255]

    contestants = [
        Contestant("one expert, in a kernel", Loop(lambda n: check(row, bits.ctypes.data, EXPERTS, n), seconds)),
        Contestant(
            "… in a private bitmap, nothing atomic", Loop(lambda n: plain(bits.ctypes.data, EXPERTS, n), seconds)
        ),
        Contestant("one expert from Python: runtime.is_resident", Loop(one_from_python, seconds)),
        Contestant(f"all of {EXPERTS} from Python: runtime.resident", Loop(from_python, seconds)),
        Contestant("one in a Python set of this process", Loop(in_set, seconds)),
        Contestant("one in a NumPy array, from Python", Loop(in_array, seconds)),
        Contestant("… behind a multiprocessing.Lock", Loop(in_locked_array, seconds)),
    ]
    return table("leases/residency", "is an expert resident?", "ns", contest(contestants, bench.scale.rounds))


def _leases(bench: Bench, runtime: Runtime) -> Table:
    seconds = bench.scale.loop_seconds
    own, held = lease_table(segment_of(runtime), runtime._attachment.lane().number), np.zeros(1, np.int64)

    def from_python(count: int) -> None:
        for _ in range(count):
            with runtime.expert(0, 0):
                pass

    def handed_out(count: int) -> None:
        chosen = [0, 2, 4, 6]
        for _ in range(count):
            for _ in runtime.experts(0, chosen):
                pass

    def by_kernels(count: int) -> None:
        for _ in range(count):
            take_lease(own, 0, 0, held)
            give_back(own, 0, 0, held)

    contestants = [
        Contestant("with runtime.expert(…)", Loop(from_python, seconds)),
        Contestant("runtime.experts(…), each of four", Loop(handed_out, seconds, per=4)),
        Contestant("the two kernels alone, from Python", Loop(by_kernels, seconds)),
        Contestant("multiprocessing.Lock, which admits one", Loop(_locking(multiprocessing.Lock()), seconds)),
        Contestant("multiprocessing.Semaphore", Loop(_locking(multiprocessing.Semaphore(32)), seconds)),
        Contestant("threading.Lock, of this process only", Loop(_locking(threading.Lock()), seconds)),
    ]
    return table(
        "leases/lease", "lease and release of a resident expert", "ns", contest(contestants, bench.scale.rounds),
        note="the locks keep nobody's bytes in place; they are what one would take instead",
    )  # fmt: skip


def _locking(lock: object) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            with lock:  # type: ignore[attr-defined]
                pass

    return run


def _affinity(bench: Bench, runtime: Runtime) -> Table:
    segment, seconds = segment_of(runtime), bench.scale.loop_seconds
    row = segment.address + segment.layout.use_row(0)
    clock = segment.address + segment.layout.clock + 0 * LINE
    powers = runtime._attachment.powers.ctypes.data
    snapshot, copy = kernels.snapshot_affinity.compiled(), kernels.copy_words.compiled()
    out = np.zeros(EXPERTS, np.float32)
    at = out.ctypes.data
    affinity, lock = runtime.affinity(0), multiprocessing.Lock()
    plain = np.zeros(EXPERTS, np.float32)

    def from_python(count: int) -> None:
        for _ in range(count):
            affinity.scores()

    def locked_copy(count: int) -> None:
        for _ in range(count):
            with lock:
                plain.copy()

    def decayed_by_numpy(count: int) -> None:
        ages = np.arange(EXPERTS)
        for _ in range(count):
            plain * np.power(0.99, ages)

    contestants = [
        Contestant("in a kernel", Loop(lambda n: snapshot(row, clock, powers, EXPERTS, at, n), seconds)),
        Contestant("from Python: affinity.scores()", Loop(from_python, seconds)),
        Contestant(
            "as many words copied, nothing atomic, no decay", Loop(lambda n: copy(row, EXPERTS, at, n), seconds)
        ),
        Contestant("NumPy: a copy behind a multiprocessing.Lock", Loop(locked_copy, seconds)),
        Contestant("NumPy: scores × decay ** ages, of this process", Loop(decayed_by_numpy, seconds)),
    ]
    return table("leases/affinity", f"all {EXPERTS} scores of a layer", "ns", contest(contestants, bench.scale.rounds))
