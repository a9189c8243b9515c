"""What makes a stress run fail."""

from __future__ import annotations


class StressFailure(Exception):
    """Something that must hold did not; the message says what."""
