"""Other ways to hand a small message from one process to another, as far as they are installed.

An *endpoint* is what both processes need to know. It is made by the bench and handed to the other process at its
start. `sender` and `receiver` give functions: ``send(number)``, and ``receive(seconds)``, which waits and says whether
a message came. `remove` takes away whatever the endpoint left on the machine.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any, Protocol

import posix_ipc

from shmroute.runtime import Runtime
from shmroute.shared.bell import Semaphore, arm, disarm, ring, unlink_semaphore
from shmroute.shared.layout import HEADER_BELL
from shmroute.shared.ring import EMPTY, ring_has_work, ring_pop, ring_push
from shmroute.shared.segment import SHM, Segment, attach_segment

BUFFER = 64
"""Samples that iceoryx2 keeps for a subscriber; it drops the oldest of more, should the receiver lose its core."""

Send = Callable[[int], object]
Receive = Callable[[float], bool]


class Endpoint(Protocol):
    """See the file's head."""

    def sender(self) -> Send: ...
    def receiver(self) -> Receive: ...
    def remove(self) -> None: ...


class RingAndBell:
    """The package's own: a request in the ring, then the bell, as a worker does; popped as the pager does."""

    def __init__(self, runtime: Runtime) -> None:
        self._name = runtime.name

    def sender(self) -> Send:
        """Push, and wake the sleeper if there is one."""
        segment, semaphore = self._open()
        at, bits, bell = segment.address + segment.layout.ring, segment.layout.ring_bits, segment.address + HEADER_BELL

        def send(number: int) -> None:
            ring_push(at, bits, number)
            ring(bell, semaphore)

        return send

    def receiver(self) -> Receive:
        """Pop, or arm the bell, look again and sleep."""
        segment, semaphore = self._open()
        at, bits, bell = segment.address + segment.layout.ring, segment.layout.ring_bits, segment.address + HEADER_BELL

        def receive(seconds: float) -> bool:
            if ring_pop(at, bits) != EMPTY:
                return True
            arm(bell, 0)
            if not ring_has_work(at, bits):
                semaphore.sleep(seconds)
            disarm(bell)
            semaphore.drain()
            return bool(ring_pop(at, bits) != EMPTY)

        return receive

    def _open(self) -> tuple[Segment, Semaphore]:
        segment = attach_segment(self._name)
        self._open_segments = [*getattr(self, "_open_segments", []), segment]
        return segment, Semaphore(segment.semaphore_name(None))

    def __getstate__(self) -> dict[str, str]:
        return {"_name": self._name}

    def remove(self) -> None:
        """Unmap; the runtime that made the segment removes it."""
        for segment in getattr(self, "_open_segments", []):
            segment.close()


class BareSemaphore:
    """Nothing but a POSIX semaphore: the system call that every wake-up needs, and no message."""

    def __init__(self, name: str) -> None:
        self._name = f"shmroute-{name}-bare"
        Semaphore(self._name).close()

    def sender(self) -> Send:
        """Post."""
        semaphore = posix_ipc.Semaphore(f"/{self._name}")
        return lambda number: semaphore.release()

    def receiver(self) -> Receive:
        """Wait."""
        return Semaphore(self._name).sleep

    def remove(self) -> None:
        """Unlink it."""
        unlink_semaphore(self._name)


class MessageQueue:
    """A POSIX message queue of eight-byte messages."""

    def __init__(self, name: str) -> None:
        self._name = f"/shmroute-{name}-mq"
        posix_ipc.MessageQueue(self._name, posix_ipc.O_CREX, mode=0o600, max_messages=10, max_message_size=8).close()

    def sender(self) -> Send:
        """Send the number's bytes."""
        queue = posix_ipc.MessageQueue(self._name)
        return lambda number: queue.send(number.to_bytes(8, "little"))

    def receiver(self) -> Receive:
        """Receive some."""
        queue = posix_ipc.MessageQueue(self._name)

        def receive(seconds: float) -> bool:
            with suppress(posix_ipc.BusyError, posix_ipc.SignalError):
                queue.receive(seconds)
                return True
            return False

        return receive

    def remove(self) -> None:
        """Unlink it."""
        with suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_message_queue(self._name)


class StandardQueue:
    """``multiprocessing.Queue``: a pipe, a lock at either end, and a thread that feeds it."""

    def __init__(self, name: str) -> None:
        self._queue: Any = get_context("spawn").Queue()

    def sender(self) -> Send:
        """Put."""
        put: Send = self._queue.put
        return put

    def receiver(self) -> Receive:
        """Get."""

        def receive(seconds: float) -> bool:
            with suppress(Empty):
                self._queue.get(timeout=seconds)
                return True
            return False

        return receive

    def remove(self) -> None:
        """Close the pipe."""
        self._queue.close()


class StandardSimpleQueue:
    """``multiprocessing.SimpleQueue``: a pipe and two locks. Its `get` knows no timeout."""

    def __init__(self, name: str) -> None:
        self._queue: Any = get_context("spawn").SimpleQueue()

    def sender(self) -> Send:
        """Put."""
        put: Send = self._queue.put
        return put

    def receiver(self) -> Receive:
        """Get."""

        def receive(seconds: float) -> bool:
            self._queue.get()
            return True

        return receive

    def remove(self) -> None:
        """Close the pipe."""
        self._queue.close()


class ZeroMQ:
    """pyzmq, PUSH to PULL over ``ipc://``."""

    def __init__(self, name: str) -> None:
        importlib.import_module("zmq")
        self._folder = tempfile.mkdtemp(prefix="shmroute-bench-")
        self._opened: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_opened": []}

    def sender(self) -> Send:
        """Connect and send."""
        zmq = importlib.import_module("zmq")
        socket = self._open(zmq.PUSH)
        socket.connect(f"ipc://{self._folder}/socket")
        return lambda number: socket.send(number.to_bytes(8, "little"))

    def receiver(self) -> Receive:
        """Bind and receive."""
        zmq = importlib.import_module("zmq")
        socket = self._open(zmq.PULL)
        socket.bind(f"ipc://{self._folder}/socket")

        def receive(seconds: float) -> bool:
            socket.rcvtimeo = int(seconds * 1000)
            with suppress(zmq.Again):
                socket.recv()
                return True
            return False

        return receive

    def _open(self, kind: Any) -> Any:
        socket = importlib.import_module("zmq").Context.instance().socket(kind)
        socket.linger = 0
        self._opened.append(socket)
        return socket

    def remove(self) -> None:
        """Close sockets and remove their folder."""
        for socket in self._opened:
            socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class FasterFifo:
    """faster-fifo: a ring in shared memory behind a mutex, with pickled messages."""

    def __init__(self, name: str) -> None:
        module = importlib.import_module("faster_fifo")
        importlib.import_module("faster_fifo_reduction")  # teaches pickle to hand the queue to another process
        self._queue = module.Queue(100_000)

    def sender(self) -> Send:
        """Put."""
        put: Send = self._queue.put
        return put

    def receiver(self) -> Receive:
        """Get."""

        def receive(seconds: float) -> bool:
            with suppress(Empty):
                self._queue.get(timeout=seconds)
                return True
            return False

        return receive

    def remove(self) -> None:
        """Close it."""
        self._queue.close()


class Iceoryx2:
    """iceoryx2: an eight-byte sample published in shared memory, and an event that wakes the subscriber."""

    def __init__(self, name: str) -> None:
        importlib.import_module("iceoryx2")
        self._prefix = f"shmroute_{os.getpid()}_iox2_"
        self._folder = tempfile.mkdtemp(prefix="shmroute-bench-")
        self._kept: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_prefix": self._prefix, "_folder": self._folder, "_kept": []}

    def _services(self) -> tuple[Any, Any, Any]:
        iox2 = importlib.import_module("iceoryx2")
        iox2.set_log_level(iox2.LogLevel.Fatal)
        config = iox2.config.default()
        config.global_cfg.prefix = iox2.FileName.new(self._prefix)
        config.global_cfg.root_path = iox2.Path.new(self._folder)
        mode = iox2.SignalHandlingMode.Disabled
        node = iox2.NodeBuilder.new().config(config).signal_handling_mode(mode).create(iox2.ServiceType.Ipc)
        samples = node.service_builder(iox2.ServiceName.new("samples")).publish_subscribe(ctypes.c_uint64)
        samples = samples.subscriber_max_buffer_size(BUFFER)
        event = node.service_builder(iox2.ServiceName.new("event")).event()
        opened = samples.open_or_create(), event.open_or_create()
        self._kept += [node, *opened]
        return (iox2, *opened)

    def sender(self) -> Send:
        """Publish a sample, then notify."""
        _, samples, event = self._services()
        publisher = samples.publisher_builder().create()
        notifier = event.notifier_builder().create()
        self._kept += [publisher, notifier]

        def send(number: int) -> None:
            publisher.send_copy(ctypes.c_uint64(number))
            notifier.notify()

        return send

    def receiver(self) -> Receive:
        """Wait for an event, then take the sample."""
        iox2, samples, event = self._services()
        subscriber = samples.subscriber_builder().create()
        listener = event.listener_builder().create()
        self._kept += [subscriber, listener]
        duration = iox2.Duration.from_millis

        def receive(seconds: float) -> bool:
            sample = subscriber.receive()  # first: several notifications may have become one event
            if sample is None:
                listener.timed_wait(duration(int(seconds * 1000)))
                sample = subscriber.receive()
            if sample is None:
                return False
            sample.delete()
            return True

        return receive

    def remove(self) -> None:
        """Drop the ports, and remove the files that outlive the last node."""
        while self._kept:
            thing = self._kept.pop()
            with suppress(AttributeError):
                thing.delete()
        for path in SHM.glob(f"{self._prefix}*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(Path(self._folder), ignore_errors=True)


PEERS: dict[str, Callable[[str], Endpoint]] = {
    "posix_ipc semaphore alone, no message": BareSemaphore,
    "posix_ipc.MessageQueue": MessageQueue,
    "multiprocessing.SimpleQueue": StandardSimpleQueue,
    "multiprocessing.Queue": StandardQueue,
    "pyzmq PUSH/PULL over ipc": ZeroMQ,
    "faster-fifo": FasterFifo,
    "iceoryx2 publish/subscribe + event": Iceoryx2,
}
