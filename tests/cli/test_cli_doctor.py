"""`shmroute doctor`: each check on a machine that is in order, and on one that is not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_programs import companions

from shmroute.cli import checks, self_check
from shmroute.cli.checks import check_remove_ipc, removes_ipc
from shmroute.shared.kernel import STAMP
from shmroute.shared.removal import orphans
from shmroute.shared.segment import segment_path

# The package's attribute of that name is the command, not its module.
doctor = importlib.import_module("shmroute.cli.doctor")


@pytest.fixture
def alone(monkeypatch, name):
    """Let the doctor see this test's segment only: another run's may be abandoned on purpose just now."""
    survey, cache = doctor.survey, doctor.check_cache
    monkeypatch.setattr(doctor, "survey", lambda: [one for one in survey() if one.name == name])
    monkeypatch.setattr(doctor, "check_cache", lambda fix: cache(False))
    monkeypatch.setattr(doctor, "orphans", list)
    monkeypatch.setattr(doctor, "unlink_orphans", list)


def findings(result):
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_every_check_is_made(cli, alone):
    found = findings(cli("doctor", "--json"))
    assert found.keys() == {
        "system", "cpu", "/dev/shm", "creating", "semaphores", "pidfd_open", "pid namespace", "descriptors",
        "RemoveIPC", "kernels", "atomics", "kernel cache", "segments", "orphans",
    }  # fmt: skip
    for name in ("system", "creating", "semaphores", "pidfd_open", "atomics", "segments", "orphans"):
        assert (found[name]["status"], found[name]["remedy"]) == ("ok", "")
    assert not list(Path("/dev/shm").glob("*shmroute-doctor*"))


def test_a_leftover_segment_is_found_and_fixed(cli, alone, leftover, name):
    result = cli("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    found = findings(result)["segments"]
    assert (found["status"], name in found["detail"]) == ("problem", True)
    assert "--fix" in found["remedy"]
    assert segment_path(name).exists(), "looking must not remove"
    fixed = cli("doctor", "--fix")
    assert fixed.exit_code == 0, fixed.stdout
    assert "removed" in fixed.stdout
    assert not segment_path(name).exists()
    assert companions(leftover) == []


def test_what_is_no_segment_is_a_warning_and_stays(cli, alone, foreign):
    result = cli("doctor", "--json", "--fix")
    found = findings(result)["segments"]
    assert (result.exit_code, found["status"]) == (0, "warning")
    assert f"rm {foreign}" in found["remedy"]
    assert foreign.exists()


def test_a_used_segment_is_left_alone(cli, alone, segment, name):
    assert cli("doctor", "--fix").exit_code == 0
    assert segment_path(name).exists()


def test_orphans_are_found_and_fixed(leftover, name):
    segment_path(name).unlink()
    assert len(companions(leftover)) == 2
    assert {path.name for path in orphans()} >= set(companions(leftover))
    found = doctor.check_orphans(fix=False)
    assert (found.status, leftover in found.detail) == ("warning", True)
    assert doctor.check_orphans(fix=True).status == "ok"
    assert companions(leftover) == []


def test_caches_of_other_versions_are_found_and_fixed(environment):
    kernels = Path(environment["SHMROUTE_CACHE_DIR"]) / "kernels"
    stale, other = kernels / ("0" * 24), kernels / "something else"
    stale.mkdir()
    (stale / "kernel.nbc").write_bytes(bytes(100))
    other.mkdir()
    code = "from shmroute.cli.self_check import check_cache as c; print(c(False).status, c(True).status)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["warning", "ok"]
    assert not stale.exists()
    assert other.exists()
    assert (kernels / STAMP).exists()


def test_compiled_constants_that_differ_are_a_problem(monkeypatch):
    monkeypatch.setattr(self_check, "CONSTANTS", self_check.CONSTANTS ^ 1)
    assert self_check.check_kernels().status == "problem"


def test_an_atomic_operation_that_errs_is_a_problem(monkeypatch):
    monkeypatch.setattr(self_check, "each_operation", lambda cell: 5)
    found = self_check.check_atomics()
    assert (found.status, found.detail) == ("problem", "fetch_add gave a wrong result")


def test_an_increment_that_gets_lost_is_a_problem(monkeypatch):
    def loses(added, swapped, rounds):
        self_check.store(added, self_check.load(added) + rounds - 1)
        self_check.store(swapped, 0)

    monkeypatch.setattr(self_check.numba, "njit", lambda **options: lambda function: function)
    monkeypatch.setattr(self_check, "hammer", loses)
    assert self_check.check_atomics().status == "problem"


def test_shared_memory_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(checks, "_mount_of_shm", lambda: ("ext4", {"rw"}))
    assert checks.check_shm().status == "problem"
    monkeypatch.setattr(checks, "_mount_of_shm", lambda: ("tmpfs", {"ro"}))
    assert checks.check_shm().status == "problem"
    monkeypatch.setattr(checks, "_mount_of_shm", lambda: ("tmpfs", {"rw"}))
    monkeypatch.setattr(checks, "SMALL_SHM", 1 << 60)
    found = checks.check_shm()
    assert (found.status, "--shm-size" in found.remedy) == ("warning", True)


def test_a_directory_that_cannot_publish_is_a_problem(monkeypatch):
    monkeypatch.setattr(checks, "SHM", Path("/proc"))
    assert checks.check_publishing().status == "problem"


def test_few_descriptors_are_a_warning(monkeypatch):
    monkeypatch.setattr(checks.resource, "getrlimit", lambda which: (64, 1024))
    assert checks.check_descriptors().status == "warning"


# ------------------------------------------------------------------ systemd


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_systemd_nothing_removes_segments(tmp_path):
    found = check_remove_ipc(tmp_path, uid=1000)
    assert (found.status, "not systemd" in found.detail) == ("ok", True)


def test_systemd_removes_a_users_segments_by_default(tmp_path):
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    found = check_remove_ipc(tmp_path, uid=60000)
    assert (found.status, "RemoveIPC=no" in found.remedy) == ("warning", True)
    assert check_remove_ipc(tmp_path, uid=999).status == "ok", "not those of system users"


def test_a_user_who_lingers_keeps_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="ada"))
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert check_remove_ipc(tmp_path, uid=1000).status == "warning"
    write(tmp_path / "var/lib/systemd/linger/ada", "")
    assert check_remove_ipc(tmp_path, uid=1000).status == "ok"


def test_logind_files_win_in_systemds_order(tmp_path):
    assert removes_ipc(tmp_path) == (True, "default")
    write(tmp_path / "usr/lib/systemd/logind.conf", "[Login]\n#RemoveIPC=no\n")
    assert removes_ipc(tmp_path) == (True, "default")
    write(tmp_path / "etc/systemd/logind.conf", "[Login]\nRemoveIPC=no\n")
    assert removes_ipc(tmp_path) == (False, str(tmp_path / "etc/systemd/logind.conf"))
    write(tmp_path / "usr/lib/systemd/logind.conf.d/50-x.conf", "[Login]\nRemoveIPC=yes\n")
    assert removes_ipc(tmp_path) == (True, str(tmp_path / "usr/lib/systemd/logind.conf.d/50-x.conf"))
    write(tmp_path / "etc/systemd/logind.conf.d/50-x.conf", "")  # of one name, the one in /etc counts
    assert removes_ipc(tmp_path)[0] is False
    write(tmp_path / "run/systemd/logind.conf.d/60-y.conf", "[Login]\nRemoveIPC = true\n")
    assert removes_ipc(tmp_path)[0] is True


def test_a_kernel_cache_that_cannot_be_used_is_a_problem(environment, tmp_path):
    (tmp_path / "kernels").write_text("a file in the way")
    command = [sys.executable, "-m", "shmroute", "doctor", "--json"]
    unusable = environment | {"SHMROUTE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=unusable, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    check = findings(done)["kernel cache"]
    assert check["status"] == "problem"
    assert str(tmp_path) in check["detail"]
