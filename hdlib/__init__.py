"""HomoDistil: make a pre-trained transformer small by narrowing it while it is distilled."""

from . import cost, export
from .arms import Bench, final_table, overlap, paired_differences, pick
from .config import DistillConfig
from .data import load_corpus
from .discrepancy import discrepancy
from .interruptions import Stopped
from .loop import Diverged, distill
from .losses import DistillationLoss, LossTerms
from .masking import Masks
from .models import forward, load_teacher
from .narrowing import narrow
from .plots import (
    plot_arms,
    plot_coupling,
    plot_discrepancy,
    plot_ends,
    plot_ladder,
    plot_layers,
    plot_losses,
    plot_map,
    plot_overlap,
    plot_prunes,
    plot_schedule,
    plot_scores,
    plot_speed_up,
)
from .run_figure import plot_neurons, plot_run
from .runs import Run, save_result
from .schedules import cubic, linear, one_shot
from .scorers import scorer
from .widgets import LiveFigure, chooser, compare, explore, watch
from .widths import UnsupportedArchitecture, WidthGroup, Widths, width_groups

__all__ = [
    "Bench",
    "DistillConfig",
    "DistillationLoss",
    "Diverged",
    "LiveFigure",
    "LossTerms",
    "Masks",
    "Run",
    "Stopped",
    "UnsupportedArchitecture",
    "WidthGroup",
    "Widths",
    "chooser",
    "compare",
    "cost",
    "cubic",
    "discrepancy",
    "distill",
    "explore",
    "export",
    "final_table",
    "forward",
    "linear",
    "load_corpus",
    "load_teacher",
    "narrow",
    "one_shot",
    "overlap",
    "paired_differences",
    "pick",
    "plot_arms",
    "plot_coupling",
    "plot_discrepancy",
    "plot_ends",
    "plot_ladder",
    "plot_layers",
    "plot_losses",
    "plot_map",
    "plot_neurons",
    "plot_overlap",
    "plot_prunes",
    "plot_run",
    "plot_schedule",
    "plot_scores",
    "plot_speed_up",
    "save_result",
    "scorer",
    "watch",
    "width_groups",
]
