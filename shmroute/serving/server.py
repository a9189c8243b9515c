"""The serving process: cache, pager, workers and HTTP put together, from the first to the second signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

import shmroute
from shmroute.config import RuntimeConfig
from shmroute.errors import ConfigError, ServingError
from shmroute.serving.app import Service, make_app
from shmroute.serving.crew import Crew
from shmroute.serving.metrics import ServerMetrics
from shmroute.serving.pager_keeper import PagerKeeper
from shmroute.sources.model_config import read_sizes

LAST_WORDS = 2
"""Seconds that responses which are complete, or were cut off, have to reach their clients."""


@dataclass(frozen=True)
class ServingSettings:
    """What to serve, and how.

    Attributes
    ----------
    checkpoint : Path
    name : str
        Of the segment.
    model : str
        As clients call it.
    host : str
    port : int
        0 for any that is free.
    workers : int
    threads : int
        Of each worker's matrix products.
    max_model_len : int
        Tokens of prompt and answer together.
    max_queue : int
        Choices that may wait for a worker.
    drain_timeout : float
        Seconds that requests under way have when the server is told to stop.
    chat_template : Path or None
    device, device_budget : str or None
        Of each worker; see `shmroute.integrations.transformers.load`.
    verbose : bool
        Whether each request gets a line.
    """

    checkpoint: Path
    name: str
    model: str
    host: str
    port: int
    workers: int
    threads: int
    max_model_len: int
    max_queue: int
    drain_timeout: float
    chat_template: Path | None
    device: str | None
    device_budget: str | None
    verbose: bool


def context_length(checkpoint: Path, wanted: int | None) -> int:
    """Tokens of prompt and answer together: `wanted`, or all that the model was made for.

    Raises
    ------
    CheckpointError
        If there is no config.json that can be read, or it says no sensible number.
    ConfigError
        If `wanted` is more than the model was made for, or needed.
    """
    path = str(checkpoint / "config.json")
    _, known = read_sizes(path)
    if known is None and wanted is None:
        raise ConfigError(f"{path} has no max_position_embeddings: give --max-model-len")
    if known is not None and wanted is not None and wanted > known:
        raise ConfigError(f"--max-model-len is {wanted}, but the model was made for {known} tokens: give at most that")
    length = known if wanted is None else wanted
    assert length is not None
    return length


def run_server(
    settings: ServingSettings, config: RuntimeConfig, tell: Callable[[str], None], watch: Callable[[int], None]
) -> int:
    """Serve until told to stop.

    Parameters
    ----------
    settings : ServingSettings
    config : RuntimeConfig
    tell : callable
        Gets a line at every event.
    watch : callable
        Gets the number of ready workers while they load.

    Returns
    -------
    int
        How many requests were cut off at the end.

    Raises
    ------
    ServingError
        If the address cannot be had, no worker comes up, or no pager any more.
    SegmentError, PagerStartError
        If the cache cannot be made.
    """
    with _bound(settings.host, settings.port) as listener, shmroute.create(settings.name, config) as runtime:
        keeper = PagerKeeper(runtime.name, tell)
        try:
            return asyncio.run(_Server(settings, runtime, keeper, tell).run(listener, watch))
        finally:
            runtime.close()  # the cache goes before its pager does
            keeper.close()


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with the address, which does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServingError(f"the host {host!r} is none to listen at: {error}") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except (OSError, OverflowError) as error:
            raise ServingError(_unavailable(host, port, error)) from error
        yield listener


def _unavailable(host: str, port: int, error: Exception) -> str:
    return f"cannot listen at {host} port {port}: {error}; choose another --port (0: any that is free)"


class _Server:
    """The asynchronous part."""

    def __init__(
        self, settings: ServingSettings, runtime: shmroute.Runtime, keeper: PagerKeeper, tell: Callable[[str], None]
    ) -> None:
        self._settings, self._runtime, self._keeper, self._tell = settings, runtime, keeper, tell
        command = [
            sys.executable, "-m", "shmroute.serving.worker", runtime.name,
            "--checkpoint", str(settings.checkpoint),
            "--threads", str(settings.threads),
            "--max-model-len", str(settings.max_model_len),
            *([] if settings.chat_template is None else ["--chat-template", str(settings.chat_template)]),
            *([] if settings.device is None else ["--device", settings.device]),
            *([] if settings.device_budget is None else ["--device-budget", settings.device_budget]),
        ]  # fmt: skip
        self._crew = Crew(command, settings.workers, settings.threads, tell)
        self._service = Service(
            crew=self._crew,
            metrics=ServerMetrics(self._crew, keeper, runtime),
            model=settings.model,
            max_model_len=settings.max_model_len,
            max_queue=settings.max_queue,
            log=tell if settings.verbose else lambda line: None,
        )

    async def run(self, listener: socket.socket, watch: Callable[[int], None]) -> int:
        """Load, serve, drain; how many requests were cut off."""
        with _Signals() as signals:
            async with self._crew.at_work():
                stopped = asyncio.ensure_future(signals.first.wait())
                broken = asyncio.ensure_future(self._broken())
                try:
                    if not await _before(self._crew.started(watch), stopped, broken):
                        self._tell("stopped before it was ready")
                        return 0
                    async with self._http(listener):
                        await _before(asyncio.Event().wait(), stopped, broken)
                        return await self._drain(signals, broken)
                finally:
                    for task in (stopped, broken):
                        task.cancel()
                    await asyncio.gather(stopped, broken, return_exceptions=True)

    async def _broken(self) -> None:
        """Wait until pager or workers cannot be kept at work, and raise why."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keeper.keep())
            group.create_task(self._crew.failure())

    @contextlib.asynccontextmanager
    async def _http(self, listener: socket.socket) -> AsyncIterator[None]:
        """Speak HTTP for the length of a block."""
        settings, config = self._settings, self._runtime.config
        try:
            listener.listen()
        except OSError as error:  # somebody else was bound to it too, and was faster
            raise ServingError(_unavailable(settings.host, settings.port, error)) from error
        server: Any = uvicorn.Server(
            uvicorn.Config(
                make_app(self._service), lifespan="off", access_log=False, log_level="warning",
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )  # fmt: skip
        server.capture_signals = contextlib.nullcontext  # they are this process's, which drains first
        serving = asyncio.create_task(server.serve([listener]))
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            experts = config.num_layers * config.num_experts
            self._tell(
                f"ready at http://{host}:{listener.getsockname()[1]}/v1 ({self._crew.ready} workers, "
                f"{config.slots} of {experts} experts in slots)"
            )
            yield
        finally:
            server.should_exit = True
            await serving

    async def _drain(self, signals: _Signals, broken: asyncio.Future[None]) -> int:
        """Let requests under way finish; how many could not."""
        service = self._service
        service.draining = True
        if service.unfinished:
            self._tell(f"stopping when {service.unfinished} requests are finished (signal again to stop at once)")
        enough: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(one.wait()) for one in (service.emptied, signals.second)
        ]
        await asyncio.wait([*enough, broken], timeout=self._settings.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        for future in enough:
            future.cancel()
        unfinished = service.unfinished
        if unfinished:
            service.cut_off()
            self._tell(f"{unfinished} requests were cut off")
        else:
            self._tell("stopped")
        return unfinished


class _Signals:
    """SIGTERM, SIGINT and SIGHUP, for the length of a block.

    Attributes
    ----------
    first, second : asyncio.Event
    """

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self._numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._numbers.append(signal.SIGHUP)

    def __enter__(self) -> _Signals:
        for number in self._numbers:
            asyncio.get_running_loop().add_signal_handler(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._numbers:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _handle(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _before(work: Any, stopped: asyncio.Future[Any], broken: asyncio.Future[None]) -> bool:
    """Whether `work` ended before the server was told to stop; it is cancelled otherwise.

    Raises
    ------
    ServingError
        If `work` did, or what serves is broken.
    """
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, stopped, broken}, return_when=asyncio.FIRST_COMPLETED)
        if broken.done():
            _reraise(broken)
        if working.done():
            working.result()
            return True
        return False
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def _reraise(broken: asyncio.Future[None]) -> None:
    """The error itself, out of the group that its task was in."""
    try:
        broken.result()
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
