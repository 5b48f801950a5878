"""Looking at runs in JupyterLab: widgets read run folders, never live objects, and their pictures have words."""

from .live import LiveFigure

__all__ = ["LiveFigure"]
