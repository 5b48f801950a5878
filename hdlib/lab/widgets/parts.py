"""What all widgets share: pictures with a text alternative, messages and tables. All text is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO

import anywidget
import ipywidgets as widgets
import numpy as np
import pandas as pd
import traitlets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

ALERT = "border-left: 4px solid #E69F00; padding: 2px 8px; margin: 2px 0; line-height: 1.4"
CELL = "padding: 1px 8px; text-align: right; vertical-align: bottom; line-height: 1.3; font-weight: normal"
WRAPPED = {"flex_flow": "row wrap"}  # layout of a Box: several rows where the page is narrow
SHOW = """
function render({ model, el }) {
  const image = document.createElement("img");
  image.style.cssText = "max-width: 100%; display: block";
  const show = () => {
    const old = image.src;
    image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    image.alt = model.get("alt");
    if (old) URL.revokeObjectURL(old);
  };
  image.addEventListener("click", (event) => {
    const box = image.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    model.send({ x, y });
  });
  model.on("change", show);
  show();
  el.append(image);
}
export default { render };
"""


class Picture(anywidget.AnyWidget):
    """A PNG with its text alternative."""

    _esm = SHOW
    png = traitlets.Bytes().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)

    def show(self, canvas: FigureCanvasAgg, alt: str) -> None:
        """Show what is drawn on a canvas, with its text alternative."""
        file = BytesIO()
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        pixels.save(file, "PNG", compress_level=1)  # light compression: here time matters more than size
        with self.hold_sync():  # picture and text arrive together
            self.png, self.alt = file.getvalue(), alt


class Shown(widgets.VBox):
    """Widgets below each other, with a static fallback where no front end shows widgets.

    `problems` are messages at the top. The fallback is the text `alt` and the PNG of `picture`.
    """

    def __init__(self, problems: Sequence[str] = ()):
        super().__init__([widgets.HTML(alert(problem)) for problem in problems])
        self.alt, self.picture = " ".join(problems), Picture()

    def _repr_mimebundle_(self, **options) -> dict:
        bundle = super()._repr_mimebundle_(**options) | {"text/plain": self.alt}
        return bundle | ({"image/png": b64encode(self.picture.png).decode()} if self.picture.png else {})


def drawn(figure: Figure) -> FigureCanvasAgg:
    """A figure on a canvas of its own, independent of pyplot."""
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def alert(text: str) -> str:
    """A highlighted message that a screen reader reads immediately, as HTML."""
    return f'<div role="alert" style="{ALERT}">{escape(text)}</div>'


def status(text: str) -> str:
    """A message that a screen reader reads when it is idle, as HTML."""
    return f'<div role="status">{escape(text)}</div>'


def number(value: float) -> str:
    """Four significant digits, or a whole number from 1,000 on; "" for NaN."""
    if value != value:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time span in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def table(rows: pd.DataFrame, caption: str = "", bars: pd.DataFrame | None = None) -> str:
    """A table as HTML, its row and column headings marked for screen readers.

    `rows` are texts, or numbers that `number` formats; `bars`, in the same shape, is the shaded fraction of each cell.
    """
    bars = pd.DataFrame(0.0, rows.index, rows.columns) if bars is None else bars
    head, body = "".join(_heading("col", name) for name in ("", *rows.columns)), ""
    for (label, values), (_, fractions) in zip(rows.iterrows(), bars.iterrows(), strict=True):
        body += f"<tr>{_heading('row', label)}{''.join(map(_cell, values, fractions))}</tr>"
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _heading(scope: str, text) -> str:
    return f'<th scope="{scope}" style="{CELL}">{escape(str(text))}</th>'


def _cell(value: str | float, fraction: float) -> str:
    bar = f"; min-width: 12em; background: linear-gradient(90deg, #cfe3f1 {fraction:.0%}, transparent {fraction:.0%})"
    text = value if isinstance(value, str) else number(value)
    return f'<td style="{CELL}{bar if fraction else ""}">{escape(text)}</td>'
