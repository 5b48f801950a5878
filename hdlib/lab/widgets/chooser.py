"""A run chosen by controls: what its settings come to before it starts, its files, and its start and stop."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from functools import cache
from html import escape
from inspect import signature
from pathlib import Path
from threading import Thread

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
import yaml
from transformers import PreTrainedModel

from ...config import CHOICES, DistillConfig
from ...corpus import SHORTEST, check_there, load_corpus
from ...models import check_length, language_model_class, load_teacher, shape_of
from ...narrowing import empty_stock_model
from ...widths import Widths
from ..cost import Projection, flops, parameters, project
from ..plots import plot_schedule
from .describe import Shown, alert, status
from .picture import Picture, drawn
from .watch import watch

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "00_quickstart.ipynb"
FRACTION, SHAPE = "a fraction", "a shape"
GROUPS = {  # what is chosen first, under its heading: places, and fields of DistillConfig
    "Places": ("teacher", "corpus", "length", "run_dir"),
    "Shape": ("target", "multiple_of", "initial"),
    "Narrowing": ("schedule", "prune_start", "prune_end", "prune_every", "scorer", "masked"),
    "Training": ("steps", "batch_size", "micro_batch_size", "learning_rate", "precision", "seed", "eval_every"),
}
RANGES = {  # what can be typed: the least, the most, and the step of the arrow keys
    "length": (SHORTEST, 65536, 8),
    "target": (0.01, 1.0, 0.01),
    "multiple_of": (1, 1024, 1),
    "prune_start": (0.0, 1.0, 0.05),
    "prune_end": (0.0, 1.0, 0.05),
    "prune_every": (1, 10**6, 1),
    "steps": (1, 10**7, 100),
    "batch_size": (1, 10**6, 8),
    "micro_batch_size": (0, 10**6, 8),
    "learning_rate": (1e-7, 1.0, 1e-4),
    "seed": (0, 2**31 - 1, 1),
    "eval_every": (1, 10**6, 10),
}
PLACES = {
    "teacher": "embedded, a local folder, or a model's name on the hub",
    "corpus": "embedded, a file or folder of txt, jsonl or parquet, or the name of a data set on the hub",
    "length": "S, tokens a block",
    "run_dir": "the folder that the run will write; its configuration is written beside it",
}
WIDTHS = {
    "hidden": "hidden width; 0: as the teacher's, or what follows from the others",
    "ffn": "feed-forward width; 0: as the teacher's",
    "heads": "attention heads a layer; 0: as the teacher's, or what follows from the others",
    "head_dim": "dimensions of a head; 0: as the teacher's, or what follows from the others",
}
BUTTONS = {
    "measure": (
        "Measure time and memory",
        "Two dozen steps on this machine, with random text, tell what the run will take",
    ),
    "export": ("Export", "Write the configuration for the command line and the parameters for papermill"),
    "run": ("Run", "Start the run in a process of its own, or go on with one that was stopped"),
    "stop": ("Stop", "Let the run end after the step under way, with a checkpoint"),
}
ROWS = {  # a field of the sizes, in words
    "hidden": "hidden width",
    "ffn": "feed-forward width",
    "heads": "heads a layer",
    "head_dim": "dimensions a head",
    "total": "parameters",
    "encoder": "parameters of the encoder",
    "gflop": "GFLOP of a block",
}
CELL = "padding: 1px 8px"
STOPPED = (143, -15)  # exit statuses after SIGTERM: after a step, and before there was one


def chooser(folder: str | Path = "runs") -> Chooser:
    """Choose a run by controls, see at once what it comes to, export it, start and stop it.

    Args:
        folder: where run folders go.

    Returns:
        A widget. Its `controls` and `buttons` can be set and clicked from code too.
    """
    return Chooser(folder)


class Chooser(Shown):
    """What `chooser` returns.

    Attributes:
        controls: name to control: `teacher`, `corpus`, `length` and `run_dir`, and the fields of DistillConfig.
        by: whether `target` is a fraction, or the shape of `widths`.
        widths: name to control; 0 leaves a width to the others.
        buttons: `measure`, `export`, `run`, `stop`.
        config: the DistillConfig that is chosen; None while it is none that can be.
        sizes: the table that is shown, a row for each of ROWS; empty while nothing can be had.
        problem: why nothing can be had, in words; "" if all is well.
        process: of the run that was started last; None before.
    """

    def __init__(self, folder: str | Path = "runs"):
        self.controls, self.widths = _controls(Path(folder)), {name: _width(name) for name in WIDTHS}
        tooltip = "Whether the student's widths are a fraction of the teacher's, or given one by one"
        self.by = widgets.Dropdown(options=[FRACTION, SHAPE], description="target is", tooltip=tooltip, **_look())
        self.buttons = {
            name: widgets.Button(description=label, tooltip=tooltip, layout={"width": "auto"})
            for name, (label, tooltip) in BUTTONS.items()
        }
        self.table, self.measured, self.told, self.status = (widgets.HTML() for _ in range(4))
        self.picture, self.watched, self._unseen = Picture(), widgets.VBox(), widgets.Output()
        self.config, self.sizes, self.problem, self.process = None, pd.DataFrame(), "", None
        self._outline, self._sizes = cache(_outline), cache(_sizes)  # asked for at every change

        for control in (*self.controls.values(), *self.widths.values(), self.by):
            control.observe(lambda _change: self.refresh(), "value")
        actions = {"measure": self._measure, "export": self._export, "run": self._run, "stop": self._stop}
        for name, action in actions.items():
            self.buttons[name].on_click(lambda _button, action=action: self._said(action))
        groups = {heading: [self.controls[name] for name in names] for heading, names in GROUPS.items()}
        groups["Shape"] = [self.by, groups["Shape"][0], *self.widths.values(), *groups["Shape"][1:]]
        settings = widgets.Box([_group(*group) for group in groups.items()], layout={"flex_flow": "row wrap"})
        buttons = widgets.Box([*self.buttons.values()], layout={"flex_flow": "row wrap"})
        sizes = widgets.Box([self.table, self.picture], layout={"flex_flow": "row wrap"})
        super().__init__([settings, sizes, buttons, self.measured, self.told, self.status, self.watched], "")
        self.refresh()

    def refresh(self) -> None:
        """Say what the controls come to. No weights are loaded."""
        self.controls["target"].disabled = self.by.value == SHAPE
        for control in self.widths.values():
            control.disabled = self.by.value == FRACTION
        self.measured.value = self.told.value = ""  # of other settings
        self.config, self.sizes, self.problem = None, pd.DataFrame(), ""
        try:
            config = self._chosen()
            teacher = self._outline(self.place("teacher"))
            check_length(self.length, teacher)
            check_there(self.place("corpus"))
            self.beside(".yaml")  # refuses a folder without a name
            self.sizes = self._sizes(teacher, config.shape(teacher), self.length)
            self.config = config
            self.table.value = _html(self.sizes, self.place("teacher"), self.length)
            figure = plot_schedule(config, teacher)
            plt.close(figure)
            self.picture.show(drawn(figure), _course(config, teacher))
        except (ValueError, OSError) as error:
            self.problem = str(error)
            self.table.value, self.picture.png, self.picture.alt = alert(self.problem), b"", ""
        self.alt = self.words()
        self._enable()

    def _chosen(self) -> DistillConfig:
        """Raises ValueError for what cannot be."""
        values = {name: control.value for name, control in self.controls.items() if name not in PLACES}
        if self.by.value == SHAPE:
            values["target"] = Widths(**{name: control.value or None for name, control in self.widths.items()})
        return DistillConfig(**values)

    @property
    def length(self) -> int:
        return self.controls["length"].value

    @property
    def run_dir(self) -> Path:
        """Where the run will write, from the root on. Raises ValueError if that has no name."""
        return Path(self.place("run_dir")).expanduser().resolve()

    def place(self, name: str) -> str:
        """Teacher, corpus or run folder; what is there on this machine from the root on, so that it is found again.

        Raises:
            ValueError: the control is empty.
        """
        said = self.controls[name].value.strip()
        if not said:
            raise ValueError(f"{name.replace('_', ' ')} is empty: {PLACES[name]}")
        path = Path(said).expanduser()
        return str(path.resolve()) if said != "embedded" and path.exists() else said

    def beside(self, ending: str) -> Path:
        """A file beside the run folder, of its name."""
        return self.run_dir.with_name(self.run_dir.name + ending)

    def configuration(self) -> dict:
        """What `python -m hdlib` takes."""
        places = {name: self.place(name) for name in ("teacher", "corpus")} | {"length": self.length}
        return places | self.config.to_dict() | {"run_dir": str(self.run_dir)}

    def notebook_parameters(self) -> dict:
        """What the quickstart notebook takes: its own parameters, and in `settings` all others."""
        settings = self.configuration()
        named = ("teacher", "corpus", "length", "steps", "batch_size", "learning_rate", "seed")
        taken = {name: settings.pop(name) for name in named}
        taken["runs"] = str(Path(settings.pop("run_dir")).parent)
        if not isinstance(self.config.target, Widths):
            taken["ratio"] = settings.pop("target")
        return taken | {"settings": settings}

    def words(self) -> str:
        """What was chosen and what it comes to, for where no widget can be shown."""
        if self.problem:
            return f"What was chosen cannot be: {self.problem}"
        rows = [f"{label}: {_number(row.iloc[0])} -> {_number(row.iloc[1])}" for label, row in self.sizes.iterrows()]
        chosen = [f"{name}={value}" for name, value in self.configuration().items() if name in self.controls]
        return f"A student of {self.place('teacher')}\n{'; '.join(rows)}\nchosen: {', '.join(chosen)}"

    @property
    def png(self) -> bytes:
        return b"" if self.problem else self.picture.png

    def _enable(self) -> None:
        running = self.process is not None and self.process.poll() is None
        for name, button in self.buttons.items():
            button.disabled = self.config is None or (running and name == "run")
        self.buttons["stop"].disabled = not running

    def _said(self, action) -> None:
        """Do what a button asks for; what goes wrong is said."""
        try:
            action()
        except (ValueError, OSError, MemoryError, ArithmeticError) as error:
            self.told.value = alert(str(error))
        self._enable()

    def _measure(self) -> None:
        button = self.buttons["measure"]
        button.description, button.disabled = "Measuring, two dozen steps ...", True
        try:
            config = shape_of(self.place("teacher"))
            with self._unseen, torch.random.fork_rng():  # unseen: progress bars
                self.measured.value = self._projected(language_model_class(config).from_config(config))
        finally:
            button.description = BUTTONS["measure"][0]

    def _projected(self, teacher: PreTrainedModel) -> str:
        try:
            return _projection(project(teacher, self.config, self.length))
        except (ValueError, OSError, MemoryError, ArithmeticError) as error:
            return alert(str(error))

    def _export(self) -> None:
        configuration = _written(self.beside(".yaml"), self.configuration())
        notebook = _written(self.beside(".papermill.yaml"), self.notebook_parameters())
        lines = [
            ["accelerate", "launch", "-m", "hdlib", configuration],
            ["python", "-m", "hdlib", configuration],
            ["papermill", QUICKSTART, self.beside(".ipynb"), "-f", notebook],
        ]
        shown = "\n".join(shlex.join(map(str, line)) for line in lines)
        said = status("In several processes, in one, or as a notebook:")
        self.told.value = f"{said}<pre>{escape(shown)}</pre>"

    def _run(self) -> None:
        configuration, log = _written(self.beside(".yaml"), self.configuration()), self.beside(".log")
        command = [sys.executable, "-m", "hdlib", str(configuration), "--resume"]
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self.status.value = status(f"Process {self.process.pid} runs; it writes what it says to {log}.")
        self.watched.children = [watch(self.run_dir)]
        Thread(target=self._wait, args=(self.process, log), daemon=True).start()

    def _stop(self) -> None:
        self.process.terminate()
        self.status.value = status("The run will stop after the step under way, with a checkpoint.")

    def _wait(self, process: subprocess.Popen, log: Path) -> None:
        """Say how a process ended, when it has."""
        code = process.wait()
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        if code == 0:
            self.status.value = status(f"The run has finished. {last}")
        elif code in STOPPED:
            self.status.value = status("The run has stopped; Run goes on with it.")
        else:
            self.status.value = alert(f"The run ended with status {code}: {last} More is in {log}.")
        self._enable()


def _controls(folder: Path) -> dict[str, widgets.Widget]:
    """A control for every name in GROUPS, with the default that the library has for it."""
    corpus = signature(load_corpus).parameters
    default = {name: corpus[name].default for name in ("name_or_path", "length")}
    default |= {"teacher": signature(load_teacher).parameters["name_or_path"].default}
    default |= {"corpus": default.pop("name_or_path"), "run_dir": str(folder / "chosen")}
    default |= {field.name: field.default for field in fields(DistillConfig)}
    meaning = PLACES | {field.name: field.metadata["help"] for field in fields(DistillConfig)}
    return {name: _control(name, default[name], meaning[name]) for names in GROUPS.values() for name in names}


def _control(name: str, default, meaning: str) -> widgets.Widget:
    said = {"value": default, "description": name.replace("_", " "), "tooltip": meaning} | _look()
    if isinstance(default, bool):
        return widgets.Checkbox(indent=True, **said)
    if name in CHOICES:
        return widgets.Dropdown(options=CHOICES[name], **said)
    if isinstance(default, str):
        return widgets.Text(continuous_update=False, **said)
    least, most, step = RANGES[name]
    kind = widgets.BoundedIntText if isinstance(default, int) else widgets.BoundedFloatText
    return kind(min=least, max=most, step=step, **said)


def _width(name: str) -> widgets.BoundedIntText:
    said = {"description": name.replace("_", " "), "tooltip": WIDTHS[name]}
    return widgets.BoundedIntText(value=0, min=0, max=10**6, **said | _look())


def _look() -> dict:
    return {"style": {"description_width": "8em"}, "layout": {"width": "19em"}}


def _group(heading: str, controls: list[widgets.Widget]) -> widgets.VBox:
    title = widgets.HTML(f'<h4 style="margin: 0">{heading}</h4>')
    return widgets.VBox([title, *controls], layout={"margin": "0 1em 0.5em 0"})


def _outline(teacher: str) -> PreTrainedModel:
    """A teacher without weights. Raises OSError or ValueError in words if there is none, or none to be narrowed."""
    config = shape_of(teacher)
    with torch.device("meta"):
        return language_model_class(config).from_config(config)


def _sizes(teacher: PreTrainedModel, target: Widths, length: int) -> pd.DataFrame:
    """ROWS of teacher and student, and the student's as a fraction of the teacher's."""
    table = pd.DataFrame(
        {"teacher": _size(teacher, Widths.of(teacher), length), "student": _size(teacher, target, length)}
    )
    table["student / teacher"] = table["student"] / table["teacher"]
    return table.loc[list(ROWS)].rename(index=ROWS)


def _course(config: DistillConfig, teacher: PreTrainedModel) -> str:
    """When neurons go, in words."""
    if config.initial == "random":
        return "The student has its shape from the first step on."
    target, wide = config.shape(teacher), Widths.of(teacher)
    halfway = config.widths_at(config.steps // 2, teacher, target)
    return (
        f"Of {config.steps:,} steps, neurons go between {config.prune_start:.0%} and {config.prune_end:.0%}, on the "
        f"{config.schedule} schedule: hidden width {wide.hidden} at first, {halfway.hidden} halfway, "
        f"{target.hidden} in the end."
    )


def _size(teacher: PreTrainedModel, widths: Widths, length: int) -> dict[str, float]:
    model = empty_stock_model(teacher, widths)
    return asdict(widths) | parameters(model) | {"gflop": flops(model.config, length) / 1e9}


def _html(sizes: pd.DataFrame, teacher: str, length: int) -> str:
    header = "".join(f'<th scope="col" style="{CELL}">{column}</th>' for column in ("", *sizes.columns))
    rows = ""
    for label, row in sizes.iterrows():
        cells = "".join(f'<td style="{CELL}; text-align: right">{_number(value)}</td>' for value in row)
        rows += f'<tr><th scope="row" style="text-align: left">{label}</th>{cells}</tr>'
    caption = escape(f"A student of {teacher}; operations are those of one forward of {length} tokens, head left out")
    return f"<table><caption>{caption}</caption><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and value > 1 else f"{value:.3f}"


def _projection(found: Projection) -> str:
    return status(
        f"On this machine the run would take {_duration(found.hours)}, at {found.tokens_per_second:,.0f} tokens a "
        f"second, and hold {found.gigabytes:.2f} GB at most."
    )


def _duration(hours: float) -> str:
    minutes = hours * 60
    if minutes < 2:
        return f"{minutes * 60:.0f} seconds"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{hours:,.1f} hours"


def _written(path: Path, values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return path
