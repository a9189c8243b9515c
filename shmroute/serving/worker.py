"""``python -m shmroute.serving.worker``: one worker of ``shmroute serve``.

Attaches to the cache, loads the model, and does one job at a time, which come over the socket that it inherits. The
end of that socket, the server's death included, ends it at once, whatever it is doing.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import warnings
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import transformers

import shmroute
from shmroute.errors import CheckpointError, ExpertTimeout, PagerUnavailable, ShmrouteError, SmallBudgetWarning
from shmroute.integrations.transformers import load
from shmroute.serving.generation import Generator, RefusalError
from shmroute.serving.messages import Cancel, Failed, FromWorker, Job, Ready, Refused, Unable, to_worker

EXPERT_TIMEOUT = 60.0
"""Seconds to wait for an expert: longer than it takes to start a new pager."""


class Channel:
    """The socket to the server: jobs queue up, cancellations are seen while one is done."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._cancelled = -1
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                message = to_worker.validate_json(line)
                if isinstance(message, Cancel):
                    self._cancelled = message.number
                else:
                    self._jobs.put(message)
        os._exit(0)  # the lane is reaped: a worker may die at any instruction

    def next_job(self) -> Job:
        """Wait for the next one."""
        return self._jobs.get()

    def cancelled(self, job: Job) -> bool:
        """Whether nobody wants this job's rest."""
        return self._cancelled == job.number

    def send(self, message: FromWorker) -> None:
        """Send to the server; ends this process if that is gone."""
        try:
            self._socket.sendall(message.line())
        except OSError:
            os._exit(0)


def load_tokenizer(checkpoint: Path, chat_template: Path | None) -> Any:
    """The checkpoint's tokenizer, with another chat template if one is given.

    Raises
    ------
    CheckpointError
        If there is none that can be read.
    """
    try:
        if (checkpoint / "tokenizer_config.json").exists() or not (checkpoint / "tokenizer.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(checkpoint), local_files_only=True)
        else:
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    except Exception as error:  # whatever a file can make a parser raise
        raise CheckpointError(str(checkpoint), f"the tokenizer cannot be loaded: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    return tokenizer


def work(channel: Channel, generator: Generator) -> None:
    """Do jobs for ever."""
    while True:
        job = channel.next_job()
        try:
            for message in generator.answer(job, lambda job=job: channel.cancelled(job)):  # type: ignore[misc]
                channel.send(message)
        except RefusalError as error:
            channel.send(Refused(number=job.number, reason=str(error), param=error.param, code=error.code))
        except ShmrouteError as error:
            channel.send(
                Failed(
                    number=job.number,
                    reason=f"{type(error).__name__}: {error}",
                    retry=isinstance(error, PagerUnavailable | ExpertTimeout),
                )
            )


def main() -> int:
    """Attach, load, work."""
    parser = argparse.ArgumentParser(prog="python -m shmroute.serving.worker")
    parser.add_argument("name", help="of the runtime")
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--descriptor", required=True, type=int, help="of the socket to the server")
    parser.add_argument("--threads", required=True, type=int)
    parser.add_argument("--max-model-len", required=True, type=int)
    parser.add_argument("--chat-template", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--device-budget")
    arguments = parser.parse_args()
    channel = Channel(arguments.descriptor)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", SmallBudgetWarning)  # the server has said it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with shmroute.attach(arguments.name) as runtime:
        try:
            model = load(
                arguments.checkpoint, runtime, timeout=EXPERT_TIMEOUT, device=arguments.device,
                device_budget=arguments.device_budget,
            )  # fmt: skip
            tokenizer = load_tokenizer(arguments.checkpoint, arguments.chat_template)
        except ShmrouteError as error:
            channel.send(Unable(reason=f"{type(error).__name__}: {error}"))
            return 1
        channel.send(Ready(chats=tokenizer.chat_template is not None))
        work(channel, Generator(model, tokenizer, arguments.max_model_len))
    return 0


if __name__ == "__main__":
    sys.exit(main())
