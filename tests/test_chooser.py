"""The chooser shows the true sizes, exports the chosen settings, and its buttons start and stop a run."""

import dataclasses
import json
import re
import shlex
import signal
import sys
import time
from html import escape, unescape
from pathlib import Path

import ipywidgets as widgets
import papermill
import pytest
import yaml

import hdlib
from hdlib import DistillConfig, Widths
from hdlib.__main__ import PLACES, read
from hdlib.config import PAPER
from hdlib.lab.cost import Projection
from hdlib.lab.widgets import chooser
from hdlib.lab.widgets.chooser import FRACTION, QUICKSTART, ROWS, SHAPE, Chooser

from conftest import execute_notebook, flops_once, full

MODULE = sys.modules[Chooser.__module__]

CHOICES = {
    "the defaults": {},
    "a fraction": {
        "target": 0.5,
        "steps": 300,
        "learning_rate": 2e-3,
        "schedule": "linear",
        "multiple_of": 4,
        "seed": 3,
    },
    "a shape": {"target": Widths(hidden=96, ffn=500), "prune_every": 3, "prune_start": 0.1, "prune_end": 0.5},
    "whole heads": {"target": Widths(hidden=120, heads=8, head_dim=15), "batch_size": 7, "micro_batch_size": 2},
    "under masks": PAPER | {"masked": True, "scorer": "magnitude", "precision": "float32", "eval_every": 7},
    "from scratch": {"initial": "random", "schedule": "one_shot", "learning_rate": 1e-6},
}
SOME = {"a shape"}  # in the default set


def choose(widget, **values):
    """Set controls as a user does; a target may be Widths."""
    target = values.get("target")
    if isinstance(target, Widths):
        widget.by.value = SHAPE
        for name, width in vars(target).items():
            widget.widths[name].value = width or 0
        del values["target"]
    elif target is not None:
        widget.by.value = FRACTION
    for name, value in values.items():
        widget.controls[name].value = value
    return widget


def until(true, seconds=1200):
    """Wait for another process, even on a busy machine."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    monkeypatch.setattr(MODULE, "flops", flops_once)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """A chooser and the first values of its controls, for tests that put them back."""
    found = chooser(tmp_path_factory.mktemp("unchanged") / "runs")
    return found, {name: control.value for name, control in found.controls.items()}


@pytest.fixture
def widget(tmp_path):
    found = chooser(tmp_path / "runs")
    yield found
    if found.process is not None and found.process.poll() is None:
        found.process.kill()


@pytest.mark.parametrize("name", [*sorted(SOME), *full(*sorted(CHOICES.keys() - SOME))])
def test_the_table_shows_what_narrowing_gives(widget, name):
    choose(widget, length=64, **CHOICES[name])
    teacher, _ = hdlib.load_teacher()
    student, _ = hdlib.load_teacher()
    hdlib.narrow(student, DistillConfig(**CHOICES[name]).shape(teacher))
    for column, model in {"teacher": teacher, "student": student}.items():
        found = vars(Widths.of(model)) | hdlib.lab.cost.parameters(model)
        found |= {"gflop": hdlib.lab.cost.flops(model.config, 64) / 1e9}
        for row, value in found.items():
            assert widget.sizes.loc[ROWS[row], column] == value, row
            shown = f"{value:.4g}" if row == "gflop" else f"{value:,}"
            assert re.search(rf"{ROWS[row]}</th>.*?>{shown}</td>", widget.table.value), (row, shown)
    ratio = hdlib.lab.cost.parameters(student)["encoder"] / hdlib.lab.cost.parameters(teacher)["encoder"]
    assert f">{ratio:.4g}</td>" in widget.table.value
    assert "alert" not in widget.table.value and not widget.buttons["run"].disabled


IMPOSSIBLE = {
    "random under masks": ({"initial": "random", "masked": True}, "initial='random' starts at the target shape"),
    "an uneven hidden width": ({"target": Widths(hidden=100, heads=12, head_dim=8)}, "take hidden=96 or"),
    "wider than the teacher": ({"target": Widths(hidden=360)}, "from 1 to the model's 180"),
    "an end before its start": ({"prune_start": 0.8, "prune_end": 0.2}, "pruning must start before it ends"),
    "too few steps": ({"steps": 3, "prune_start": 0.5, "prune_end": 0.55}, "lies between them; raise steps"),
    "no such multiple": ({"multiple_of": 1000}, "no multiple of 1000 at or below"),
    "blocks too long": ({"length": 136}, "blocks have 136 tokens, the teacher only 128 positions"),
    "a teacher that is not there": ({"teacher": "./no/<teacher>"}, "there is no file or folder ./no/<teacher>"),
    "a corpus that is not there": ({"corpus": "/no/<corpus>"}, "there is no file or folder /no/<corpus>"),
    "no teacher": ({"teacher": " "}, "teacher ' ' is not a name: enter embedded, a local folder"),
    "no folder": ({"run_dir": ""}, "run_dir '' is not a name"),
    "a folder without a name": ({"run_dir": "/"}, "run_dir '/' is not a name: enter the folder of the run"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_choice_gives_a_message_and_starts_nothing(unchanged, name, capsys):
    widget, first = unchanged
    before = widget.table.value
    values, message = IMPOSSIBLE[name]
    choose(widget, **values)
    assert message in widget.alt and escape(message) in widget.table.value
    assert 'role="alert"' in widget.table.value and "<table" not in widget.table.value
    assert all(button.disabled for button in widget.buttons.values()) and widget.config is None
    assert message in widget._repr_mimebundle_()["text/plain"]
    widget.by.value = FRACTION
    assert "Traceback" not in "".join(capsys.readouterr())
    choose(widget, **{each: first[each] for each in values})
    assert widget.table.value == before and not widget.buttons["export"].disabled, "the first choice again"


def test_a_folder_that_holds_no_model_and_a_family_without_a_table(widget, tmp_path):
    choose(widget, teacher=str(tmp_path))
    assert "no language model could be read from" in widget.alt and widget.buttons["measure"].disabled
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    choose(widget, teacher=f"{tmp_path}/")
    assert "no width groups are declared for the architecture 't5'" in widget.alt


def test_controls_have_the_defaults_and_descriptions_of_the_library(widget):
    assert widget.config == DistillConfig()
    assert all(widget.controls[name].value == PLACES[name] for name in ("teacher", "corpus", "length"))
    assert widget.controls["schedule"].options == tuple(hdlib.config.SCHEDULES)
    assert widget.controls["scorer"].options == tuple(hdlib.config.SCORERS)
    everything = [*widget.controls.values(), *widget.widths.values(), widget.by, *widget.buttons.values()]
    assert all(each.description and each.tooltip for each in everything)
    kinds = (widgets.Text, widgets.Dropdown, widgets.Checkbox, widgets.BoundedIntText, widgets.BoundedFloatText)
    assert all(isinstance(each, (*kinds, widgets.Button)) for each in everything), "all of them work with the keyboard"
    descriptions = {field.name: field.metadata["help"] for field in dataclasses.fields(DistillConfig)}
    assert all(widget.controls[name].tooltip == descriptions[name] for name in widget.controls if name not in PLACES)
    choose(widget, steps=-5, learning_rate=7.0, length=1)
    assert [widget.controls[name].value for name in ("steps", "learning_rate", "length")] == [1, 1.0, 8], "bounded"
    assert widget.widths["hidden"].disabled and not widget.controls["target"].disabled
    widget.by.value = SHAPE
    assert not widget.widths["hidden"].disabled and widget.controls["target"].disabled


@pytest.mark.parametrize("name", [*sorted(SOME), *full(*sorted(CHOICES.keys() - SOME))])
def test_exported_files_hold_the_chosen_settings(widget, name, tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    folder = tmp_path / "some runs" / "third.0.33"
    choose(widget, corpus=text_file.name, length=32, run_dir=str(folder), **CHOICES[name])
    widget.buttons["export"].click()
    monkeypatch.chdir(tmp_path)  # the files hold absolute paths
    places, config = read(folder.with_name("third.0.33.yaml"))
    assert config == widget.config == DistillConfig(**CHOICES[name])
    assert (places["teacher"], places["corpus"], places["length"]) == ("embedded", str(text_file), 32)
    assert Path(places["run_dir"]) == folder
    taken = yaml.safe_load(folder.with_name("third.0.33.papermill.yaml").read_text())
    assert taken.keys() <= papermill.inspect_notebook(QUICKSTART).keys()
    own = {field: taken[field] for field in ("steps", "batch_size", "learning_rate", "seed")}
    own |= {"target": taken["ratio"]} if "ratio" in taken else {}
    assert not own.keys() & taken["settings"].keys() and DistillConfig(**own | taken["settings"]) == config
    assert (taken["runs"], taken["corpus"], taken["length"]) == (str(folder.parent), str(text_file), 32)
    (shown,) = re.findall("<pre>(.*)</pre>", widget.exported.value, re.S)
    launch, plain, notebook = (shlex.split(line) for line in unescape(shown).splitlines())
    command = ["-m", "hdlib", str(folder.with_name("third.0.33.yaml"))]
    assert launch == ["accelerate", "launch", *command] and plain == ["python", *command]
    assert notebook[:2] == ["papermill", str(QUICKSTART)] and Path(notebook[1]).exists()
    assert notebook[3:] == ["-f", str(folder.with_name("third.0.33.papermill.yaml"))]
    choose(widget, seed=widget.config.seed + 1)
    assert widget.exported.value == "", "the files hold the previous settings"


@pytest.mark.notebooks
def test_the_notebook_runs_the_exported_settings(widget, tmp_path, text_file):
    places = {"corpus": str(text_file), "length": 16, "run_dir": str(tmp_path / "out" / "one")}
    chosen = {"steps": 12, "batch_size": 2, "prune_every": 2, "target": Widths(hidden=96), "scorer": "magnitude"}
    choose(widget, precision="float32", **places, **chosen)
    widget.buttons["export"].click()
    parameters = yaml.safe_load((tmp_path / "out" / "one.papermill.yaml").read_text())
    execute_notebook(QUICKSTART, tmp_path / "done.ipynb", parameters, tmp_path)
    (description,) = (tmp_path / "out").glob("quickstart-*/run.json")
    ran = json.loads(description.read_text())["arguments"]
    assert DistillConfig(**ran["config"]) == widget.config and ran["blocks"]["length"] == 16


@pytest.mark.full  # the projection itself is tested in test_cost
def test_time_and_memory_are_measured_on_this_machine(widget, monkeypatch):
    monkeypatch.setattr(hdlib.lab.cost, "STEPS", 6)
    button = widget.buttons["measure"]
    choose(widget, batch_size=2, length=16, precision="float32")
    button.click()
    text = r"would take ([\d.]+) (seconds|minutes), at ([\d,]+) tokens per second, and use at most ([\d.]+) GB"
    found = re.search(text, widget.measured.value)
    minutes = float(found[1]) / (60 if found[2] == "seconds" else 1)
    assert float(found[3].replace(",", "")) == pytest.approx(1000 * 2 * 16 / minutes / 60, rel=0.3)
    assert 0.05 < float(found[4]) < 2

    def projected(teacher, config, length):
        assert (config, length, Widths.of(teacher).hidden) == (widget.config, 32, 180)
        assert button.disabled and "Measuring" in widget.measured.value
        return Projection(30.0, 1234.0, 1.0, 1.0, 2.5)

    monkeypatch.setattr(MODULE, "project", projected)
    choose(widget, length=32)
    assert widget.measured.value == "", "it belongs to the previous settings"
    button.click()
    assert "would take 30.0 hours, at 1,234 tokens per second, and use at most 2.50 GB" in widget.measured.value
    assert not button.disabled

    def too_large(*_):
        raise MemoryError("memory does not suffice: <lower> batch_size")

    monkeypatch.setattr(MODULE, "project", too_large)
    button.click()
    assert "&lt;lower&gt; batch_size" in widget.measured.value and 'role="alert"' in widget.measured.value
    assert not button.disabled


def test_the_text_fallback_holds_the_choice_and_its_sizes(widget):
    bundle = choose(widget, target=0.5, steps=123)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    text = bundle["text/plain"]
    for row in (r"hidden +180 +90 ", r"parameters of the encoder +2,346,840 ", "steps: 123", "teacher: embedded"):
        assert re.search(f"^{row}", text, re.M)
    assert f"{widget.sizes.loc[ROWS['gflop'], 'student']:.4g}" in text


def small_run(widget, tmp_path, text_file, **values):
    small = {
        "batch_size": 2,
        "length": 16,
        "precision": "float32",
        "prune_every": 2,
        "corpus": str(text_file),
    }
    return choose(widget, **small | {"run_dir": str(tmp_path / "new" / "small")} | values)


@pytest.mark.full
def test_run_starts_a_run_that_finishes(widget, tmp_path, text_file, monkeypatch):
    shown = []
    monkeypatch.setattr(MODULE, "Watch", lambda folder: shown.append(folder) or widgets.HTML())
    small_run(widget, tmp_path, text_file, steps=3)
    widget.buttons["run"].click()
    assert widget.buttons["run"].disabled and not widget.buttons["stop"].disabled, "one at a time"
    assert shown == [widget.configuration["run_dir"]] and len(widget.watched.children) == 1
    until(lambda: "finished" in widget.status.value or "alert" in widget.status.value)
    run = hdlib.Run.load(tmp_path / "new" / "small")
    assert "The run has finished" in widget.status.value and run.finished, widget.status.value
    assert DistillConfig(**run.arguments["config"]) == widget.config
    assert "student: " in (tmp_path / "new" / "small.log").read_text()
    until(lambda: not widget.buttons["run"].disabled)
    assert widget.buttons["stop"].disabled


@pytest.mark.full
def test_run_in_the_folder_of_another_run_names_the_difference(widget, tmp_path, text_file):
    small_run(widget, tmp_path, text_file, steps=8)
    hdlib.Run.start(tmp_path / "new" / "small", {"config": widget.config.to_dict() | {"steps": 6}})
    widget.buttons["run"].click()
    until(lambda: "alert" in widget.status.value)
    assert "steps was 6, is 8" in widget.status.value


@pytest.mark.full
def test_stop_writes_a_checkpoint_and_run_resumes_it(widget, tmp_path, text_file):
    small_run(widget, tmp_path, text_file, steps=100_000)
    stopped_at = []
    for _ in range(2):
        begun = stopped_at[-1] if stopped_at else 0
        widget.buttons["run"].click()
        run = hdlib.Run(tmp_path / "new" / "small")
        until(
            lambda run=run, begun=begun: (
                (run.begun and len(run.records()) > begun + 3) or "alert" in widget.status.value
            )
        )
        widget.buttons["stop"].click()
        assert widget.process.wait(600) == 128 + signal.SIGTERM
        until(lambda: "Press Run to resume it" in widget.status.value)
        stopped_at.append(int(run.checkpoints()[-1].name.removeprefix("step_")))
        until(lambda: not widget.buttons["run"].disabled)
        assert widget.buttons["stop"].disabled
    assert 0 < stopped_at[0] < stopped_at[1] < 1000
    assert [record["step"] for record in run.records()] == list(range(stopped_at[1] + 1)), "no step twice"


def test_a_folder_that_cannot_be_written_gives_a_message(widget, tmp_path):
    (tmp_path / "file").write_text("")
    choose(widget, run_dir=str(tmp_path / "file" / "run"))
    widget.buttons["export"].click()
    assert 'role="alert"' in widget.exported.value and "file" in widget.exported.value
    widget.buttons["run"].click()
    assert widget.process is None and not widget.buttons["run"].disabled
