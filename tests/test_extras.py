"""Where the packages of an extra are missing."""

from __future__ import annotations

from importlib.util import find_spec

from typer.testing import CliRunner

from shmroute import extras
from shmroute.cli import app


def test_says_which_packages_are_missing_and_how_to_get_them(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("torch", "uvicorn") else True)
    result = CliRunner().invoke(app, ["serve", "examples/tiny-mixtral"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "needs torch, uvicorn: pip install 'shmroute[serve]'" in result.stderr


def test_help_needs_no_package(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert CliRunner().invoke(app, ["serve", "--help"]).exit_code == 0


def test_looks_where_imports_look():
    assert extras.find_spec is find_spec
