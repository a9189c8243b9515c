"""``examples/generate.py`` runs as the README shows it, in several processes at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from shmroute.shared.segment import segment_path

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "tiny-mixtral"


def test_the_example_generates_in_two_processes() -> None:
    name = f"test-generate-{os.getpid()}"
    shmroute = Path(sys.executable).with_name("shmroute")
    command = [shmroute, "pager", CHECKPOINT, "--name", name, "--budget", "50%"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as pager:
        assert pager.stderr is not None
        while "serving" not in (line := pager.stderr.readline()):
            assert line, "the pager ended before it served"
        prompts = ("In the beginning", "def main(")
        processes = [
            subprocess.Popen(
                [sys.executable, ROOT / "examples" / "generate.py", CHECKPOINT, name, prompt],
                stdout=subprocess.PIPE, text=True,
            )
            for prompt in prompts
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in processes]
        pager.send_signal(signal.SIGINT)
        assert pager.wait() == 0
    for prompt, output, process in zip(prompts, outputs, processes, strict=True):
        assert process.returncode == 0
        assert output.startswith(prompt)
        assert re.search(r"hit rate of all processes so far: 0\.\d{3}", output)
    assert not segment_path(name).exists()
