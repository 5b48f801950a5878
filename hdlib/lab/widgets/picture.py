"""A figure as a widget: a picture with a text for those who do not see it, that says where it was clicked."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import anywidget
import numpy as np
import traitlets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DOTS_PER_INCH = 100

SHOW = """
function render({ model, el }) {
  const image = document.createElement("img");
  image.style.cssText = "max-width: 100%; display: block";
  const show = () => {
    const old = image.src;
    image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    if (old) URL.revokeObjectURL(old);
  };
  const describe = () => { image.alt = model.get("alt"); };
  image.addEventListener("click", (event) => {
    const box = image.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    model.send({ x, y });
  });
  model.on("change:png", show);
  model.on("change:alt", describe);
  show(); describe();
  el.append(image);
}
export default { render };
"""


class Picture(anywidget.AnyWidget):
    """A PNG with its text alternative.

    Args:
        png: the picture.
        alt: what it shows, in words.
    """

    _esm = SHOW
    png = traitlets.Bytes().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)

    def show(self, canvas: FigureCanvasAgg, alt: str) -> None:
        """Show what has been drawn on a canvas."""
        with self.hold_sync():  # picture and words arrive together
            self.png, self.alt = png(canvas), alt

    def on_click(self, call: Callable[[float, float], None]) -> None:
        """Call with the place of every click, as fractions of the figure from its lower left corner."""
        self.on_msg(lambda _widget, place, _buffers: call(place["x"], 1 - place["y"]))


def drawn(figure: Figure) -> FigureCanvasAgg:
    """A figure on a canvas of its own, of which pyplot does not know."""
    figure.set_dpi(DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def png(canvas: FigureCanvasAgg) -> bytes:
    """What is on a canvas as a PNG, packed lightly: it has to be quick, and only goes to the browser."""
    file = BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()
