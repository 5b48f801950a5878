"""Look at runs, compare them and cost them: studies, figures, widgets, cost, export. Each name loads at first use."""

from importlib import import_module

from .. import _MOVED

_NAMES = {
    "budget": "Budget shapes",
    "study": "Study final_table overlap paired_differences pick power_law save_result verdict",
    "plots": "mark_smoke panel plot_arms plot_discrepancy plot_ends plot_layers plot_losses plot_schedule",
    "run_figure": "plot_run",
    "widgets": "LiveFigure chooser compare explore watch",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES = ("baselines", "cost", "export", "guesses", *_NAMES)
__all__ = [*sorted(_MODULE_OF), "baselines", "cost", "export"]


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _MOVED:
        raise ImportError(f"{__name__}.{name} has moved: use {_MOVED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_MODULE_OF, *_MODULES]
