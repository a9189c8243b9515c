"""The README's examples run as they stand, and say what the README says they do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shmroute.shared.segment import segment_path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SHMROUTE = Path(sys.executable).with_name("shmroute")


@pytest.mark.parametrize("example", ["generate.py", "quickstart.py"])
def test_the_readme_shows_the_example_as_it_is(example: str) -> None:
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert (EXAMPLES / example).read_text() in shown


def test_the_quickstart_runs() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "quickstart.py"], capture_output=True, text=True, check=True)
    assert re.search(r"hit rate 0\.\d\d, \d+ loads; layer 0 has \[", done.stdout)


def test_a_pager_in_one_terminal_serves_workers_in_another() -> None:
    name = f"test-terminals-{os.getpid()}"
    command = [SHMROUTE, "pager", EXAMPLES / "tiny-mixtral", "--name", name, "--budget", "50%"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as pager:
        assert pager.stderr is not None
        while "serving" not in (line := pager.stderr.readline()):
            assert line, "the pager ended before it served"
        workers = [
            subprocess.Popen([sys.executable, EXAMPLES / "worker.py", name, domain], stdout=subprocess.PIPE, text=True)
            for domain in ("kjv", "python")
        ]
        outputs = [worker.communicate()[0] for worker in workers]
        pager.send_signal(signal.SIGINT)
        assert pager.wait() == 0
    assert [worker.returncode for worker in workers] == [0, 0]
    assert all("176 tokens of" in output for output in outputs)
    assert not segment_path(name).exists()
