"""A run that goes on, watched from its folder."""

from __future__ import annotations

from html import escape
from pathlib import Path

import ipywidgets as widgets


def watch(run_dir: str | Path) -> widgets.Widget:
    """Says which folder the run writes to."""
    return widgets.HTML(f"The run writes to {escape(str(run_dir))}.")
