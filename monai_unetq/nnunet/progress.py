"""What is added to nnU-Net's ``progress.png``: a line that says which epochs were float and which quantized."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..files import replace_file

__all__ = ["caption"]


def caption(file: Path, text: str) -> None:
    """Write a text above a figure, in place, wrapped to its width.

    Args:
        file: PNG; nothing is done where it is not there.
        text: one paragraph.
    """
    if not file.is_file():
        return
    with Image.open(file) as opened:
        figure = opened.convert("RGB")
    size = max(figure.width // 75, 10)
    font = ImageFont.load_default(size)
    lines = textwrap.wrap(text, width=max(figure.width * 2 // size - 4, 20))
    height = int(1.5 * size * (len(lines) + 1))
    page = Image.new("RGB", (figure.width, figure.height + height), "white")
    ImageDraw.Draw(page).multiline_text((size, size // 2), "\n".join(lines), "black", font, spacing=size // 2)
    page.paste(figure, (0, height))
    replace_file(file, lambda path: page.save(path, format="PNG"))
