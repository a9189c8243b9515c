"""Packages that only some of shmroute's uses need, and the extra that brings them."""

from __future__ import annotations

from importlib.util import find_spec

from shmroute.errors import ConfigError

PACKAGES = {
    "plots": ("matplotlib",),
    "transformers": ("torch", "transformers"),
    "serve": ("torch", "transformers", "jinja2", "starlette", "uvicorn", "prometheus_client"),
}
"""By extra. They are looked for, not imported: some are large, and loaded by other processes only."""


def missing_packages(extra: str) -> list[str]:
    """Those of an extra that are not installed."""
    return [name for name in PACKAGES[extra] if find_spec(name) is None]


def check_installed(extra: str, what: str) -> None:
    """Find out before anything is started whether `what` can be had.

    Raises
    ------
    ConfigError
        If a package is missing; says how to get it.
    """
    if missing := missing_packages(extra):
        raise ConfigError(f"{what} needs {', '.join(missing)}: pip install 'shmroute[{extra}]'")
