"""One job turned into tokens: prompt, prefill, then one token a step. In workers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import torch
from transformers import DynamicCache

from shmroute.serving.answer_text import AnswerText
from shmroute.serving.messages import Begun, Finished, FromWorker, Job, Token
from shmroute.serving.sampling import Sampler

PREFILL = 256
"""Tokens of a prompt in one forward pass: after each, a cancellation is seen."""


class RefusalError(Exception):
    """The request is wrong.

    Attributes
    ----------
    param : str
        The field at fault.
    code : str
        For programs.
    """

    def __init__(self, message: str, param: str, code: str) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class Generator:
    """A model and its tokenizer, for one job after another.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, on whatever device.
    tokenizer : PreTrainedTokenizerBase
    max_model_len : int
        Tokens of prompt and answer together.
    """

    def __init__(self, model: Any, tokenizer: Any, max_model_len: int) -> None:
        self._model, self._tokenizer, self._max_model_len = model, tokenizer, max_model_len
        eos = model.generation_config.eos_token_id
        self._eos = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)

    def answer(self, job: Job, cancelled: Callable[[], bool]) -> Iterator[FromWorker]:
        """`Begun`, a `Token` for each new one, `Finished`.

        Parameters
        ----------
        job : Job
        cancelled : callable
            Asked before each step.

        Raises
        ------
        RefusalError
            Before anything is yielded.
        ShmrouteError
            As a forward pass of the model.
        """
        prompt = self._prompt(job)
        text = AnswerText(
            self._decode, prompt, job.stop, frozenset() if job.ignore_eos else self._eos, self._max_tokens(job, prompt)
        )
        echo = ""
        if job.echo:
            echo = job.prompt if isinstance(job.prompt, str) else self._decode(prompt)
        yield Begun(number=job.number, prompt_tokens=len(prompt), echo=echo)
        for token in job.generated:
            text.add(token)
        tokens = list(job.generated)
        sampler, cache = Sampler(job), DynamicCache(config=self._model.config)
        feed = prompt + tokens
        while text.ended is None:
            logits = None
            for start in range(0, len(feed), PREFILL):
                if cancelled():
                    yield Finished(number=job.number, reason="cancelled")
                    return
                logits = self._forward(feed[start : start + PREFILL], cache)
            assert logits is not None
            token = sampler.choose(logits, len(tokens))
            tokens.append(token)
            feed = [token]
            yield Token(number=job.number, token=token, text=text.add(token))
        yield Finished(number=job.number, reason=text.ended)

    @torch.inference_mode()
    def _forward(self, tokens: list[int], cache: DynamicCache) -> torch.Tensor:
        """Logits float32 [V] after the last of some tokens."""
        ids = torch.tensor([tokens], device=self._model.device)
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1].float().cpu()
        return logits

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _prompt(self, job: Job) -> list[int]:
        """The prompt's token ids; at least one."""
        param = "prompt" if job.messages is None else "messages"
        if job.messages is not None:
            try:
                chat = self._tokenizer.apply_chat_template(job.messages, tokenize=False, add_generation_prompt=True)
            except jinja2.TemplateError as error:
                raise RefusalError(
                    f"the model's chat template refuses this: {error}", param, "invalid_value"
                ) from error
            tokens = self._tokenizer(chat, add_special_tokens=False).input_ids  # the template has written them
        elif isinstance(job.prompt, str):
            tokens = self._tokenizer(job.prompt).input_ids
        else:
            tokens = list(job.prompt or [])
        if not tokens:
            raise RefusalError("the prompt has no tokens; give at least one", param, "invalid_value")
        vocabulary = self._model.config.get_text_config().vocab_size
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise RefusalError(
                    f"the prompt has the token {token}, but the model's tokens are 0 to {vocabulary - 1}",
                    param, "invalid_value",
                )  # fmt: skip
        return list(tokens)

    def _max_tokens(self, job: Job, prompt: list[int]) -> int:
        room = self._max_model_len - len(prompt)
        wanted = job.max_tokens
        if room < 1 or (wanted is not None and wanted > room and not job.clip):
            asked = "at least 1" if wanted is None or job.clip else wanted
            raise RefusalError(
                f"the context holds {self._max_model_len} tokens, but the prompt has {len(prompt)} and {asked} were "
                f"asked for in answer: shorten the prompt, or ask for fewer",
                "prompt" if job.messages is None else "messages",
                "context_length_exceeded",
            )
        return room if wanted is None else min(wanted, room)
