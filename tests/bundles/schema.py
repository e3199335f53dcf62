"""Where MONAI's schema of a bundle's ``metadata.json`` is, beside the project; it is not committed."""

from __future__ import annotations

from pathlib import Path

SCHEMA = Path(__file__).resolve().parents[3] / "shared" / "schema" / "meta_schema_20240725.json"
