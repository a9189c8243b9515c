"""What routing and eviction need of a segment: the tables in it, or private ones of the same layout."""

from __future__ import annotations

from typing import Protocol

from shmroute.config import RuntimeConfig
from shmroute.shared.layout import Layout


class Tables(Protocol):
    """A segment, as far as its control part goes; `PrivateTables` are in memory of one's own."""

    @property
    def config(self) -> RuntimeConfig:
        """The settings."""

    @property
    def layout(self) -> Layout:
        """Where everything lies."""

    @property
    def address(self) -> int:
        """Where the first byte is."""
