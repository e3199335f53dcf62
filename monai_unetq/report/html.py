"""How results and figures become one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .tables import full_table, require

__all__ = ["write_report"]

ACCEPTED_LOSS = 1.0  # Dice points; a format that loses more is called out

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MINUS = "\N{MINUS SIGN}"

_LEGEND = (
    "Means over the test cases. Dice, membrane Dice and NSD (normalized surface Dice, tolerance 1 px) in "
    "percent, higher is better; HD95 in pixels, lower is better. The interval is Student's and takes the "
    "cases as independent. Ratios say how many times smaller than float."
)

_STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #5b6670; --line: #d8dde2; --band: #f4f6f8;
  --page: #fff; --accent: #0072b2; --warn: #b34700; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e7eb; --soft: #9aa5b0; --line: #3a424a;
  --band: #20262c; --page: #15191d; --accent: #56b4e9; --warn: #ffa25c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.5rem 4rem; background: var(--page);
  color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem; }
p { margin: .5rem 0; }
.soft, figcaption, dt { color: var(--soft); }
pre { margin: .75rem 0; padding: .6rem .9rem; background: var(--band); border-radius: 6px;
  font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.summary { margin: 1.5rem 0; padding: .25rem 0 .25rem 1rem; border-left: 4px solid var(--accent);
  font-size: 1.1rem; }
.lost { color: var(--warn); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { border-bottom-width: 2px; color: var(--soft); font-weight: 600; white-space: normal;
  vertical-align: bottom; }
tbody th { font-weight: 600; }
th.text, td.text { text-align: left; }
tbody tr:hover { background: var(--band); }
figure { margin: 1.25rem 0 2rem; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; padding: .5rem;
  background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: .5rem; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0;
  font-size: .95rem; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .25rem .35rem; } tr { break-inside: avoid; }
  h2 { break-after: avoid; } }
""".strip()


def write_report(out: Path, results: Mapping[str, Any], figures: Sequence[tuple[str, Path]]) -> Path:
    """Write ``report.html``: summary, table, figures, data, versions and layers, in one self-contained file.

    Args:
        out: the folder to write to; made if it is not there. An older ``report.html`` in it is replaced.
        results: the results as in ``results.json``. ``training`` and ``layers`` may be missing or null,
            and so may ``file_bytes`` of a row; every other key is required.
        figures: caption and PNG file of each figure, in the order to show them; they are embedded.

    Returns:
        The path of the file. It is complete: a failure leaves the folder as it was.

    Raises:
        ValueError: a required key of ``results`` is missing, there is no row, or a figure is no PNG file.
        FileNotFoundError: a figure is not there.
    """
    text = _page(results, figures)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    handle, temporary = tempfile.mkstemp(dir=out, prefix=".report-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes files for the owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _page(results: Mapping[str, Any], figures: Sequence[tuple[str, Path]]) -> str:
    title = escape(str(require(results, "title")))
    table = full_table(results)
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="soft">{_network(results)}; made {escape(str(require(results, "created")))}</p>',
        f"<pre>{escape(str(require(results, 'command')))}</pre>",
        f'<div class="summary">{_summary(results)}</div>',
        "<h2>Results</h2>",
        _html_table(table.header, table.rows, text_columns=1),
        f'<p class="soft">{_LEGEND}</p>',
    ]
    if figures:
        sections += ["<h2>Figures</h2>", *(_figure(caption, path) for caption, path in figures)]
    sections += [
        "<h2>Data</h2>",
        _data(results),
        "<h2>Versions</h2>",
        _definitions(require(results, "versions")),
    ]
    if results.get("layers"):
        sections += ["<h2>Layers</h2>", _layers(results["layers"])]
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _network(results: Mapping[str, Any]) -> str:
    network = require(results, "network")
    width = f", width {network['width']}" if network.get("width") is not None else ""
    parameters = require(network, "parameters", "network")
    return escape(f"{require(network, 'name', 'network')}{width}, {parameters:,} parameters")


def _summary(results: Mapping[str, Any]) -> str:
    """One sentence for each format that is compared with float."""
    rows = results["rows"]  # full_table has checked what is read here, but for `weights` and `activations`
    names = [
        (require(r, "weights", f"rows[{i}]"), require(r, "activations", f"rows[{i}]"))
        for i, r in enumerate(rows)
    ]
    if ("float", "float") not in names:
        return "<p>There is no float row, so nothing is said about what the formats cost.</p>"
    baseline = rows[names.index(("float", "float"))]
    count = baseline["metrics"]["dice"].get("count")
    cases = "" if count is None else f" on {count} test {'case' if count == 1 else 'cases'}"
    float_dice = f"Float reaches {baseline['metrics']['dice']['mean']:.2f} Dice{cases}."
    others = [row for row in rows if row is not baseline]
    return "\n".join(
        f"<p>{sentence}</p>" for sentence in [float_dice, *(_sentence(r, baseline) for r in others)]
    )


def _sentence(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    def change(metric: str) -> float:
        return round(float(row["metrics"][metric]["mean"]) - float(baseline["metrics"][metric]["mean"]), 2)

    ratio = row["weight_ratio"]
    if round(ratio, 1) > 1:
        size = f"{ratio:.1f} times smaller"
    elif round(ratio, 1) < 1:
        size = f"{1 / ratio:.1f} times larger"
    else:
        size = "as large as float"
    dice = change("dice")
    start = f"{escape(str(row['name']))} is {size}"
    membrane = f"(membrane Dice {_signed(change('membrane_dice'))})"
    if dice < -ACCEPTED_LOSS:
        lost = f"it lost {-dice:.2f} Dice, more than {ACCEPTED_LOSS:g}"
        return f'{start}, but <span class="lost">{lost}</span> {membrane}.'
    return f"{start} at {_signed(dice)} Dice {membrane}."


def _signed(value: float) -> str:
    sign = "+" if value > 0 else _MINUS if value < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(value):.2f}"


def _figure(caption: str, path: Path) -> str:
    content = path.read_bytes()
    if not content.startswith(_PNG_SIGNATURE):
        raise ValueError(f"{path} is no PNG file; figures of the report are PNG files")
    data = base64.b64encode(content).decode("ascii")
    text = escape(caption)
    return (
        f'<figure>\n<img src="data:image/png;base64,{data}" alt="{text}">\n'
        f"<figcaption>{text}</figcaption>\n</figure>"
    )


def _data(results: Mapping[str, Any]) -> str:
    data = require(results, "data")
    split = require(data, "split", "data")
    entries = {
        "name": require(data, "name", "data"),
        "image shape": " \N{MULTIPLICATION SIGN} ".join(map(str, require(data, "image_shape", "data"))),
    }
    for part in ("train", "validation", "test"):
        cases = require(split, part, "data.split")
        entries[f"{part} ({len(cases)})"] = ", ".join(map(str, cases)) or "none"
    return _definitions(entries)


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    header = ("layer", "weight format", "input format", "parameters", "distinct codes")
    rows = [
        (
            str(require(layer, "name", f"layers[{index}]")),
            str(require(layer, "weight", f"layers[{index}]")),
            _or_dash(layer.get("input")),
            f"{require(layer, 'parameters', f'layers[{index}]'):,}",
            _or_dash(layer.get("codes")),
        )
        for index, layer in enumerate(layers)
    ]
    return _html_table(header, rows, text_columns=3)


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _definitions(entries: Mapping[str, Any]) -> str:
    lines = (f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in entries.items())
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    """A table whose first column heads the rows and whose first ``text_columns`` are aligned to the left."""

    def cell(index: int, text: str, tag: str, scope: str = "") -> str:
        align = ' class="text"' if index < text_columns else ""
        return f"<{tag}{scope}{align}>{escape(text)}</{tag}>"

    head = "".join(cell(i, text, "th", ' scope="col"') for i, text in enumerate(header))
    body = "\n".join(
        "<tr>"
        + cell(0, row[0], "th", ' scope="row"')
        + "".join(cell(i, text, "td") for i, text in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return f'<div class="scroll">\n{table}\n</div>'
