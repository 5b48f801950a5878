"""What widgets have in common: words where something is missing, tables, and a picture where no widget can be shown."""

from __future__ import annotations

from base64 import b64encode
from html import escape

import ipywidgets as widgets
import pandas as pd


class Shown(widgets.VBox):
    """Widgets below each other that are a picture, or at least words, for what shows no widgets.

    Attributes:
        alt: what it shows, in words.
        png: a picture of it, or nothing.
    """

    png: bytes = b""

    def __init__(self, children, alt: str):
        self.alt = alt
        super().__init__(children)

    def _repr_mimebundle_(self, **options) -> dict:
        bundle = super()._repr_mimebundle_(**options) | {"text/plain": self.alt}
        return bundle | ({"image/png": b64encode(self.png).decode()} if self.png else {})


def alert(text: str) -> str:
    """A sentence that stands out, and is read aloud when it appears, as HTML."""
    style = "border-left: 4px solid #E69F00; padding: 2px 8px; margin: 2px 0; line-height: 1.4"
    return f'<div role="alert" style="{style}">{escape(text)}</div>'


def status(text: str) -> str:
    """A sentence that is read aloud when there is time for it, as HTML."""
    return f'<div role="status">{escape(text)}</div>'


def table(rows: pd.DataFrame) -> str:
    """A small table as HTML."""
    cells = "padding: 2px 8px; text-align: right; vertical-align: bottom; line-height: 1.3; font-weight: normal"
    styles = [{"selector": "th, td", "props": cells}, {"selector": "th.col_heading", "props": "color: #555555"}]
    return rows.style.set_table_styles(styles).to_html()
