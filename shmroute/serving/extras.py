"""Whether the packages are there that serving needs and the rest of shmroute does not."""

from __future__ import annotations

from importlib.util import find_spec

from shmroute.errors import ConfigError

PACKAGES = ("torch", "transformers", "jinja2", "starlette", "uvicorn", "prometheus_client")
"""Torch and Transformers are looked for but not imported: only workers load them."""


def check_installed() -> None:
    """Find out before anything is started.

    Raises
    ------
    ConfigError
        If a package is missing; says how to get it.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"'shmroute serve' needs {', '.join(missing)}: pip install 'shmroute[serve]'")
