"""The rows of the comparison: the paper's and ours, each with a folder of its own."""

from __future__ import annotations

import pytest

from monai_unetq.formats import QFormat
from monai_unetq.reproduction import ACTIVATIONS, PAPER, STUDIES, paper_rows, study_rows

OURS = {
    "int8/pow2-4",
    "int6/int4 learned",
    "int4/int4 learned",
    "int2/int2 learned",
    "int4/ternary learned",
    "int4/binary learned",
}


@pytest.mark.parametrize("kind", ["em", "gm", "nih"])
def test_every_row_of_the_paper_and_of_ours_stands_in_every_column(kind: str) -> None:
    rows = paper_rows(kind)  # type: ignore[arg-type]
    for activation in ACTIVATIONS[kind]:  # type: ignore[index]
        names = [row.name for row in rows if row.activation == activation]
        assert set(names) == {row.name for row in PAPER} | OURS
        assert len(names) == len(set(names))


def test_the_papers_columns() -> None:
    assert dict(ACTIVATIONS) == {"em": ("relu", "tanh"), "gm": ("relu", "tanh"), "nih": ("relu",)}


def test_names_say_the_formats() -> None:
    for row in paper_rows("nih"):
        activations, _, weights = row.name.removesuffix(" learned").partition("/")
        if weights:
            assert (row.formats["activations"], row.formats["weights"]) == (activations, weights)
            assert row.formats.get("learned", False) == row.name.endswith(" learned")
        for key in ("activations", "weights"):
            QFormat(row.formats[key])


def test_every_row_has_its_own_folder() -> None:
    rows = [*paper_rows("em"), *(row for study in STUDIES for row in study_rows(study))]
    slugs = [row.slug for row in rows]
    assert len(set(slugs)) == len(slugs)
    assert all("/" not in slug and " " not in slug for slug in slugs)


def test_dropout_study_has_each_network_with_and_without() -> None:
    shares: dict[str, list[float]] = {}
    for row in study_rows("dropout"):
        shares.setdefault(row.name.partition(",")[0], []).append(row.dropout)
    assert set(shares) == {"Full precision", "Q6.0/Q0.4", "Q4.0/Q0.2"}
    assert all(sorted(found)[0] == 0 and len(found) == 2 and max(found) > 0 for found in shares.values())


def test_float_layers_study_has_all_four_choices() -> None:
    for name in ("Q6.0/Q0.4", "int4/ternary learned"):
        rows = [row for row in study_rows("float-layers") if row.name.startswith(f"{name},")]
        chosen = {(row.formats["first"] == "float", row.formats["last"] == "float") for row in rows}
        assert len(rows) == len(chosen) == 4


def test_no_row_is_trained_longer_than_full_precision() -> None:
    for kind, columns in ACTIVATIONS.items():
        for activation in columns:
            lengths = {row.name: row.length for row in paper_rows(kind) if row.activation == activation}
            assert lengths["Full precision"] == lengths["int6/int4 learned"] == max(lengths.values())
            assert lengths["Q8.8/Q8.8"] == 1
            assert lengths["BNN"] == (2 if activation == "relu" else 1)


def test_formats_close_to_float_are_fitted_gently() -> None:
    rates = {row.name: row.learning_rate for row in paper_rows("nih")}
    assert rates["Full precision"] == rates["Q8.8/Q8.8"] == rates["int6/int4 learned"] < rates["BNN"]
    studied = [row for study in STUDIES for row in study_rows(study)]
    assert all(rates[row.name.partition(",")[0]] == row.learning_rate for row in studied)
