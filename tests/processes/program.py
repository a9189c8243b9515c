"""A worker process on a leash: reads one JSON command a line, does it in one of its threads, answers with one line.

``python program.py NAME`` attaches to segment NAME. Commands run in the main thread, except those with a ``"thread"``,
which run in a thread of that name, so that one process can wait for experts in several threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash

import shmroute


class Program:
    """The commands. Leases and loops are kept under a handle until told to end them."""

    def __init__(self, name: str) -> None:
        self.runtime = shmroute.attach(name)
        self.leases: dict[str, Any] = {}
        self.loops: dict[str, Iterator[Any]] = {}

    def pid(self) -> int:
        return os.getpid()

    def lease(self, layer: int, expert: int, handle: str = "", timeout: float = 30.0) -> str:
        """Take a lease and keep it; the digest of the bytes under it."""
        lease = self.runtime.expert(layer, expert, timeout)
        weights = lease.__enter__()
        self.leases[handle] = (lease, weights)
        return xxhash.xxh3_64_hexdigest(weights.raw)

    def digest(self, handle: str = "") -> str:
        return xxhash.xxh3_64_hexdigest(self.leases[handle][1].raw)

    def release(self, handle: str = "") -> None:
        self.leases.pop(handle)[0].__exit__(None, None, None)

    def visit(self, layer: int, experts: list[int], rounds: int = 1, timeout: float = 30.0) -> dict[str, list[str]]:
        """Lease each expert in turn, `rounds` times; all digests that were seen under a lease."""
        seen: dict[str, set[str]] = {str(expert): set() for expert in experts}
        for _ in range(rounds):
            for expert in experts:
                with self.runtime.expert(layer, expert, timeout) as weights:
                    seen[str(expert)].add(xxhash.xxh3_64_hexdigest(weights.raw))
                    seen[str(expert)].add(xxhash.xxh3_64_hexdigest(weights.raw))
        return {expert: sorted(digests) for expert, digests in seen.items()}

    def sweep(self, layer: int, experts: list[int], timeout: float = 30.0) -> dict[str, str]:
        """The same by one loop of `Runtime.experts`."""
        return {
            str(expert): xxhash.xxh3_64_hexdigest(weights.raw)
            for expert, _, _, weights in self.runtime.experts(layer, experts, timeout)
        }

    def route(self, layer: int, tokens: int = 1) -> list[int]:
        """Route tokens with falling logits; what the last one chose."""
        logits = np.linspace(1, -1, self.runtime.config.num_experts, dtype=np.float32)
        router = self.runtime.router(layer)
        chosen = [router.route(logits).experts.tolist() for _ in range(tokens)]
        return [int(expert) for expert in chosen[-1]]

    def prefetch(self, layer: int, experts: list[int]) -> int:
        return self.runtime.prefetch(layer, experts)

    def lane(self) -> int:
        return self.runtime._attachment.lane().number

    def starve(self, spare: int) -> None:
        """Use up this process's descriptors, all but `spare`."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        held = []
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for descriptor in held[:spare]:
            os.close(descriptor)

    def reattach_by_execv(self) -> None:
        """Become this program anew, in the same process, without any clean-up."""
        os.execv(sys.executable, [sys.executable, *sys.argv])

    def close(self) -> None:
        self.runtime.close()

    def leave(self) -> None:
        sys.exit(3)


def answer(identifier: int, program: Program, command: str, arguments: dict[str, Any]) -> None:
    try:
        reply = {"ok": getattr(program, command)(**arguments)}
    except Exception as error:  # noqa: BLE001 - the test judges it
        reply = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps({"id": identifier} | reply) + "\n")
    sys.stdout.flush()


def serve_thread(program: Program, commands: queue.SimpleQueue[Any]) -> None:
    while True:
        answer(*commands.get())


def main() -> None:
    program = Program(sys.argv[1])
    threads: dict[str, queue.SimpleQueue[Any]] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        job = (request["id"], program, request["command"], request["arguments"])
        if request["thread"] is None:
            answer(*job)
            continue
        if request["thread"] not in threads:
            commands = threads[request["thread"]] = queue.SimpleQueue()
            threading.Thread(target=serve_thread, args=(program, commands), daemon=True).start()
        threads[request["thread"]].put(job)


if __name__ == "__main__":
    main()
