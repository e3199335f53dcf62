"""Tables, figures and the HTML report of a results dictionary (``results.json``).

Tables and HTML need nothing beyond Python. The figures need matplotlib, which comes with
``pip install monai-unetq[report]`` and is imported when a figure is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .html import write_report
from .tables import markdown_table, text_table

if TYPE_CHECKING:
    from .comparison import accuracy_figure, comparison_figure, segmentation_figure
    from .figures import size_figure, training_figure, weight_figure

__all__ = [
    "accuracy_figure",
    "comparison_figure",
    "markdown_table",
    "segmentation_figure",
    "size_figure",
    "text_table",
    "training_figure",
    "weight_figure",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import figures  # first: it says what to install where matplotlib is missing

    if hasattr(figures, name):
        return getattr(figures, name)
    from . import comparison

    return getattr(comparison, name)
