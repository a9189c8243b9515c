"""The cache of machine code: an edited constant is never answered by stale code."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shmroute
from shmroute.routing.entry import call_route_into
from shmroute.routing.general import choose_generally
from shmroute.shared.atomic import COMPILED
from shmroute.shared.compilation import FRONT, compiling_elsewhere, in_order
from shmroute.shared.kernel import STAMP, _entries, cache_directory, collection_paused, kernel_count, load_kernels

pytestmark = pytest.mark.skipif(not COMPILED, reason="interpreted kernels have no cache")

PROGRAM = """
import json
import numpy as np
import shmroute
from shmroute.shared.kernel import STAMP, _entries, kernel_count, load_kernels
from shmroute.shared.layout import CONSTANTS, compiled_constants
from shmroute.shared.words import LAYER_BITS
said = []
compiled = load_kernels(lambda done, total, name: said.append(name))
print(json.dumps({
    "from": shmroute.__file__, "stamp": STAMP, "compiled": compiled, "constants": compiled_constants(),
    "python": CONSTANTS, "layer_bits": LAYER_BITS, "said": len(said), "kernels": kernel_count(),
    "found": sum(sum(dispatcher.stats.cache_hits.values()) for dispatcher, _ in _entries),
}))
"""


def run_copy(tree: Path) -> dict[str, str | int]:
    """Load a copied package's kernels in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(tree), "SHMROUTE_CACHE_DIR": str(tree / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tree, env=environment, check=True, capture_output=True, text=True
    )
    said: dict[str, str | int] = json.loads(done.stdout)
    assert Path(str(said["from"])).is_relative_to(tree)
    return said


@pytest.mark.timeout(400)  # it compiles all kernels, twice
def test_a_constant_edited_in_another_file_is_compiled_anew(tmp_path: Path) -> None:
    load_kernels()
    shutil.copytree(Path(shmroute.__file__).parent, tmp_path / "shmroute", ignore=shutil.ignore_patterns("__pycache__"))
    if (tmp_path / "shmroute" / "shared" / "words.py").read_bytes() == words_here():
        shutil.copytree(cache_directory(), tmp_path / "cache" / "kernels" / STAMP)  # spares one compilation

    before = run_copy(tmp_path)
    assert before["constants"] == before["python"]

    words = tmp_path / "shmroute" / "shared" / "words.py"
    words.write_text(words.read_text().replace("LAYER_BITS: Final = 10", "LAYER_BITS: Final = 9"))
    edited = run_copy(tmp_path)
    assert edited["layer_bits"] == 9
    assert edited["stamp"] != before["stamp"]
    assert edited["constants"] == edited["python"] != before["constants"]
    assert edited["compiled"] == edited["kernels"] > 0
    assert edited["said"] == int(edited["kernels"]) + 1
    assert (int(edited["found"]) > 0) == (len(os.sched_getaffinity(0)) > 1)  # then another process compiled those

    again = run_copy(tmp_path)
    assert again["constants"] == edited["constants"]
    assert again["compiled"] == again["said"] == 0
    assert again["found"] == again["kernels"]


def words_here() -> bytes:
    """The file that the test edits in its copy."""
    return (Path(shmroute.__file__).parent / "shared" / "words.py").read_bytes()


def test_a_process_beside_this_one_needs_a_second_core_and_ends_with_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHMROUTE_CACHE_DIR", str(tmp_path))
    kernels = [choose_generally, call_route_into]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with compiling_elsewhere(kernels) as process:
        assert process is not None
    assert process.returncode == -signal.SIGKILL
    with compiling_elsewhere(kernels[:1]) as process:
        assert process is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with compiling_elsewhere(kernels) as process:
        assert process is None


def test_a_process_beside_this_one_compiles_from_the_back_what_is_not_on_disk_by_then(tmp_path: Path) -> None:
    names = ["shmroute.shared.bell:arm", "shmroute.shared.bell:mark", "shmroute.shared.bell:arm"]
    command = [sys.executable, "-m", "shmroute.shared.compilation", *names]
    environment = os.environ | {"SHMROUTE_CACHE_DIR": str(tmp_path)}
    subprocess.run(command, env=environment, check=True)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert sorted(path.name.split("-")[0] for path in files) == ["bell.arm"] * 2 + ["bell.mark"] * 2
    subprocess.run(command, env=environment, check=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")} == files


@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_a_process_that_fails_or_is_killed_leaves_everything_to_this_one(tmp_path: Path, how: str) -> None:
    # It compiles a few kernels only, in place of all: which ones is not what matters here.
    command = {"fails": "[sys.executable, '-c', 'raise SystemExit(1)']", "is killed": "['sleep', '100']"}[how]
    program = f"""
import os, subprocess, sys
from shmroute.shared import bell, kernel
kernel._entries[:] = [one for one in kernel._entries if one[0].py_func.__module__ == "shmroute.shared.bell"]
os.sched_getaffinity = lambda pid: {{0, 1}}
started = subprocess.Popen
class Instead(started):
    def __init__(self, command, **options):
        super().__init__({command}, **options)
        if command[1:3] == ["-m", "shmroute.shared.compilation"] and {how!r} == "is killed":
            self.kill()
subprocess.Popen = Instead
print(kernel.load_kernels(), len(kernel._entries), sum(sum(d.stats.cache_hits.values()) for d, _ in kernel._entries))
"""
    environment = os.environ | {"SHMROUTE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    compiled, kernels, found = map(int, done.stdout.split())
    assert compiled == kernels > 1
    assert found == 0


def test_the_work_is_ordered_by_modules() -> None:
    load_kernels()
    ordered = [dispatcher.py_func.__module__ for dispatcher in in_order(dispatcher for dispatcher, _ in _entries)]
    assert len(ordered) == kernel_count()
    assert ordered[0] == "shmroute.routing.route"
    assert ordered[-1] == "shmroute.routing.general"
    assert set(FRONT) == set(ordered[: sum(module in FRONT for module in ordered)])
    pager = [i for i, module in enumerate(ordered) if module.startswith("shmroute.pager.")]
    assert pager == list(range(pager[0], len(ordered) - 1))


def test_kernels_that_are_loaded_are_not_compiled_again() -> None:
    load_kernels()
    assert load_kernels() == 0


def test_garbage_collection_goes_on_as_before_once_kernels_are_loaded() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collection_paused():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()
    gc.disable()
    try:
        load_kernels()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_cache_is_named_by_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHMROUTE_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path / "kernels" / STAMP
    monkeypatch.delenv("SHMROUTE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "shmroute" / "kernels" / STAMP


def test_a_cache_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file in the way")
    code = "import shmroute; shmroute.attach('absent')"
    environment = os.environ | {"SHMROUTE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"KernelCacheError: compiled kernels cannot be kept in {tmp_path}" in done.stderr
    assert "SHMROUTE_CACHE_DIR" in done.stderr
