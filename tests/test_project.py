"""Checks of the whole project: environment, notebooks, golden numbers, the embedded teacher."""

import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml

import hdlib
from experiments.bench import prune
from experiments.bench.work import Setting
from hdlib.families import FAMILIES

from conftest import execute_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GOLDEN = ROOT / "tests" / "golden"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements) -> set[str]:
    return {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in requirements}


def test_conda_and_pip_users_get_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert len((ROOT / "environment.yml").read_text().splitlines()) < 25
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = (item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert names(conda) == {"python", "pip"} and pip == ["-c constraints.txt", "-e .[test]"]
    python = next(item.split("=")[1] for item in conda if item.startswith("python"))
    assert PROJECT["requires-python"] == f">={python}"


def test_the_tested_versions_are_within_the_declared_ranges():
    from packaging.requirements import Requirement

    tested = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    for requirement in map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]):
        assert requirement.specifier.contains(tested[requirement.name]), requirement


def test_notebooks_are_functions_without_outputs():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in cells), path.name
        assert notebook.cells[0].cell_type == "markdown", f"{path.name} starts with its question"
        assert [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])] == cells[:1], path.name
        assert "save_result" in cells[-1].source, f"{path.name} ends with its result"
        assert all(len(cell.source.splitlines()) <= 25 for cell in cells), path.name
        assert not any(re.search(r"^\s*class ", cell.source, re.M) for cell in cells), path.name


def execute(path: Path, folder: Path, **parameters) -> tuple[dict, list]:
    """Execute a notebook; return its result and the outputs of its cells."""
    folder.mkdir(exist_ok=True)
    executed = folder / path.name
    execute_notebook(path, executed, parameters, NOTEBOOKS[0].parent)
    (result,) = folder.rglob("result.json")
    cells = [cell for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code"]
    for cell in cells:
        if re.search(r"plt\.subplots|lab\.plot_|lab\.panel\(", cell.source) and "save_result" not in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), f"no figure:\n{cell.source}"
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a figure"
    assert not [o.text for o in outputs if o.get("name") == "stderr" and "Warning" in o.text], "no warnings"
    return json.loads(result.read_text()), outputs


def notebooks(paths: list[Path]) -> list:
    """Parameters of a test; the default set has 00 and 04, and an arm of 10."""
    marks = {path: () if path.stem[:2] in ("00", "04") else pytest.mark.notebooks for path in paths}
    return [pytest.param(path, id=path.stem, marks=mark) for path, mark in marks.items()]


SMALLER = {  # than their defaults
    "00_quickstart": {"steps": 8, "batch_size": 4, "settings": {"eval_every": 4, "eval_blocks": 16}},
    "04_homodistil": {"steps": 12, "batch_size": 2, "eval_blocks": 4},
}


@pytest.mark.parametrize("path", notebooks([path for path in NOTEBOOKS if path.stem < "10"]))
def test_teaching_notebooks_run(path, tmp_path):
    result, _ = execute(path, tmp_path, runs=str(tmp_path), **SMALLER.get(path.stem, {}))
    if path.stem == "00_quickstart":
        assert result["encoder_parameters_ratio"] <= 0.3
        assert result["largest_logit_difference_stock"] <= 1e-5
        assert 0 < result["held_out_kl"] < 10
    elif path.stem == "05_explore":
        assert result["watched_to_the_end"] and result["runs"] == 3 and result["prunes_recorded"] > 5
        assert 0 < result["final_held_out_kl"] < 10
    elif path.stem == "03_narrowing":
        assert result["largest_difference"] <= 1e-5 and result["toy_difference"] <= 1e-6
        assert result["norms_count_zeros"] > 0.05 and result["attention_scale_forgotten"] > 0.005
        assert result["families"] == len(FAMILIES)
        assert result["kl_sensitivity"] < result["kl_magnitude"] < result["kl_random"]
        assert 0 < result["fold_error"] < 0.9, "share of the sliced error"
    else:
        assert result["largest_difference"] <= 1e-5, "by hand and by the library"


ABLATIONS = [path for path in NOTEBOOKS if "10" <= path.stem < "20"]


def ablation(path: Path, folder: Path, text_file: Path, **parameters) -> dict:
    """The result of an ablation notebook at smoke scale, on a corpus that does not depend on the installation."""
    paths = {"corpus": str(text_file), "runs": str(folder / "runs"), "results": str(folder)}
    result, _ = execute(path, folder, **paths, **parameters)
    assert (folder / "figure.png").stat().st_size > 10_000 and "<svg" in (folder / "figure.svg").read_text()
    table = pd.read_csv(folder / "table.csv")
    assert len(table) and table["kl"].between(0, 20).all()
    assert set(table["seed"]) == {1} and table["highest_kl"].ge(table["kl"]).all()
    return result


def test_an_arm_reproduces_its_golden_number(tmp_path, text_file):
    path = next(path for path in ABLATIONS if path.stem.startswith("10"))
    result = ablation(path, tmp_path, text_file, arms=["homodistil"])
    golden = json.loads((GOLDEN / f"{path.stem}.json").read_text())
    assert result["kl_homodistil"] == pytest.approx(golden["kl_homodistil"], rel=1e-3)


@pytest.mark.parametrize("path", notebooks(ABLATIONS))
def test_ablation_notebooks_reproduce_their_golden_numbers(path, tmp_path, text_file, request):
    """Results of training at smoke scale equal the stored ones; `--rewrite-golden` stores new ones."""
    result = ablation(path, tmp_path, text_file)
    found = {name: value for name, value in result.items() if not name.startswith(("seconds", "difference"))}
    golden = GOLDEN / f"{path.stem}.json"
    if request.config.getoption("--rewrite-golden"):
        golden.write_text(json.dumps(found, indent=2) + "\n")
    assert found == pytest.approx(json.loads(golden.read_text()), rel=1e-3)


@pytest.mark.notebooks
def test_the_fine_tuning_notebook_scores_every_model_on_every_task(tmp_path, text_file):
    """Beside the default probe: a task in the table layout of GLUE, and a checkpoint given by its folder."""
    path = next(path for path in NOTEBOOKS if path.stem == "20_finetune")
    (tmp_path / "tables" / "rte").mkdir(parents=True)
    texts = [f"the student {word} slowly" for word in ("learns", "keeps", "steps", "loses")] * 8
    rows = pd.DataFrame({"sentence1": texts, "sentence2": texts[::-1], "label": [0, 1, 1, 0] * 8})
    for part in ("train", "validation"):
        rows.to_csv(tmp_path / "tables" / "rte" / f"{part}.csv", index=False)
    folder = str(ROOT / "hdlib" / "teacher")
    paths = {"corpus": str(text_file), "tables": str(tmp_path / "tables"), "runs": str(tmp_path / "runs")}
    arguments = {"checkpoints": ["teacher", "default", folder], "tasks": ["order", "rte"], "epochs": 1.0}
    result, _ = execute(path, tmp_path / "out", **paths, **arguments, results=str(tmp_path / "out"))
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert len(table) == 2 * (3 + 2) and table["score"].between(0, 1).all()
    assert len(result) == 10 and result["score_teacher_rte"] == result[f"score_{folder}_rte"], (
        "one checkpoint, two names"
    )
    assert result["score_majority_order"] == 0.5


@pytest.mark.notebooks
def test_the_cost_notebook_measures_and_exports(tmp_path):
    path = next(path for path in NOTEBOOKS if path.stem == "21_cost")
    result, _ = execute(path, tmp_path / "out", runs=str(tmp_path / "runs"), results=str(tmp_path / "out"))
    assert result["largest_difference_exported"] <= 1e-5
    assert result["fewer_operations_keep_0.33"] > result["fewer_operations_keep_0.66"] > 1.5
    assert (tmp_path / "runs" / "student.onnx").exists() and (tmp_path / "out" / "figure.svg").exists()


@pytest.mark.notebooks
def test_the_sentence_encoder_notebook_measures_every_arm(tmp_path, text_file):
    path = next(path for path in NOTEBOOKS if path.stem == "22_sentence_encoder")
    paths = {"corpus": str(text_file), "runs": str(tmp_path / "runs"), "results": str(tmp_path / "out")}
    result, _ = execute(path, tmp_path / "out", **paths, ratios=[0.5], shapes=3, query="the student learns")
    arms = [f"{arm}_0.5" for arm in ["default", "budget", "one_shot", "homodistil", "random_start", "layers"]]
    assert result["cosine_distance_teacher"] == 0.0 and result["recall_teacher"] == 1.0
    assert all(0 < result[f"cosine_distance_{arm}"] < 2 for arm in arms)
    assert 0.9 < result["rank_correlation_pca_0.5"] <= 1 and "cosine_distance_pca_0.5" not in result


def test_every_notebook_is_executed_by_one_of_these_tests():
    executed = {path.stem for path in ABLATIONS} | {path.stem for path in NOTEBOOKS if path.stem < "10"}
    assert {path.stem for path in NOTEBOOKS} == executed | {"20_finetune", "21_cost", "22_sentence_encoder"}


BREAKS = {
    "scorer": "hdlib.scorers.Sensitivity.element = lambda self, parameter, gradient: (parameter - gradient).abs()",
    "loss": "hdlib.losses.prediction_loss = lambda student, *rest: student.sum() * 0.0",
}


@pytest.mark.full
@pytest.mark.parametrize("broken", BREAKS)
def test_golden_numbers_detect_a_broken_library(broken, tmp_path, text_file):
    path = next(path for path in ABLATIONS if path.stem.startswith("10"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(2, nbformat.v4.new_code_cell(f"import hdlib.distill\n\n{BREAKS[broken]}"))
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    found = ablation(tmp_path / "broken.ipynb", tmp_path / "out", text_file, arms=["homodistil"])
    golden = json.loads((GOLDEN / f"{path.stem}.json").read_text())["kl_homodistil"]
    assert found["kl_homodistil"] != pytest.approx(golden, rel=1e-2)


def test_the_embedded_teacher_has_the_accuracy_of_its_card():
    """The file is small, and the accuracy on documentation is the stated one."""
    folder = ROOT / "hdlib" / "teacher"
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0" and "MiniLM" in card
    model, tokenizer = hdlib.load_teacher()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _, validation = hdlib.load_corpus("embedded", tokenizer, 128, validation_blocks=100)
    input_ids, labels = (torch.tensor(validation[name]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        predicted = hdlib.forward(model, input_ids, labels != -100).logits.argmax(-1)
    measured = (predicted == labels[labels != -100]).float().mean().item()
    claimed = {metric["name"]: metric["value"] for metric in header["model-index"][0]["results"][0]["metrics"]}
    assert measured == pytest.approx(claimed["masked-token accuracy, documentation"], abs=0.04)
    assert claimed["masked-token accuracy, Wikipedia"] >= 0.30


@pytest.mark.bench
def test_a_prune_costs_little():
    """A prune of model and optimiser at the shape of BERT-base takes at most 10 % of one forward and backward pass.

    The median of five repetitions is compared, since other processes may slow down one of them.
    """
    assert prune.measure(Setting(turns=5)).loc["one prune", "of forward and backward"] <= 0.1


def test_public_names_are_few_and_documented_and_moved_ones_lead_to_their_place():
    assert len(hdlib.__all__) <= 23 and all(getattr(hdlib, name).__doc__ for name in hdlib.__all__)
    for name in (*hdlib._MOVED, *dir(hdlib.lab)):
        with pytest.raises(ImportError, match=rf"hdlib\.{name} has moved: use ") as error:
            getattr(hdlib, name)
        place = str(error.value).rpartition(" ")[2]
        assert (ROOT / place).exists() if "/" in place else pkgutil.resolve_name(place) is not None
    with pytest.raises(ImportError, match=r"hdlib\.lab\.plot_neurons has moved: use hdlib\.lab\.plot_run"):
        hdlib.lab.plot_neurons  # noqa: B018


def test_the_method_imports_nothing_heavy():
    code = """
import sys, hdlib
assert "torch" not in sys.modules
hdlib.distill
heavy = {"matplotlib", "pandas", "datasets", "pyarrow", "ipywidgets", "papermill", "sklearn"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
