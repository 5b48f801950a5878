"""Widgets for JupyterLab. They only read run folders, and every picture has a text alternative."""

from .chooser import Chooser as chooser
from .compare import compare
from .explore import explore
from .watch import LiveFigure
from .watch import Watch as watch

__all__ = ["LiveFigure", "chooser", "compare", "explore", "watch"]
