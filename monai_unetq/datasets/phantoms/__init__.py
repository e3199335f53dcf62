"""Images with labels drawn from a seed, so that everything trains and is tested without data: cell membranes
as in electron microscopy, grey matter of the spinal cord as in MRI, a pancreas as in abdominal CT."""

from __future__ import annotations

from .abdomen import abdomen_phantom
from .cord import cord_phantom
from .membranes import membrane_phantom

__all__ = ["abdomen_phantom", "cord_phantom", "membrane_phantom"]
