"""What clients ask, in the form of OpenAI's API: a field that would change the result is honoured or refused."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

HARMLESS = frozenset(
    {
        "metadata", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
        "store", "user",
    }
)  # fmt: skip
"""Fields that change nothing of the result."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Known fields that are not supported, each with the values that ask for nothing."""

UNSUPPORTED = "unsupported_parameter"
UNKNOWN = "unknown_parameter"
INVALID = "invalid_value"
MISSING = "missing_required_parameter"

MAX_CHOICES = 128
MAX_STOPS = 16


class ApiError(Exception):
    """What a client gets instead of an answer.

    Attributes
    ----------
    status : int
        Of HTTP.
    message : str
    param : str or None
        The field at fault.
    code : str or None
        For programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def as_dict(self) -> dict[str, Any]:
        """The body, in OpenAI's form."""
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _UnwantedFieldError(Exception):
    """A field that the request must not have. No ValueError: pydantic would lose which."""

    def __init__(self, field: str, message: str, code: str) -> None:
        super().__init__(message)
        self.field, self.code = field, code


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    """What a stream shall carry besides. Obfuscation, padding against eavesdroppers, is left out: that is harmless."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(_Strict):
    """What both kinds of requests have.

    Attributes
    ----------
    model : str
    temperature, top_p : float
    top_k : int
        0 or -1: all. Not OpenAI's, but usual.
    n : int
        Choices for each prompt.
    seed : int or None
    stop : list of str
    stream : bool
    stream_options : StreamOptions or None
    max_tokens : int or None
    ignore_eos : bool
        Go on after end tokens. Not OpenAI's, but usual.
    """

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: list[str] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_honoured(cls, values: Any) -> Any:
        """Leave out nulls, which mean defaults, and what is harmless; refuse what would be ignored."""
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if value is None or name in HARMLESS:
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name not in NEUTRAL:
                raise _UnwantedFieldError(name, f"the field {name!r} is not known here; leave it out", UNKNOWN)
            elif not any(_equal(value, neutral) for neutral in NEUTRAL[name]):
                raise _UnwantedFieldError(name, f"{name!r} is not supported; leave it out", UNSUPPORTED)
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if isinstance(stops, list) and "" in stops:
            raise ValueError("an empty string would stop everything")
        return stops

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise _UnwantedFieldError("stream_options", "'stream_options' needs 'stream': true", INVALID)
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def _equal(value: Any, neutral: Any) -> bool:
    """Equality of JSON values: 0 may be written as 0.0, but false is no number."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


class CompletionRequest(Request):
    """``POST /v1/completions``.

    Attributes
    ----------
    prompt : str, list of str, list of int, list of list of int
        One prompt, or several.
    echo : bool
        Whether an answer begins with its prompt.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        def ids(one: Any) -> bool:
            return isinstance(one, list) and all(type(token) is int for token in one)

        several = isinstance(value, list) and value and (
            all(isinstance(one, str) for one in value) or all(ids(one) for one in value)
        )  # fmt: skip
        if not (isinstance(value, str) or (ids(value) and value) or several):
            raise ValueError("a string, a list of strings, a list of token ids or a list of such lists is expected")
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(one, int) for one in self.prompt):
            return [[one for one in self.prompt if isinstance(one, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A turn of a chat. A developer's is what newer clients call a system's."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(Request):
    """``POST /v1/chat/completions``.

    Attributes
    ----------
    messages : list of ChatMessage
    max_completion_tokens : int or None
        The newer name of `max_tokens`.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _UnwantedFieldError(
                "max_tokens", "'max_tokens' and 'max_completion_tokens' differ; give the latter alone", INVALID
            )
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of an answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """The request in a body.

    Raises
    ------
    ApiError
        400, naming the field, if it is none.
    """
    try:
        return kind.model_validate_json(body)
    except _UnwantedFieldError as error:
        raise ApiError(400, str(error), param=error.field, code=error.code) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is no JSON: {first['msg']}", code="invalid_json") from None
        path = [str(step) for step in first["loc"]]
        if not path:
            raise ApiError(400, "the body must be a JSON object", code="invalid_json") from None
        field = path[0]
        message = f"{'.'.join(path)}: {first['msg'].removeprefix('Value error, ')}"
        code = MISSING if first["type"] == "missing" else INVALID
        raise ApiError(400, message, param=field, code=code) from None
