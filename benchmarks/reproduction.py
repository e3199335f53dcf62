"""docs/results/reproduction.md: the tables of ``unetq reproduce`` on the three data sets, and the JSON they come from.

The tables stand between marks; the text around them is written by hand. Data sets without results keep what stands
there.

examples:
  for kind in em gm nih; do unetq reproduce $kind --data DATA/$kind --out study; done
  python benchmarks/reproduction.py --study study
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from monai_unetq.files import write_json
from monai_unetq.reproduction import ACTIVATIONS, markdown, studies_markdown
from monai_unetq.reproduction.pages import between

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments; copy the documents, rewrite the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, metavar="DIR", required=True, help="--out of unetq reproduce")
    parser.add_argument("--preset", choices=("quick", "cpu", "paper"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", default=RESULTS, help="folder of reproduction.md")
    options = parser.parse_args(arguments)
    page = options.out / "reproduction.md"
    text = page.read_text(encoding="utf-8")
    documents = {}
    for kind in ACTIVATIONS:
        source = options.study / kind / options.preset / "results.json"
        if not source.exists():
            print(f"{kind}: no {source}, left as it is")
            continue
        document = json.loads(source.read_text(encoding="utf-8"))
        documents[kind] = document
        text = replaced(text, kind, markdown(document))
        if document["studies"]:
            text = replaced(text, f"{kind} studies", studies_markdown(document))
    for kind, document in documents.items():
        write_json(options.out / f"reproduction-{kind}.json", document)
    page.write_text(text, encoding="utf-8")
    print(page)


def replaced(text: str, name: str, table: str) -> str:
    """The text with what stands between the marks of a name replaced."""
    return between(
        text, f"<!-- {name}: made by benchmarks/reproduction.py -->", f"<!-- end of {name} -->", table
    )


if __name__ == "__main__":
    main()
