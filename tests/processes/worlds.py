"""Real processes around one segment: a world that starts them, and that ends every test with a clean ``/dev/shm``."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import shmroute
from shmroute import PagerConfig, Runtime, RuntimeConfig
from shmroute.budget import slot_bytes_of
from shmroute.metrics import read_metrics
from shmroute.pager.waiters import awaited_by_lane
from shmroute.shared.atomic import WORD
from shmroute.shared.kernel import load_kernels
from shmroute.shared.segment import Segment, attach_segment
from shmroute.shared.words import expert_mask, expert_state
from shmroute.sources.base import SourceSpec
from shmroute.sources.faulty import Fault, faulty_spec, read_log, set_faults
from shmroute.sources.synthetic import SyntheticSource

HERE = Path(__file__).parent
PATIENCE = 60.0
"""Seconds after which something that must happen has failed to."""

GEOMETRY: dict[str, Any] = {"num_layers": 2, "num_experts": 8, "hidden_size": 16, "intermediate_size": 24, "top_k": 2}


def eventually(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Poll until a condition holds; what it returned."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come about within {PATIENCE:g} s")
        time.sleep(0.005)
    return found


class Failed(Exception):
    """What a worker's command raised there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Reply:
    """An answer that may be still to come."""

    def __init__(self) -> None:
        self._answer: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def put(self, answer: dict[str, Any]) -> None:
        self._answer.put(answer)

    @property
    def pending(self) -> bool:
        return self._answer.empty()

    def get(self) -> Any:
        """The result; raises `Failed` with what the command raised, or if the worker ended instead."""
        answer = self._answer.get(timeout=PATIENCE)
        if "error" in answer:
            raise Failed(answer["error"], answer["message"])
        return answer["ok"]


class Process:
    """A program of this folder, its lines of output, and its end."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.popen.pid

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.heard(line.rstrip("\n"))
        self.ended()

    def heard(self, line: str) -> None:
        self.lines.append(line)

    def ended(self) -> None:
        pass

    def await_line(self, part: str) -> None:
        def said() -> bool:
            done = self.popen.poll() is not None and not self._reader.is_alive()
            found = any(part in line for line in self.lines)
            assert found or not done, f"ended ({self.popen.returncode}) without saying {part!r}: {self.lines}"
            return found

        eventually(said, f"the line {part!r}")

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        """SIGSTOP, and wait until it has effect."""
        self.signal(signal.SIGSTOP)
        eventually(lambda: process_state(self.pid) == "T", "the stop")

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def wait(self) -> int:
        code = self.popen.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def clean_up(self) -> None:
        if self.running:
            self.kill()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Worker(Process):
    """`program.py`: ``worker.start("lease", layer=0, expert=1)`` is a `Reply`, ``worker.do(…)`` its result."""

    def __init__(self, name: str) -> None:
        self._replies: dict[int, Reply] = {}
        self._identifiers = itertools.count()
        super().__init__("program.py", name)

    def heard(self, line: str) -> None:
        if line.startswith("{"):
            answer = json.loads(line)
            self._replies[answer["id"]].put(answer)
        else:
            super().heard(line)

    def ended(self) -> None:
        for reply in self._replies.values():
            reply.put({"error": "Ended", "message": "the worker ended"})

    def start(self, command: str, thread: str | None = None, **arguments: Any) -> Reply:
        identifier = next(self._identifiers)
        reply = self._replies[identifier] = Reply()
        assert self.popen.stdin is not None
        request = {"id": identifier, "command": command, "thread": thread, "arguments": arguments}
        self.popen.stdin.write(json.dumps(request) + "\n")
        self.popen.stdin.flush()
        return reply

    def do(self, command: str, **arguments: Any) -> Any:
        return self.start(command, **arguments).get()


def process_state(pid: int) -> str:
    """Its state letter, "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class World:
    """One segment over a synthetic source with faults, and the processes around it."""

    def __init__(self, folder: Path) -> None:
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.control, self.log = folder / "faults.json", folder / "reads.log"
        self.gate = folder / "gate"
        self.source = SyntheticSource(**GEOMETRY)
        self.spec: SourceSpec = faulty_spec(self.source.spec, self.control, self.log)
        self.geometry = self.source.geometry
        self.processes: list[Process] = []
        self.runtimes: list[Runtime] = []
        self._looker: Segment | None = None
        self._uuid: str | None = None

    # ------------------------------------------------------ making

    def config(self, slots: int = 4, max_workers: int = 8, **pager: Any) -> RuntimeConfig:
        """Settings; `pager` are fields of `PagerConfig`, without prefetches by default."""
        settings = PagerConfig(**({"prefetch": 0, "tick": 0.1} | pager))
        budget = slots * slot_bytes_of(self.geometry.expert_bytes)
        config = RuntimeConfig.from_checkpoint(self.source, budget, pager=settings, max_workers=max_workers)
        return dataclasses.replace(config, source=self.spec)

    def create(self, *, pager: bool = True, slots: int = 4, max_workers: int = 8, **settings: Any) -> Runtime:
        """Make the segment, owned by the test itself."""
        runtime = shmroute.create(self.name, self.config(slots, max_workers, **settings), pager=pager)
        return self.keep(runtime)

    def keep(self, runtime: Runtime) -> Runtime:
        self.runtimes.append(runtime)
        self._uuid = runtime._attachment.segment.uuid
        return runtime

    def attach(self) -> Runtime:
        return self.keep(shmroute.attach(self.name))

    def worker(self) -> Worker:
        return self.workers(1)[0]

    def workers(self, count: int) -> list[Worker]:
        """Start several at once."""
        started = [Worker(self.name) for _ in range(count)]
        self.processes += started
        for worker in started:
            worker.await_line("ready")
        return started

    def pager(self, *, standby: bool = False) -> Process:
        """A pager that nobody owns; serving, or standing by."""
        process = Process("pager_program.py", self.name, *(["standby"] if standby else []))
        self.processes.append(process)
        process.await_line("standing by" if standby else "serving")
        if standby:
            return process
        eventually(lambda: self.metrics().pager.pid == process.pid)
        return process

    # ------------------------------------------------------ faults and truth

    def faults(self, *faults: Fault) -> None:
        set_faults(self.control, faults)

    def close_gate(self, layer: int | str = "*", expert: int | str = "*") -> None:
        """Reads of these experts block from now on, until `open_gate`."""
        self.gate.unlink(missing_ok=True)
        self.faults(Fault(layer=layer, expert=expert, block_until=str(self.gate)))

    def open_gate(self) -> None:
        self.gate.touch()

    def reads(self, layer: int | None = None, expert: int | None = None) -> list[tuple[int, int]]:
        """(layer, expert) of all reads so far, in order; only those of one expert if given."""
        every = [(read.layer, read.expert) for read in read_log(self.log)]
        return every if layer is None else [read for read in every if read == (layer, expert)]

    def await_read(self, layer: int, expert: int, count: int = 1) -> None:
        eventually(lambda: len(self.reads(layer, expert)) >= count, f"read {count} of expert {expert}")

    def truth(self, layer: int, expert: int) -> str:
        """Digest of an expert's bytes."""
        buffer = bytearray(self.geometry.expert_bytes)
        self.source.read_into(layer, expert, memoryview(buffer))
        return xxhash.xxh3_64_hexdigest(buffer)

    # ------------------------------------------------------ looking

    @property
    def segment(self) -> Segment:
        """A mapping of the test's own, without a lane."""
        if self._looker is None:
            load_kernels()
            self._looker = attach_segment(self.name, closing=True)
            self._uuid = self._looker.uuid
        return self._looker

    def metrics(self) -> shmroute.RuntimeMetrics:
        return read_metrics(self.segment)

    def counter(self, name: str) -> int:
        """One of the pager's counters."""
        return self.metrics().pager.counters[name]

    def expert_address(self, layer: int, expert: int) -> int:
        return self.segment.address + self.segment.layout.row(self.segment.layout.experts, layer) + expert * WORD

    def word(self, layer: int, expert: int) -> int:
        return self.segment.read(self.expert_address(layer, expert) - self.segment.address)

    def state(self, layer: int, expert: int) -> int:
        return expert_state(self.word(layer, expert))

    def mask(self, layer: int, expert: int) -> int:
        return expert_mask(self.word(layer, expert))

    def awaited(self) -> set[tuple[int, int]]:
        """What workers wait for."""
        keys = awaited_by_lane(self.segment)
        return {divmod(int(key), self.geometry.num_experts) for key in keys[keys >= 0]}

    def files(self) -> list[str]:
        """What the segment has in /dev/shm."""
        ours = [f"shmroute.{self.name}"]
        found = [path.name for path in Path("/dev/shm").iterdir()]
        return sorted(f for f in found if f in ours or (self._uuid is not None and f"shmroute-{self._uuid}" in f))

    # ------------------------------------------------------ the end

    def end(self) -> None:
        """End every process, destroy what the test left; raise if anything remains."""
        self.open_gate()
        for process in self.processes:
            process.clean_up()
        for runtime in self.runtimes:
            runtime.close()
        if (Path("/dev/shm") / f"shmroute.{self.name}").exists():
            shmroute.destroy(self.name, timeout=PATIENCE)
        if self._looker is not None:
            self._looker.close()
        assert self.files() == []


def falling_logits(experts: int = GEOMETRY["num_experts"]) -> np.ndarray:
    """Logits by which experts 0 and 1 are chosen."""
    return np.linspace(1, -1, experts, dtype=np.float32)


def process_gone(pid: int) -> bool:
    return process_state(pid) in ("", "Z", "X") and pid != os.getpid()
