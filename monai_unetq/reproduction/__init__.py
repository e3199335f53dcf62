"""The 2019 paper's comparison on one's own data: its rows beside ours, its numbers beside those reached."""

from .paper import PAPER, PaperRow
from .results import prepared, write_results
from .rows import ACTIVATIONS, STUDIES, Kind, Row, StudyName, paper_rows, study_rows
from .run import PRESETS, Comparison, Settings, score
from .tables import markdown, studies_markdown

__all__ = [
    "ACTIVATIONS",
    "PAPER",
    "PRESETS",
    "STUDIES",
    "Comparison",
    "Kind",
    "PaperRow",
    "Row",
    "Settings",
    "StudyName",
    "markdown",
    "paper_rows",
    "prepared",
    "score",
    "studies_markdown",
    "study_rows",
    "write_results",
]
