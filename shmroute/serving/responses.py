"""Answers in the form of OpenAI's API: whole, and as the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from shmroute.serving.completion import Choice, Progress

LAST_EVENT = "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class CompletionForm:
    """Of ``/v1/completions``."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished answer."""
        return {"index": index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of an answer before its first text."""
        return None

    def pieces(self, progress: Progress) -> list[dict[str, Any]]:
        """What a stream says when an answer has grown."""
        if not progress.text and progress.finish_reason is None:
            return []
        return [
            {
                "index": progress.index,
                "text": progress.text,
                "logprobs": None,
                "finish_reason": progress.finish_reason,
            }
        ]


class ChatForm:
    """Of ``/v1/chat/completions``."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """A finished answer."""
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of an answer before its first text."""
        return self._piece(index, {"role": "assistant", "content": ""}, None)

    def pieces(self, progress: Progress) -> list[dict[str, Any]]:
        """What a stream says when an answer has grown."""
        if progress.finish_reason is not None:
            return [self._piece(progress.index, {}, progress.finish_reason)]
        return [self._piece(progress.index, {"content": progress.text}, None)] if progress.text else []

    def _piece(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class Response:
    """One response, whole or in chunks that share its id.

    Parameters
    ----------
    form : CompletionForm or ChatForm
    model : str
        As the client called it.
    include_usage : bool
        Whether each chunk of a stream has the key: null in all but the last.
    """

    def __init__(self, form: CompletionForm | ChatForm, model: str, include_usage: bool) -> None:
        self.form = form
        self._usage = {"usage": None} if include_usage else {}
        self._head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """All of it."""
        answers = [self.form.choice(index, choice) for index, choice in enumerate(choices)]
        return self._head | {"object": self.form.whole, "choices": answers, "usage": usage}

    def chunk(self, piece: dict[str, Any]) -> dict[str, Any]:
        """One piece of one choice."""
        return self._head | {"object": self.form.chunk, "choices": [piece]} | self._usage

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream whose client wants to know."""
        return self._head | {"object": self.form.chunk, "choices": [], "usage": usage}
