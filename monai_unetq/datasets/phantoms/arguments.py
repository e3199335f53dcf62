"""What every phantom asks of its arguments."""

from __future__ import annotations

__all__ = ["check_arguments"]


def check_arguments(
    phantom: str, count: int, size: int, seed: int, dimensions: int, *, least_size: int
) -> None:
    """Check the arguments of a phantom.

    Args:
        phantom: name of the function, for the message.
        count: at least 1.
        size: at least ``least_size``.
        seed: at least 0.
        dimensions: 2 or 3.
        least_size: the smallest height and width in px in which the phantom has room.

    Raises:
        ValueError: one of them is none of these.
    """
    for argument, value, least in (("count", count, 1), ("size", size, least_size), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{phantom}: {argument} is {value}, expected at least {least}")
    if dimensions not in (2, 3):
        raise ValueError(
            f"{phantom}: dimensions is {dimensions}, expected 2 (a case is a slice) or 3 (a case is a volume)"
        )
