"""Choosing and looking at runs in JupyterLab: widgets read run folders, never live objects, and have words."""

from .chooser import chooser
from .live import LiveFigure

__all__ = ["LiveFigure", "chooser"]
