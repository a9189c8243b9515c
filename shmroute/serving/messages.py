"""What the serving process and a worker say to each other: one JSON object a line over a pair of sockets.

To a worker: a `Job`, later perhaps `Cancel` for it. From a worker: `Ready` once, or `Unable`; then for each job either
`Refused` alone, or `Begun`, a `Token` for each token and `Finished`, or at any time `Failed`. The end of the stream is
the other side's death, whatever it had said.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Message(BaseModel):
    """One line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def line(self) -> bytes:
        """The message as it is sent."""
        return self.model_dump_json().encode() + b"\n"


class Job(Message):
    """One choice to generate.

    Attributes
    ----------
    number : int
        Which every answer repeats.
    prompt : str, list of int or None
        Text, or token ids; None if there are `messages`.
    messages : list of dict or None
        A chat, for the chat template.
    echo : bool
        Whether `Begun` shall carry the prompt's text.
    max_tokens : int or None
        None for as many as there is room for.
    clip : bool
        Whether `max_tokens` is nobody's wish, and may be cut to what there is room for.
    temperature, top_p : float
    top_k : int
        0 for all.
    seed : int
        Of this choice: the same one gives the same tokens.
    stop : list of str
    ignore_eos : bool
    generated : list of int
        What another worker had generated before it died: to be continued, not to be sent again.
    """

    kind: Literal["job"] = "job"
    number: int
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    echo: bool = False
    max_tokens: int | None = None
    clip: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: list[str] = []
    ignore_eos: bool = False
    generated: list[int] = []


class Cancel(Message):
    """Nobody wants the rest; the worker says `Finished` as soon as it sees this."""

    kind: Literal["cancel"] = "cancel"
    number: int


class Ready(Message):
    """The model is loaded.

    Attributes
    ----------
    chats : bool
        Whether there is a chat template.
    """

    kind: Literal["ready"] = "ready"
    chats: bool


class Unable(Message):
    """The model cannot be loaded, and another try would not help."""

    kind: Literal["unable"] = "unable"
    reason: str


class Begun(Message):
    """The prompt is accepted."""

    kind: Literal["begun"] = "begun"
    number: int
    prompt_tokens: int
    echo: str = ""


class Token(Message):
    """One more token, and the text that it completes: none while a character or a stop string may be unfinished."""

    kind: Literal["token"] = "token"
    number: int
    token: int
    text: str


class Finished(Message):
    """The end of a job."""

    kind: Literal["finished"] = "finished"
    number: int
    reason: Literal["stop", "length", "cancelled"]


class Refused(Message):
    """The request is wrong: not what another worker would do better."""

    kind: Literal["refused"] = "refused"
    number: int
    reason: str
    param: str
    code: str


class Failed(Message):
    """This worker could not go on with the job.

    Attributes
    ----------
    retry : bool
        Whether it may be worth another try.
    """

    kind: Literal["failed"] = "failed"
    number: int
    reason: str
    retry: bool


FromWorker = Ready | Unable | Begun | Token | Finished | Refused | Failed
ToWorker = Job | Cancel

from_worker: TypeAdapter[FromWorker] = TypeAdapter(Annotated[FromWorker, Field(discriminator="kind")])
to_worker: TypeAdapter[ToWorker] = TypeAdapter(Annotated[ToWorker, Field(discriminator="kind")])
