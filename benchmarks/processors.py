"""What the processor of a measurement can do, and pages that keep a document for each kind of processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from monai_unetq.files import write_json

__all__ = ["KINDS", "documents", "features", "processor_kind", "write_page"]

Kind = Literal["vnni", "avx2"]
KINDS: tuple[Kind, ...] = ("vnni", "avx2")
"""With instructions that sum 8-bit products, and without; named as ``unetq export --for`` is told."""

_FEATURES = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "avx512_bf16", "amx_bf16")
_VNNI = ("amx_int8", "avx512_vnni", "avx_vnni")


def features() -> list[str]:
    """What of the instructions that matter here Linux says that the processor has, the most capable first."""
    file = Path("/proc/cpuinfo")
    flags = file.read_text(encoding="utf-8").split() if file.exists() else []
    return [name for name in _FEATURES if name in flags]


def processor_kind() -> Kind:
    """Of the processor that runs this."""
    return "vnni" if any(name in features() for name in _VNNI) else "avx2"


def documents(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Kind of processor → ``folder/NAME-KIND.json``, those that are there."""
    files = {kind: folder / f"{name}-{kind}.json" for kind in KINDS}
    return {
        kind: json.loads(file.read_text(encoding="utf-8")) for kind, file in files.items() if file.exists()
    }


def write_page(
    name: str, document: Mapping[str, Any], folder: Path, marks: tuple[str, str],
    markdown: Callable[[Mapping[str, Mapping[str, Any]]], str],
) -> None:  # fmt: skip
    """Keep what was measured on this kind of processor, and write ``folder/NAME.md`` anew from what is kept of all.

    Raises:
        FileNotFoundError: if there is no page.
        ValueError: if a mark is missing; nothing is written then.
    """
    # Here, as it brings torch, which measured processes are to do without.
    from monai_unetq.reproduction.pages import between

    page, found = folder / f"{name}.md", {**documents(name, folder), processor_kind(): document}
    tables = markdown({kind: found[kind] for kind in KINDS if kind in found})
    text = between(page.read_text(encoding="utf-8"), *marks, tables)
    write_json(folder / f"{name}-{processor_kind()}.json", document)
    page.write_text(text, encoding="utf-8")
