"""The Python of README and docs runs as it stands and prints what they say, and what they link is there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

import monai_unetq

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


def examples(page: str) -> str:
    """The ``pycon`` blocks of a page, one after the other."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```pycon\n(.*?)```", text, flags=re.DOTALL))


PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_examples_print_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(
        examples(page), {"torch": torch, "uq": monai_unetq}, page, None, None
    )
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(
        test, out=failures.append
    )
    assert not failures, "".join(failures)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
