"""One request under way: its choices at the workers, and what comes of them, in the order in which it comes."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from shmroute.serving.crew import Crew, Outcome, Ticket
from shmroute.serving.messages import Begun, Failed, Finished, Job, Refused, Token
from shmroute.serving.protocol import ApiError, ChatRequest, CompletionRequest

DEFAULT_MAX_TOKENS = 16
"""Of a completion, as OpenAI has it. A chat's answer may fill the context."""

STOPPING = "the server is stopping"


@dataclass
class Choice:
    """One answer so far.

    Attributes
    ----------
    text : str
    finish_reason : str or None
    prompt_tokens, tokens : int
    """

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Progress:
    """What came of a choice.

    Attributes
    ----------
    index : int
    text : str
        Perhaps empty.
    finish_reason : str or None
    """

    index: int
    text: str
    finish_reason: str | None = None


@dataclass
class Completion:
    """A request under way.

    Attributes
    ----------
    choices : list of Choice
        Of the first prompt n, then of the second, and so on.
    """

    crew: Crew
    jobs: list[Job]
    n: int
    choices: list[Choice] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [Choice() for _ in self.jobs]
        self._outcomes: asyncio.Queue[tuple[int, Outcome | None]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        for index, job in enumerate(self.jobs):
            self._tickets.append(self.crew.submit(job, lambda outcome, i=index: self._put(i, outcome)))  # type: ignore[misc]

    def _put(self, index: int, outcome: Outcome) -> None:
        self._outcomes.put_nowait((index, outcome))

    async def progress(self) -> AsyncIterator[Progress]:
        """What comes of the choices, until all are finished.

        Raises
        ------
        ApiError
            If one cannot be finished; the others are cancelled.
        """
        left = len(self.jobs)
        try:
            while left:
                index, outcome = await self._outcomes.get()
                choice = self.choices[index]
                if outcome is None:
                    raise ApiError(503, STOPPING, code="stopping")
                if isinstance(outcome, Begun):
                    choice.prompt_tokens = outcome.prompt_tokens
                    choice.text += outcome.echo
                    yield Progress(index, outcome.echo)
                elif isinstance(outcome, Token):
                    choice.tokens += 1
                    choice.text += outcome.text
                    yield Progress(index, outcome.text)
                elif isinstance(outcome, Finished):
                    choice.finish_reason = outcome.reason
                    left -= 1
                    yield Progress(index, "", outcome.reason)
                elif isinstance(outcome, Refused):
                    raise ApiError(400, outcome.reason, param=outcome.param, code=outcome.code)
                elif isinstance(outcome, Failed):
                    raise ApiError(503 if outcome.retry else 500, outcome.reason, code="worker_failed")
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody wants what is not finished."""
        for ticket in self._tickets:
            self.crew.cancel(ticket)

    def cut_off(self) -> None:
        """Fail with what the server's end means for it."""
        self._outcomes.put_nowait((0, None))

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far; a prompt counts once, however many choices it has."""
        prompt = sum(choice.prompt_tokens for choice in self.choices[:: self.n])
        answers = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


def jobs_of(request: CompletionRequest | ChatRequest) -> list[Job]:
    """A job for each choice; those of one prompt differ in their seeds."""
    seed = secrets.randbits(63) if request.seed is None else request.seed
    shared: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": max(request.top_k, 0),
        "stop": request.stop,
        "ignore_eos": request.ignore_eos,
    }
    jobs = []
    if isinstance(request, ChatRequest):
        messages = [message.for_template() for message in request.messages]
        starts = [Job(number=0, messages=messages, max_tokens=request.limit, **shared)]
    else:
        limit = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        starts = [
            Job(
                number=0, prompt=prompt, echo=request.echo, max_tokens=limit, clip=request.max_tokens is None, **shared
            )
            for prompt in request.prompts
        ]  # fmt: skip
    for start in starts:
        jobs += [start.model_copy(update={"seed": _seed_of(seed, choice)}) for choice in range(request.n)]
    return jobs


def _seed_of(seed: int, choice: int) -> int:
    """A seed for each choice of a prompt. Equal prompts have equal ones."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=8).digest()) >> 1
