"""A real ``shmroute serve`` and what tests ask of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai

PATIENCE = 100.0
"""After this many seconds something that must happen never will."""


def eventually(condition):
    """Wait until something holds; what it gave."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
    return result


class Server:
    """A running ``shmroute serve``, whose messages go to a file."""

    def __init__(self, checkpoint: Path, log: Path, *options: str) -> None:
        self._log = log
        self.name = f"test-serve-{os.getpid()}-{log.stem}"
        command = [
            sys.executable,
            "-m",
            "shmroute",
            "serve",
            str(checkpoint),
            "--name",
            self.name,
            "--threads",
            "1",
            *options,
        ]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=file, env=os.environ | {"COLUMNS": "400"})

    @property
    def messages(self) -> str:
        return self._log.read_text()

    def says(self, pattern: str) -> re.Match[str]:
        """Wait for a message."""
        eventually(lambda: re.search(pattern, self.messages) or self.process.poll() is not None)
        match = re.search(pattern, self.messages)
        assert match, f"ended with code {self.process.returncode}: {self.messages}"
        return match

    @property
    def url(self) -> str:
        return self.says(r"ready at (http://\S+)/v1")[1]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE)

    def post(self, path: str, content: object) -> httpx.Response:
        if isinstance(content, bytes):
            return httpx.post(self.url + path, content=content, timeout=PATIENCE)
        return httpx.post(self.url + path, json=content, timeout=PATIENCE)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        match = re.search(rf"^{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert match, f"there is no {name}"
        return float(match[1])

    def children(self, module: str) -> list[int]:
        """Processes that this one started with a module."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if status[1] == str(self.process.pid) and status[0] != "Z":
                    found += [int(folder.name)] * (module in (folder / "cmdline").read_text().split("\0"))
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        """See that it ends, whatever a test has left it doing."""
        if self.process.poll() is None:
            for _ in range(2):
                self.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE)


def streamed(stream) -> str:
    """All text of a stream of completions."""
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
