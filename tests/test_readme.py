"""The README's Python runs as it stands, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # the repository's own file
    net, same = names["net"], names["same"]
    assert isinstance(net, torch.nn.Module) and isinstance(same, torch.nn.Module)
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(image), same(image))
    float_bytes = 4 * 4_837_249
    assert float_bytes / (tmp_path / "model.unetq").stat().st_size > 7.8


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
