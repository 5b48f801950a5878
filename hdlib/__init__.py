"""HomoDistil: make a pre-trained transformer small by narrowing it while it is distilled.

The method is here; `hdlib.lab` looks, compares and costs, `hdlib.downstream` fine-tunes. Each name loads its module at
first use, so that `import hdlib` is instant and the loop runs where only its own dependencies are installed.
"""

import sys
from importlib import import_module
from types import ModuleType

_MODULE_OF = {
    name: module
    for module, names in {
        "config": "DistillConfig",
        "text.corpus": "load_corpus",
        "text.sentences": "load_sentences",
        "discrepancy": "discrepancy",
        "distill": "Diverged Stopped distill",
        "losses": "DistillationLoss",
        "masks": "Masks",
        "models": "forward load_teacher",
        "narrowing": "narrow",
        "runs": "Run",
        "schedules": "cubic linear one_shot",
        "scorers": "scorer",
        "sentences": "Pooling encode",
        "vocabulary": "trim_vocabulary",
        "widths": "UnsupportedArchitecture Widths width_groups",
    }.items()
    for name in names.split()
}
__all__ = sorted(_MODULE_OF)

_MOVED = {  # names of hdlib 0.1, beside those in dir(hdlib.lab)
    "Bench": "hdlib.lab.Study",
    "LossTerms": "hdlib.losses.LossTerms",
    "WidthGroup": "hdlib.widths.WidthGroup",
    "arms": "hdlib.lab.study",
    "loop": "hdlib.distill",
    "masking": "hdlib.masks",
    "plot_coupling": "a cell of notebooks/03_narrowing.ipynb",
    "plot_ladder": "a cell of notebooks/15_width.ipynb",
    "plot_map": "a cell of notebooks/16_when_it_pays.ipynb",
    "plot_neurons": "hdlib.lab.plot_run",
    "plot_overlap": "a cell of notebooks/13_importance.ipynb",
    "plot_prunes": "a cell of notebooks/11_prediction_discrepancy.ipynb",
    "plot_scores": "a cell of notebooks/20_finetune.ipynb",
    "plot_speed_up": "a cell of notebooks/21_cost.ipynb",
    "projection": "hdlib.lab.cost",
}


class _Package(ModuleType):
    """`hdlib.distill` and `hdlib.discrepancy` are the functions, also after an import of the modules of that name."""

    def __setattr__(self, name: str, value) -> None:
        if isinstance(value, ModuleType) and _MODULE_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in ("lab", "downstream"):
        return import_module(f"{__name__}.{name}")
    if name in _MOVED or name in dir(import_module(f"{__name__}.lab")):
        # ImportError: `from hdlib import NAME` would replace the message of an AttributeError by its own.
        raise ImportError(f"hdlib.{name} has moved: use {_MOVED.get(name, f'hdlib.lab.{name}')}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "downstream", "lab"]
