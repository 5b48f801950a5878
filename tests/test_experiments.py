"""The runner on a toy study: grid, failures, time limit, finished cells, Ctrl-C, and one-line error messages."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import hdlib
from experiments import __main__ as command
from experiments import report, runner, study
from experiments.study import ConfigError, Scale, Study
from hdlib.lab.study import ENOUGH

PARAMETERS = """
arms: list = ["good", "better"]  # which
seeds: list = [1]  # of chance
steps: int = 3  # how many
rate: float = 1e-3  # how fast
rates: list = [0.1]  # several
name: str = "toy"  # what for
loud: bool = False  # or not
runs: str = "runs"  # where to
results: str = "results"  # where to
draw_only: bool = False  # train nothing
"""
BODY = """
import csv, json, os, pathlib, time
trained, shared = [], pathlib.Path(runs)
shared.mkdir(parents=True, exist_ok=True)
for arm in arms:
    for seed in seeds:
        if draw_only and not (shared / f"{arm}-{seed}").exists():
            continue
        if not draw_only:
            print("PATIENCE" if arm == "slow" else "", flush=True)
            while arm == "slow" and not (shared / "enough").exists():
                time.sleep(0.1)
            if arm == "broken":
                raise ArithmeticError("this arm never works")
            if arm == "mortal" and not (shared / "died").exists():
                (shared / "died").write_text("")
                os._exit(1)
            (shared / f"{arm}-{seed}").write_text("done")
        trained.append((arm, seed, {"good": 2.0, "better": 1.0}.get(arm, 3.0) + seed / 10))
folder = pathlib.Path(results)
with (folder / "table.csv").open("w") as file:
    csv.writer(file).writerows([("arm", "seed", "kl"), *trained])
(folder / "figure.png").write_text("a figure")
(folder / "result.json").write_text(json.dumps({"trained": len(trained)}))
"""
STUDY = {
    "question": "Is better better than good?",
    "notebook": "90_toy",
    "grid": {"arms": ["good", "better"]},
    "seeds": [1, 2],
    "expectations": [{"claim": "better is better", "measure": "kl", "lower": "better", "higher": "good"}],
}


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A project of one notebook, one study and two scales; calling it rewrites study and scales."""
    notebooks, here = tmp_path / "notebooks", tmp_path / "experiments"
    for folder in (notebooks, here / "studies", here / "scales"):
        folder.mkdir(parents=True)
    cells = [new_markdown_cell("# Toy"), new_code_cell(PARAMETERS.strip(), metadata={"tags": ["parameters"]})]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(
        new_notebook(cells=[*cells, new_code_cell(BODY.strip())], metadata=kernel), notebooks / "90_toy.ipynb"
    )
    monkeypatch.setattr(study, "HERE", here)
    monkeypatch.setattr(study, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(runner, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(report, "estimate", lambda *arguments: "")
    monkeypatch.chdir(tmp_path)

    def write(changes=None, parameters=None, **scale):
        (here / "studies" / "toy.yaml").write_text(yaml.safe_dump(STUDY | (changes or {})))
        values = {"about": "a toy", "minutes": 1, "parameters": parameters or {}} | scale
        for name in ("smoke", "paper"):
            (here / "scales" / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "runs" / "toy" / "smoke"

    write()
    return write


def run(monkeypatch, *arguments) -> int | str:
    """The exit status of the command, or its error message."""
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    with pytest.raises(SystemExit) as exit:
        command.main()
    return exit.value.code


def test_a_grid_gives_a_table_and_a_figure(workshop, monkeypatch, capsys, tmp_path):
    folder = workshop({"grid": {}})
    (tmp_path / "kernels" / "python3").mkdir(parents=True)  # another kernel of that name, which does not start
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text('{"argv": ["false"], "display_name": "other"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert run(monkeypatch, "toy", "--jobs", "2") == 0
    names = {"seeds=1", "seeds=2"}
    assert {path.name for path in (folder / "cells").iterdir()} == names
    one = yaml.safe_load((folder / "cells" / "seeds=2" / "parameters.yaml").read_text())
    assert (one["arms"], one["seeds"], one["steps"], one["draw_only"]) == (["good", "better"], [2], 3, False)
    assert json.loads((folder / "cells" / "seeds=2" / "result.json").read_text()) == {"trained": 2}
    assert len(pd.read_csv(folder / "table.csv")) == 4 and (folder / "figure.png").exists()
    kept = json.loads((folder / "study.json").read_text())
    assert kept["parameters"]["steps"] == 3 and len(kept["table"]) == 4
    (answer,) = kept["answers"]
    assert answer["verdict"] == "exploratory" and answer["pairs"] == 2 and answer["difference"] == pytest.approx(1.0)
    assert "better is better: exploratory (kl +1.000 [+1.000, +1.000], seeds: 2)" in capsys.readouterr().out
    # Finished cells are not repeated.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*")}
    assert run(monkeypatch, "toy") == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/*")}


def test_every_job_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """Two cells at a time, twice."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    together, seen = threading.Barrier(2, timeout=20), []

    class Process:
        def __init__(self, command, env, **_):
            seen.append(env["CUDA_VISIBLE_DEVICES"])

        def wait(self, _):
            together.wait()

    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    ours = runner.Runner(Study("toy", "", tmp_path, {}, []), tmp_path, 1, jobs=2)
    folders = [tmp_path / "one", tmp_path / "other"]
    with ThreadPoolExecutor(2) as pool:
        for folder in folders:
            folder.mkdir()
        for _ in range(2):
            list(pool.map(ours._papermill, folders))
    assert sorted(seen[:2]) == sorted(seen[2:]) == ["3", "5"]


def test_jobs_share_the_cores_unless_the_caller_says_otherwise(tmp_path, monkeypatch):
    seen = []

    class Process:
        def __init__(self, command, env, **_):
            seen.append(env["OMP_NUM_THREADS"])

        def wait(self, _):
            return 0

    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 6)
    for given in (None, "1"):
        with monkeypatch.context() as context:
            context.delenv("OMP_NUM_THREADS")
            if given:
                context.setenv("OMP_NUM_THREADS", given)
            runner.Runner(Study("toy", "", tmp_path, {}, []), tmp_path, 1, jobs=2)._papermill(tmp_path)
    assert seen == ["3", "1"]


def test_a_failed_cell_is_reported_and_the_others_run(workshop, monkeypatch, capsys):
    folder = workshop({"grid": {"arms": ["broken", "better"]}, "seeds": [1]})
    assert run(monkeypatch, "toy") == 1
    output = capsys.readouterr().out
    assert "FAILED arms=broken,seeds=1: ArithmeticError: this arm never works (see " in output
    assert "1 of 2 cells are missing: arms=broken,seeds=1" in output
    assert {path.name for path in (folder / "cells").iterdir()} == {
        "arms=broken,seeds=1.unfinished",
        "arms=better,seeds=1",
    }
    assert pd.read_csv(folder / "table.csv")["arm"].tolist() == ["better"], "finished cells are gathered"


def test_a_cell_whose_kernel_dies_is_executed_again(workshop, monkeypatch, capsys):
    """As when another process takes the port that Jupyter chose for it."""
    folder = workshop({"grid": {"arms": ["mortal"]}, "seeds": [1]})
    assert run(monkeypatch, "toy") == 0
    assert (folder / "runs" / "died").exists() and "done in" in capsys.readouterr().out


@pytest.mark.full
def test_a_cell_beyond_the_time_limit_is_stopped_with_its_kernel(workshop, monkeypatch, capsys, tmp_path):
    """The limit passes when the kernel runs."""
    folder, wait = workshop({"grid": {"arms": ["slow"]}, "seeds": [1]}, minutes=7), subprocess.Popen.wait

    def until_it_runs(process, timeout=None):
        while timeout and process.poll() is None and not kernels(tmp_path):
            time.sleep(0.1)
        if timeout:
            assert timeout == 7 * 60
            raise subprocess.TimeoutExpired(process.args, timeout)
        return wait(process)

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_runs)
    assert run(monkeypatch, "toy") == 1
    output = capsys.readouterr().out
    assert "FAILED arms=slow,seeds=1: stopped after 7 minutes, twice (see " in output
    assert not kernels(folder.parents[2]), "its kernel is stopped too"


def kernels(inside: Path) -> list[psutil.Process]:
    mine = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command_line, folder = " ".join(process.info["cmdline"] or []), process.info["cwd"] or ""
        if "ipykernel_launcher" in command_line and str(inside) in folder:
            mine.append(process)
    return mine


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_finished_cells_and_the_next_start_runs_the_others(workshop, monkeypatch, tmp_path, how):
    folder = workshop({"grid": {"arms": ["better", "slow"]}, "seeds": [1]})
    script = f"""
import sys
from experiments import __main__ as command, report, runner, study
study.HERE, study.NOTEBOOKS, runner.NOTEBOOKS = (__import__("pathlib").Path(part) for part in {
        [str(tmp_path / "experiments"), str(tmp_path / "notebooks"), str(tmp_path / "notebooks")]
    })
sys.argv = ["experiments", "toy"]
command.main()
"""
    root = Path(hdlib.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background makes child processes ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    waiting = folder / "cells" / "arms=slow,seeds=1.unfinished" / "log.txt"
    for _ in range(3000):  # imports and a kernel take minutes on a busy machine
        if (folder / "cells" / "arms=better,seeds=1").is_dir() and waiting.exists() and kernels(tmp_path):
            break
        time.sleep(0.1)
    process.send_signal(how)
    _, output = process.communicate()
    assert process.returncode == 1 and "stopped: finished cells are kept" in output and "Traceback" not in output
    assert not kernels(tmp_path)
    done = (folder / "cells" / "arms=better,seeds=1" / "result.json").stat().st_mtime_ns
    (folder / "runs" / "enough").write_text("")
    assert run(monkeypatch, "toy") == 0
    assert (folder / "cells" / "arms=better,seeds=1" / "result.json").stat().st_mtime_ns == done
    assert sorted(pd.read_csv(folder / "table.csv")["arm"]) == ["better", "slow"]


def test_a_folder_in_use_is_refused(workshop, monkeypatch):
    folder = workshop()
    with runner.alone_in(folder):
        error = run(monkeypatch, "toy")
    assert error.startswith("runs/toy/smoke is in use by another process") and not (folder / "cells").exists()


@pytest.mark.full
def test_only_some_cells_and_later_others_with_the_same_parameters(workshop, monkeypatch, capsys):
    folder = workshop()
    assert run(monkeypatch, "toy", "--only", "arms=good", "seeds=2") == 0
    assert [path.name for path in (folder / "cells").iterdir()] == ["arms=good,seeds=2"]
    assert "better is better: not measured" in capsys.readouterr().out
    error = run(monkeypatch, "toy", "--set", "steps=4")
    assert "holds this study with other parameters: steps was 3, is 4" in error and "\n" not in error


def test_only_takes_several_values_of_an_axis_and_all_axes_together():
    def cell(arm, seed):
        return study.Cell(f"arms={arm},seeds={seed}", {})

    every = [cell(arm, seed) for seed in (1, 11) for arm in ("good", "goodness", "bad")]
    assert study.only(every, ["arms=good", "arms=bad"]) == [
        cell(arm, seed) for seed in (1, 11) for arm in ("good", "bad")
    ]
    assert study.only(every, ["arms=good", "arms=bad", "seeds=1"]) == [cell("good", 1), cell("bad", 1)]
    with pytest.raises(study.ConfigError, match="no cell has seeds=2: use"):
        study.only(every, ["arms=good", "seeds=2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tyo"], "unknown study 'tyo': use one of toy"),
        (["toy", "--scale", "huge"], "unknown scale 'huge': use one of paper, smoke, or a file's path"),
        (["toy", "--set", "stpes=4"], "90_toy.ipynb has no parameter 'stpes': use one of arms, seeds, steps, rate"),
        (["toy", "--set", "steps=many"], "steps must be of type int; got 'many'"),
        (["toy", "--set", "steps=1.5"], "steps must be of type int; got 1.5"),
        (["toy", "--set", "steps=true"], "steps must be of type int; got True"),
        (["toy", "--set", "loud=1"], "loud must be of type bool; got 1"),
        (["toy", "--set", "name=no"], "name must be of type str; got False"),
        (
            ["toy", "--set", "rate=3e-4"],
            "rate must be of type float; got '3e-4', which YAML reads as a text: write 3.0e-4",
        ),
        (["toy", "--set", "rate=fast"], "rate must be of type float; got 'fast'"),
        (
            ["toy", "--set", "rates=[0.1, 2.5e3]"],
            "rates must be a list of float; got '2.5e3', which YAML reads as a te",
        ),
        (["toy", "--set", "arms=good"], "arms must be of type list; got 'good'"),
        (["toy", "--set", "arms=[]"], "arms is an empty list: give at least one value"),
        (["toy", "--set", "runs=here"], "runs is set by the runner: remove it"),
        (["toy", "--set", "steps"], "--set needs NAME=VALUE; got 'steps'"),
        (["toy", "--only", "arms=bad"], "no cell has arms=bad: use arms=better, arms=good, seeds=1, seeds=2"),
        (["toy", "--jobs", "0"], "--jobs must be at least 1; got 0"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_starts(workshop, monkeypatch, tmp_path, arguments, message):
    error = run(monkeypatch, *arguments)
    assert error.startswith(message) and "\n" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"notebook": "91_none"}, "toy.yaml: notebooks/ has no notebook 91_none.ipynb"),
        ({"girl": {}}, "toy.yaml has an unknown field girl: use expectations, grid, notebook, question, seeds"),
        ({"grid": {"arm": ["good"]}}, "90_toy.ipynb has no parameter 'arm'"),
        ({"seeds": 3}, "seeds must be of type list; got 3"),
        ({"expectations": [{"claim": "x"}]}, "toy.yaml: the expectation {'claim': 'x'} is incomplete. Give claim"),
    ],
)
def test_an_invalid_study_is_refused(workshop, monkeypatch, changes, message):
    workshop(changes)
    assert run(monkeypatch, "toy").startswith(message)


def test_an_invalid_scale_is_refused(workshop, monkeypatch, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("about: mine\nminutes: 1\nparameters:\n  rate: 3e-4\n")
    assert run(monkeypatch, "toy", "--scale", str(path)).startswith("rate must be of type float; got '3e-4'")
    path.write_text("about: mine\nparameters: {}\n")
    assert run(monkeypatch, "toy", "--scale", str(path)) == "mine.yaml lacks minutes: add it"
    path.write_text("about: [\n")
    error = run(monkeypatch, "toy", "--scale", str(path))
    assert error.startswith("mine.yaml is not valid YAML: ") and "\n" not in error


def test_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    assert command._overrides(["corpus=text", "tables=text", "teacher=embedded", "steps=4"]) == {
        "corpus": str(tmp_path / "text"),
        "tables": str(tmp_path / "text"),
        "teacher": "embedded",
        "steps": 4,
    }


def test_every_study_fits_its_notebook_at_every_scale():
    """Papermill would not check names and types."""
    for name in study.names("studies"):
        for scale in study.names("scales"):
            chosen = Study.load(name)
            values = study.parameters(chosen, Scale.load(scale), {})
            assert len(study.cells(chosen, values)) >= len(values["seeds"])
            assert scale == "smoke" or len(values["seeds"]) >= 3
    assert len(Study.load("one_shot_vs_iterative").seeds) == ENOUGH, "the headline row has a verdict"


def test_verdicts_by_hand():
    toy = Study("toy", "?", Path("x"), {}, [1], STUDY["expectations"])
    rows = {
        "holds": [1.0, 1.1, 1.2, 1.1, 1.0],
        "reversed": [-1.0, -1.1, -1.2, -1.1, -1.0],
        "no difference shown": [0.1, 0.1, 0.1, 0.1, 1.0],
        "exploratory": [1.0, 1.1, 1.2],
        "one seed": [1.0],
        "not measured": [],
        "not finite on seed 1": [1.0, np.nan, 1.0, 1.0, 1.0],
    }
    for verdict, differences in rows.items():
        table = [("good", seed, 2.0 + d) for seed, d in enumerate(differences)]
        table += [("better", seed, 2.0) for seed, _ in enumerate(differences)]
        (answer,) = report.answers(toy, pd.DataFrame(table, columns=["arm", "seed", "kl"]))
        assert answer["verdict"] == verdict and answer["pairs"] == len(differences)
        json.dumps(answer, allow_nan=False)
        assert report.describe(answer).startswith(f"better is better: {verdict}")


def test_the_estimate_is_proportional_to_the_steps(teacher, tokenizer, blocks, tmp_path):
    """A run like the measured one takes its time; a larger one takes more in proportion."""
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, _ = hdlib.load_teacher(folder)
    config = hdlib.DistillConfig(steps=8, batch_size=8, target=0.5, prune_every=2, eval_blocks=8)
    place = tmp_path / "measured" / "runs" / "students" / "a"  # a study may have folders of runs
    distilled = hdlib.distill(model, tokenizer, *blocks, config, place)
    lines = distilled.folder / "metrics.jsonl"
    records = [record | {"seconds": 10.0} for record in distilled.records()]
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    chosen = Study.load("one_shot_vs_iterative")
    same = Scale("same", "", 1, {"steps": 8, "batch_size": 8, "length": 16})
    text = report.estimate(chosen, tmp_path / "measured", same)
    assert "one run would take about 90 seconds" in text
    twice = Scale("twice", "", 1, {"steps": 80, "batch_size": 16, "length": 16})
    assert "one run would take about 30 minutes" in report.estimate(chosen, tmp_path / "measured", twice)
    with pytest.raises(ConfigError, match="no finished runs"):
        report.estimate(chosen, tmp_path / "nothing", same)
