"""Choose a run with controls: its sizes before it starts, its files, and buttons that start and stop it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from functools import cache
from html import escape
from pathlib import Path
from threading import Thread

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ...config import CHOICES, DistillConfig, option
from ...models import check_length, check_reachable, language_model_class, shape_of
from ...narrowing import stock_model
from ...text.corpus import SHORTEST
from ...widths import Widths
from ..cost import flops, parameters, project
from ..plots import WIDTHS, plot_schedule
from .parts import WRAPPED, Shown, alert, drawn, duration, number, status, table
from .watch import Watch

QUICKSTART = Path(__file__).parents[3] / "notebooks" / "00_quickstart.ipynb"
FRACTION, SHAPE = "a fraction", "a shape"
OPTIONS = CHOICES | {"target is": (FRACTION, SHAPE)}
GROUPS = {  # heading: controls, by the names in PLACES and in DistillConfig
    "Places": "teacher corpus length run_dir",
    "Shape": "target multiple_of initial",
    "Narrowing": "schedule prune_start prune_end prune_every scorer rotate compensate masked",
    "Training": "steps batch_size micro_batch_size learning_rate mask_probability precision seed eval_every",
}
PLACES = {
    "teacher": option("embedded", "embedded, a local folder, or a model name on the hub"),
    "corpus": option("embedded", "embedded, a file or folder of txt, jsonl or parquet, or a data set name on the hub"),
    "length": option(128, "S, tokens per block", least=SHORTEST),
    "run_dir": option("chosen", "the folder of the run; its configuration is written beside it"),
}
ARROWS = {"target": 0.01, "learning_rate": 1e-4, "length": 8, "batch_size": 8, "micro_batch_size": 8, "steps": 100}
BUTTONS = {  # label and description
    "measure": ("Measure time and memory", "Project the run from 24 steps on random tokens on this machine"),
    "export": ("Export", "Write the configuration for the command line and the parameters for papermill"),
    "run": ("Run", "Start the run in its own process, or resume a stopped one"),
    "stop": ("Stop", "Stop the run after the current step, with a checkpoint"),
}
ROWS = WIDTHS | {"total": "parameters", "encoder": "parameters of the encoder", "gflop": "GFLOP of a block"}
ERRORS = (ValueError, OSError, MemoryError, ArithmeticError)


class Chooser(Shown):
    """Choose a run with controls: see its sizes, export its configuration, start and stop it.

    Args:
        folder: parent of the run folders.

    Attributes:
        controls: by name: `teacher`, `corpus`, `length` and `run_dir`, and fields of DistillConfig.
        by: whether `target` is a fraction, or the shape in `widths`, where 0 follows from the other widths.
        buttons: `measure`, `export`, `run`, `stop`.
        config: the chosen DistillConfig; None if the choice is impossible.
        configuration: its arguments for `python -m hdlib`.
        sizes: the table of sizes of the last possible choice.
        process: the run that was started last; None before.
    """

    def __init__(self, folder: str | Path = "runs"):
        super().__init__()
        options = {field.name: field for field in fields(DistillConfig)} | PLACES
        self.controls = {name: _control(name, options[name]) for names in GROUPS.values() for name in names.split()}
        self.controls["run_dir"].value = str(Path(folder) / "chosen")
        tooltip = "width of the student: {}; 0: as the teacher, or what follows from the other widths"
        self.widths = {name: _control(name, option(0, tooltip.format(label))) for name, label in WIDTHS.items()}
        self.by = _control("target is", option(FRACTION, "fraction of the teacher's widths, or each width on its own"))
        self.buttons, self.process = {}, None
        self.table, self.measured, self.exported, self.status = (widgets.HTML() for _ in range(4))
        self.watched, self._hidden = widgets.VBox(), widgets.Output()
        self._teacher, self._size = cache(_empty_teacher), cache(_size)  # the slowest parts of a refresh

        for control in (*self.controls.values(), *self.widths.values(), self.by):
            control.observe(lambda _change: self.refresh(), "value")
        actions = {"measure": self._measure, "export": self._export, "run": self._run, "stop": self._stop}
        for name, action in actions.items():
            label, tooltip = BUTTONS[name]
            self.buttons[name] = widgets.Button(description=label, tooltip=tooltip, layout={"width": "auto"})
            self.buttons[name].on_click(lambda _button, action=action: self._attempt(action))
        groups = {heading: [self.controls[name] for name in names.split()] for heading, names in GROUPS.items()}
        groups["Shape"] = [self.by, groups["Shape"][0], *self.widths.values(), *groups["Shape"][1:]]
        rows = [[_group(*group) for group in groups.items()], [self.table, self.picture], self.buttons.values()]
        boxes = [widgets.Box([*row], layout=WRAPPED) for row in rows]
        self.children = [*boxes, self.measured, self.exported, self.status, self.watched]
        self.refresh()

    def refresh(self) -> None:
        """Show the sizes that the controls give, or why they are impossible. Loads no weights."""
        self.controls["target"].disabled = self.by.value == SHAPE
        for control in self.widths.values():
            control.disabled = self.by.value == FRACTION
        self.measured.value = self.exported.value = ""  # they describe the previous choice
        try:
            self._show()
        except (ValueError, OSError) as error:
            self.config = None
            self.alt = f"This choice is impossible: {error}"
            self.table.value, self.picture.png, self.picture.alt = alert(str(error)), b"", ""
        self._enable()

    def _show(self) -> None:
        """Raises OSError or ValueError if the choice is impossible."""
        values = {name: control.value for name, control in self.controls.items()}
        places = {name: _place(name, values.pop(name)) for name in ("teacher", "corpus", "run_dir")}
        length = values.pop("length")
        if self.by.value == SHAPE:
            values["target"] = Widths(**{name: control.value or None for name, control in self.widths.items()})
        config, teacher = DistillConfig(**values), self._teacher(places["teacher"])
        check_length(length, teacher)
        check_reachable(places["corpus"], lambda: None, "data set")
        shapes = {"teacher": Widths.of(teacher), "student": config.shape(teacher)}
        sizes = pd.DataFrame({name: self._size(teacher, shape, length) for name, shape in shapes.items()})
        sizes["student / teacher"] = sizes["student"] / sizes["teacher"]
        self.sizes = sizes.loc[list(ROWS)].rename(index=ROWS)
        self.config, self.configuration = config, places | {"length": length} | config.to_dict()
        title = f"Student of {places['teacher']}; GFLOP: one forward pass of {length} tokens, without the head"
        self.table.value = table(self.sizes, title)
        figure = plot_schedule(config, teacher)
        plt.close(figure)
        self.picture.show(drawn(figure), _kept(figure))
        settings = yaml.safe_dump(self.configuration, sort_keys=False)
        self.alt = f"{title}\n{self.sizes.map(number).to_string()}\n\n{settings}"

    def notebook_parameters(self) -> dict:
        """The parameters of the quickstart notebook, all others in `settings`."""
        settings = dict(self.configuration)
        names = ("teacher", "corpus", "length", "steps", "batch_size", "learning_rate", "seed")
        values = {name: settings.pop(name) for name in names} | {"runs": str(Path(settings.pop("run_dir")).parent)}
        if self.by.value == FRACTION:
            values["ratio"] = settings.pop("target")
        return values | {"settings": settings}

    def _enable(self) -> None:
        running = self.process is not None and self.process.poll() is None
        for button in self.buttons.values():
            button.disabled = self.config is None
        self.buttons["run"].disabled |= running
        self.buttons["stop"].disabled = not running

    def _attempt(self, action: Callable[[], None]) -> None:
        """Run the action of a button; show an error as an alert."""
        try:
            action()
        except ERRORS as error:
            self.exported.value = alert(str(error))
        self._enable()

    def _measure(self) -> None:
        self.measured.value, self.buttons["measure"].disabled = status("Measuring 24 steps ..."), True
        with self._hidden, torch.random.fork_rng():  # no progress bars; the global random state does not change
            self.measured.value = self._projection()

    def _projection(self) -> str:
        teacher = self._teacher(self.configuration["teacher"])
        try:
            found = project(type(teacher)(teacher.config), self.config, self.configuration["length"])
        except ERRORS as error:  # here, because an Output catches all exceptions
            return alert(str(error))
        return status(
            f"On this machine the run would take {duration(3600 * found.hours)}, at {found.tokens_per_second:,.0f} "
            f"tokens per second, and use at most {found.gigabytes:.2f} GB of memory."
        )

    def _export(self) -> None:
        configuration = self._write(".yaml", self.configuration)
        parameters = self._write(".papermill.yaml", self.notebook_parameters())
        lines = [
            ["accelerate", "launch", "-m", "hdlib", configuration],
            ["python", "-m", "hdlib", configuration],
            ["papermill", QUICKSTART, configuration.with_suffix(".ipynb"), "-f", parameters],
        ]
        commands = escape("\n".join(shlex.join(map(str, line)) for line in lines))
        self.exported.value = status("In several processes, in one, or as a notebook:") + f"<pre>{commands}</pre>"

    def _write(self, ending: str, values: dict) -> Path:
        """Write a YAML file beside the run folder."""
        path = Path(self.configuration["run_dir"] + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        return path

    def _run(self) -> None:
        configuration = self._write(".yaml", self.configuration)
        command, log = [sys.executable, "-m", "hdlib", configuration, "--resume"], configuration.with_suffix(".log")
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self.status.value = status(f"Process {self.process.pid} has started. Its output goes to {log}.")
        self.watched.children = [Watch(self.configuration["run_dir"])]
        Thread(target=self._wait, args=(self.process, log), daemon=True).start()

    def _stop(self) -> None:
        self.process.terminate()
        self.status.value = status("The run will stop after the current step, with a checkpoint.")

    def _wait(self, process: subprocess.Popen, log: Path) -> None:
        """Show how a process ended."""
        code = process.wait()
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        if code == 0:
            self.status.value = status(f"The run has finished. {last}")
        elif code in (143, -15):  # SIGTERM, after a step or before the first
            self.status.value = status("The run has stopped. Press Run to resume it.")
        else:
            self.status.value = alert(f"The run failed with exit status {code}: {last} Read its output in {log}.")
        self._enable()


def _control(name: str, field: Field) -> widgets.Widget:
    """The control for a setting. DistillConfig checks the value more closely than these bounds."""
    default, least = field.default, field.metadata["least"] or 0
    look = {"value": default, "description": name.replace("_", " "), "tooltip": field.metadata["help"]}
    look |= {"style": {"description_width": "8em"}, "layout": {"width": "19em"}}
    if isinstance(default, bool):
        return widgets.Checkbox(indent=True, **look)
    if name in OPTIONS:
        return widgets.Dropdown(options=OPTIONS[name], **look)
    if isinstance(default, str):
        return widgets.Text(continuous_update=False, **look)
    if isinstance(default, int):
        return widgets.BoundedIntText(min=least, max=2**31 - 1, step=ARROWS.get(name, 1), **look)
    return widgets.BoundedFloatText(min=0, max=1, step=ARROWS.get(name, 0.05), **look)


def _group(heading: str, controls: list[widgets.Widget]) -> widgets.VBox:
    title = widgets.HTML(f'<h4 style="margin: 0">{heading}</h4>')
    return widgets.VBox([title, *controls], layout={"margin": "0 1em 0.5em 0"})


def _place(name: str, text: str) -> str:
    """What a control names; a path on this machine as absolute path, for use from another folder."""
    path = Path(text.strip()).expanduser()
    if not text.strip() or not path.resolve().name:
        raise ValueError(f"{name} {text!r} is not a name: enter {PLACES[name].metadata['help']}")
    return str(path.resolve()) if name == "run_dir" or (text != "embedded" and path.exists()) else text.strip()


def _empty_teacher(name: str) -> PreTrainedModel:
    """A model in the teacher's shape, without weights. Raises OSError or ValueError if it cannot be narrowed."""
    config = shape_of(name)
    with torch.device("meta"):
        return language_model_class(config).from_config(config)


def _size(teacher: PreTrainedModel, widths: Widths, length: int) -> dict[str, float]:
    model = stock_model(teacher, widths)
    return asdict(widths) | parameters(model) | {"gflop": flops(model.config, length) / 1e9}


def _kept(figure: Figure) -> str:
    """The text alternative of a schedule."""
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    kept = [f"{name} {y[0]:.0%}, {y[len(y) // 2]:.0%}, {y[-1]:.0%}" for name, y in curves.items()]
    return f"Kept fraction of the widths at the start, halfway and at the end: {'; '.join(kept) or 'all of them'}."
