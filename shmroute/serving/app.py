"""The HTTP routes: OpenAI's for models, completions and chats, besides health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from shmroute.serving.completion import STOPPING, Completion, Progress, jobs_of
from shmroute.serving.crew import Crew
from shmroute.serving.metrics import ServerMetrics
from shmroute.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse
from shmroute.serving.responses import LAST_EVENT, ChatForm, CompletionForm, Response, event

MAX_BODY = 16 << 20
"""Bytes of a request."""

T = TypeVar("T")


@dataclass
class Service:
    """What the routes serve.

    Attributes
    ----------
    crew : Crew
    metrics : ServerMetrics
    model : str
        The name that clients must use.
    max_model_len : int
    max_queue : int
        Choices that may wait for a worker.
    log : callable
        Gets a line for each request.
    draining : bool
        Whether new requests are turned away.
    created : int
        When, in seconds since 1970.
    """

    crew: Crew
    metrics: ServerMetrics
    model: str
    max_model_len: int
    max_queue: int
    log: Callable[[str], None]
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._completions: dict[int, Completion] = {}
        self.emptied = asyncio.Event()
        self.emptied.set()

    # ---------------------------------------------------------- admission

    def begin(self, request: CompletionRequest | ChatRequest) -> Completion:
        """Give a request's choices to the crew.

        Raises
        ------
        ApiError
            If it is for another model, cannot be done here, or there is no room for it now.
        """
        if request.model != self.model:
            raise ApiError(
                404, f"the model {request.model!r} is not served here; {self.model!r} is",
                param="model", code="model_not_found",
            )  # fmt: skip
        if self.draining:
            raise ApiError(503, STOPPING, code="stopping")
        if isinstance(request, ChatRequest) and self.crew.ready and not self.crew.chats:
            raise ApiError(
                400,
                "this model has no chat template: start the server with --chat-template FILE "
                "(examples/chat-template.jinja is a plain one), or use /v1/completions",
                param="messages", code="no_chat_template",
            )  # fmt: skip
        jobs = jobs_of(request)
        crew = self.crew
        if len(jobs) > crew.count + self.max_queue:
            raise ApiError(
                400,
                f"{len(jobs)} answers were asked for at once, but there are {crew.count} workers and a queue of "
                f"{self.max_queue}",
                param="n", code="invalid_value",
            )  # fmt: skip
        if crew.waiting + len(jobs) - crew.idle > self.max_queue:
            raise ApiError(
                429, f"{crew.waiting} answers wait for a worker already, and {self.max_queue} may; try again later",
                code="queue_full",
            )  # fmt: skip
        completion = Completion(crew, jobs, request.n)
        self._completions[id(completion)] = completion
        self.emptied.clear()
        return completion

    def end(self, completion: Completion) -> None:
        """It is finished, or nobody wants it any more."""
        completion.cancel()
        self._completions.pop(id(completion), None)
        if not self._completions:
            self.emptied.set()

    @property
    def unfinished(self) -> int:
        """Requests under way."""
        return len(self._completions)

    def cut_off(self) -> None:
        """Fail what is under way."""
        for completion in self._completions.values():
            completion.cut_off()


class _Exchange:
    """One request from its admission to its end, which is recorded once."""

    def __init__(self, service: Service, route: str, completion: Completion) -> None:
        self._service, self._route = service, route
        self.completion = completion
        self._began = time.monotonic()
        self._answered = False

    async def progress(self) -> AsyncIterator[Progress]:
        """As the completion's; sees the first token."""
        async for progress in self.completion.progress():
            if not self._answered and any(choice.tokens for choice in self.completion.choices):
                self._answered = True
                self._service.metrics.first_token(time.monotonic() - self._began)
            yield progress

    def end(self, status: int | str) -> None:
        """Record how it ended."""
        self._service.end(self.completion)
        seconds, usage = time.monotonic() - self._began, self.completion.usage
        self._service.metrics.done(self._route, status, usage, seconds)
        self._service.log(
            f"{self._route} {status}: {usage['prompt_tokens']} + {usage['completion_tokens']} tokens in {seconds:.2f} s"
        )


def make_app(service: Service) -> Any:
    """The application.

    Parameters
    ----------
    service : Service

    Returns
    -------
    starlette.applications.Starlette
    """

    async def completions(request: Request) -> Any:
        asked = parse(CompletionRequest, await _body(request))
        return await _answer(service, request, asked, CompletionForm())

    async def chat_completions(request: Request) -> Any:
        asked = parse(ChatRequest, await _body(request))
        return await _answer(service, request, asked, ChatForm())

    def described() -> dict[str, Any]:
        return {
            "id": service.model,
            "object": "model",
            "created": service.created,
            "owned_by": "shmroute",
            "max_model_len": service.max_model_len,
        }

    async def models(request: Request) -> Any:
        return JSONResponse({"object": "list", "data": [described()]})

    async def model(request: Request) -> Any:
        name = request.path_params["name"]
        if name != service.model:
            raise ApiError(
                404, f"the model {name!r} is not served here; {service.model!r} is", param="model",
                code="model_not_found",
            )  # fmt: skip
        return JSONResponse(described())

    async def health(request: Request) -> Any:
        status = "stopping" if service.draining else "ok" if service.crew.ready else "no worker is ready"
        content = {"status": status, "workers": service.crew.ready, "of": service.crew.count}
        return JSONResponse(content, 200 if status == "ok" else 503)

    async def metrics(request: Request) -> Any:
        return HttpResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )


async def _api_error(request: Request, error: ApiError) -> Any:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.as_dict(), error.status, headers=headers)


async def _http_error(request: Request, error: HTTPException) -> Any:
    details = {
        404: f"there is no {request.url.path} here",
        405: f"{request.method} is not what {request.url.path} takes",
    }
    message = details.get(error.status_code, str(error.detail))
    content = ApiError(error.status_code, message, code="unknown_url" if error.status_code == 404 else None)
    return JSONResponse(content.as_dict(), error.status_code, headers=error.headers)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"a request may have {MAX_BODY} bytes", code="too_large")
    return bytes(body)


# ------------------------------------------------------------------ answers


async def _answer(
    service: Service, request: Request, asked: CompletionRequest | ChatRequest, form: CompletionForm | ChatForm
) -> Any:
    exchange = _Exchange(service, request.url.path, service.begin(asked))
    response = Response(form, asked.model, asked.include_usage)
    progress = exchange.progress()
    status: int | str | None = "disconnected"
    try:
        if not asked.stream:
            await _unless_gone(request, _exhaust(progress))
            status = 200
            return JSONResponse(response.whole(exchange.completion.choices, exchange.completion.usage))
        # What is refused is refused before the stream begins, and so with the status of an error.
        first = await _unless_gone(request, anext(progress))
        status = None
        return _Stream(exchange, first, progress, response, asked.include_usage)
    except ApiError as error:
        status = error.status
        raise
    except ClientDisconnect:
        return HttpResponse(status_code=499)  # nobody reads it
    finally:
        if status is not None:
            exchange.end(status)  # else the stream will


async def _exhaust(progress: AsyncIterator[Progress]) -> None:
    async for _ in progress:
        pass


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled if the client goes away.

    Raises
    ------
    ClientDisconnect
        If it does.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream:
    """The response to a request that streams, as an ASGI application; its end, however it comes, ends the request."""

    def __init__(
        self,
        exchange: _Exchange,
        first: Progress,
        rest: AsyncIterator[Progress],
        response: Response,
        include_usage: bool,
    ) -> None:
        self._exchange, self._first, self._rest = exchange, first, rest
        self._response, self._include_usage = response, include_usage
        self._status = "disconnected"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            stream = StreamingResponse(
                self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
            await stream(scope, receive, send)
        finally:
            self._exchange.end(self._status)

    async def _events(self) -> AsyncIterator[str]:
        opened: set[int] = set()
        try:
            async for progress in self._all():
                if progress.index not in opened:
                    opened.add(progress.index)
                    opening = self._response.form.opening(progress.index)
                    if opening is not None:
                        yield event(self._response.chunk(opening))
                for piece in self._response.form.pieces(progress):
                    yield event(self._response.chunk(piece))
        except ApiError as error:
            self._status = f"stream {error.status}"
            yield event(error.as_dict())
            return
        if self._include_usage:
            yield event(self._response.usage_chunk(self._exchange.completion.usage))
        self._status = "stream 200"
        yield LAST_EVENT

    async def _all(self) -> AsyncIterator[Progress]:
        yield self._first
        async for progress in self._rest:
            yield progress
