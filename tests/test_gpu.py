"""The session on a GPU, dry: every part on a CPU without `datasets`, and the device tests on a pretend device."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from time import monotonic

import pandas as pd
import pytest
import torch

import hdlib
from experiments.gpu import cases
from experiments.gpu.pack import load_pack
from experiments.gpu.pack import main as make_pack
from experiments.gpu.part import Part, Plan
from hdlib.checkpoints import save_folder

from conftest import full, sentences

ROOT = Path(__file__).parents[1]
MISSING = ("datasets", "papermill", "ipywidgets", "anywidget")  # where the GPU is


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Made by the command, from the embedded teacher and two parquet files."""
    folder = tmp_path_factory.mktemp("pack")
    for name, documents in {"train": 300, "validation": 60}.items():
        text = [" ".join(sentences(20, seed)) for seed in range(documents)]
        pd.DataFrame({"text": text}).to_parquet(folder / f"{name}.parquet")
    text = [str(ROOT / "hdlib" / "teacher"), str(folder / "train.parquet")]
    text += ["--validation", str(folder / "validation.parquet"), "--folder", str(folder / "pack")]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["pack", *text])
        make_pack()
    last = printed.getvalue().strip().splitlines()[-1]
    assert last == f"python -m experiments.gpu --pack {folder / 'pack'} --minutes 8"
    return folder / "pack"


def test_the_pack_holds_teacher_and_blocks(pack):
    teacher, tokenizer, train, held_out = load_pack(pack)
    assert len(train) > 100 and train[0]["input_ids"].shape == (128,)
    assert tokenizer.decode(train[0]["input_ids"][1:3]).startswith("the")
    assert set(held_out[0]) == {"input_ids", "labels"} and (held_out[0]["labels"] != -100).sum() == 19
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


def test_the_pack_of_a_sentence_encoder(tmp_path, monkeypatch):
    folder, text = tmp_path / "encoder", tmp_path / "train.txt"
    teacher, tokenizer = hdlib.load_teacher("embedded", encoder=True)
    save_folder(folder, teacher, tokenizer)
    text.write_text("".join(f"The {n} birds sing. They sing {n} songs.\n\n" for n in range(200)))
    held_out = tmp_path / "validation.txt"
    held_out.write_text("A bird was heard. Nobody saw it.\n\n")
    arguments = ["pack", str(folder), str(text), "--validation", str(held_out), "--folder", str(tmp_path / "pack")]
    monkeypatch.setattr(sys, "argv", arguments)
    make_pack()
    loaded, _, train, validation = load_pack(tmp_path / "pack")
    assert loaded.sentence_pooling.modes == teacher.sentence_pooling.modes
    assert len(train) == 400 and len(validation) == 2
    assert tokenizer.decode(train[0]["input_ids"], skip_special_tokens=True).lower().startswith("the 0 birds")


@pytest.mark.full
def test_a_dry_session_without_datasets(pack, tmp_path):
    """All parts leave their files; the packages that are not there are never imported."""
    blocked = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in MISSING)
    (tmp_path / "sitecustomize.py").write_text(blocked)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "experiments.gpu",
        "--dry",
        "--pack",
        str(pack),
        "--out",
        str(out),
        "--minutes",
        "30",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    read = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    parts = ("cases", "reference", "speed", "teacher", "study")
    assert read["session"]["parts"] == dict.fromkeys(parts, "ended"), done.stdout
    assert all(verdict["passed"] for verdict in read["verdicts"].values()) and len(read["verdicts"]) >= 8
    for part in parts:
        failed = {name: item for name, item in read[part]["items"].items() if "error" in item}
        assert not failed and not read[part]["not_reached"], part
    study = {name: item["value"] for name, item in read["study"]["items"].items()}
    arms = ["default", "paper", "default, one-shot", "paper, one-shot"]
    trials = [f"{recipe}, trial of rate 0.0005" for recipe in arms[:2]]
    assert list(study) == trials + [f"{arm}, seed 1" for arm in arms]
    first = study["default, seed 1"]
    assert first["curve"][0]["held_out_kl"] == 0.0 < first["held_out"]["kl"]
    assert first["config"]["compensate"] and not study["paper, seed 1"]["config"]["compensate"]
    student, _ = hdlib.load_teacher(out / "students" / "default_seed_1")
    assert vars(hdlib.Widths.of(student)) == first["widths"]
    (trained,) = read["teacher"]["items"].values()
    assert trained["value"]["after"] != trained["value"]["before"] and (out / "teacher").exists()
    speed = {name.split(",")[0] for name in read["speed"]["items"]}
    assert speed == {"card", "step", "memory", "prune", "loop", "profile", "paper"}
    (profile,) = (item["value"] for name, item in read["speed"]["items"].items() if name.startswith("profile"))
    assert len(profile["largest"]) == 10


@pytest.fixture
def part(tmp_path):
    return Part(Plan("part", "", str(tmp_path), until=monotonic() + 60))


def test_a_failing_item_is_recorded_and_the_others_run(part, tmp_path):
    part.item("fails", lambda: 1 / 0)
    part.item("not a number", lambda: {"x": float("nan")})
    part.item("runs", lambda: {"x": 1})
    found = json.loads((tmp_path / "part.json").read_text())["items"]
    assert "ZeroDivisionError" in found["fails"]["traceback"] and "error" in found["not a number"]
    assert found["runs"]["value"] == {"x": 1}
    again = Part(part.plan)
    again.item("runs", pytest.fail)


def test_no_item_begins_after_the_limit(part):
    part.plan = replace(part.plan, until=0.0)
    part.item("late", pytest.fail)
    assert part.not_reached == ["late"] and not part.items


def test_a_wrong_number_does_not_pass():
    def item(loss=1.0, width=4, kept=(0, 1)) -> dict:
        return {"value": {"exact": {"width": [width]}, "near": {"loss": [loss]}, "kept": {"hidden": list(kept)}}}

    assert cases.compared(item(), item(1.0001), "float32")["passed"]
    assert not cases.compared(item(), item(1.01), "float32")["passed"]
    assert cases.compared(item(), item(1.01), "bfloat16")["passed"]
    assert not cases.compared(item(), item(width=5), "float32")["passed"]
    assert cases.compared(item(), item(kept=(0, 2)), "float32")["kept alike"] == 0.5
    assert not cases.compared(item(), {"error": "out of memory"}, "float32")["passed"]


@pytest.mark.parametrize("chosen", ["not full", *full("full")])
def test_on_the_pretend_device(chosen):
    """Its registration affects a whole process, so these tests have one of their own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", chosen, str(ROOT / "tests" / "pretended.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
