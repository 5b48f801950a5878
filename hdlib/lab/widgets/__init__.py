"""Looking at runs in JupyterLab: widgets read run folders, never live objects, and their pictures have words."""

from .chooser import chooser
from .compare import compare
from .explore import explore
from .live import LiveFigure
from .watch import watch

__all__ = ["LiveFigure", "chooser", "compare", "explore", "watch"]
