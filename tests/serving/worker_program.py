"""``worker_program.py FOLDER --descriptor N``: speaks as a worker does, without a model; a prompt says what to do.

``TOKENS [COMMAND AT [TIMES]]``: give so many tokens; at that token ``die``, ``retry``, ``fail``, ``refuse`` or ``wait``
(until cancelled). With TIMES the command is obeyed only so often, counted by files in FOLDER, by all workers together.
If FOLDER has a file ``unable``, ``mute`` or ``crash``, it fails to start in that way.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from shmroute.serving.messages import Begun, Failed, Finished, Ready, Refused, Token, Unable, to_worker

folder, channel = Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[3]))
lines = channel.makefile("rb")


def send(message):
    channel.sendall(message.line())


def once_more(command, times):
    """Whether a command is to be obeyed still."""
    for turn in range(times):
        try:
            (folder / f"{command}-{turn}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def work(job):
    count, command, at, times = (job.prompt.split() + ["none", "0", "1000"][len(job.prompt.split()) - 1 :])[:4]
    number = job.number
    if command == "refuse":
        return send(Refused(number=number, reason="no", param="prompt", code="invalid_value"))
    send(Begun(number=number, prompt_tokens=3, echo=job.prompt if job.echo else ""))
    for token in range(len(job.generated), int(count)):
        if command != "none" and token == int(at) and once_more(command, int(times)):
            if command == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if command == "wait":
                cancel = to_worker.validate_json(lines.readline())
                assert cancel.number == number
                return send(Finished(number=number, reason="cancelled"))
            return send(Failed(number=number, reason=f"{command} was wanted", retry=command == "retry"))
        send(Token(number=number, token=token, text=f"{token},"))
    return send(Finished(number=number, reason="length"))


if (folder / "unable").exists():
    send(Unable(reason="wanted to be unable"))
    sys.exit(1)
if (folder / "crash").exists():
    sys.exit(3)
send(Ready(chats=True))
for line in lines:
    message = to_worker.validate_json(line)
    if message.kind == "job":
        (folder / f"job-{message.number}-of-{os.getpid()}").touch()
        work(message)
