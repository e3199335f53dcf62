"""Errors of other programs in one line of ours. Imports nothing."""

from __future__ import annotations

__all__ = ["one_line"]


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks; the name of its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
