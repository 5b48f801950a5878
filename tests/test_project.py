"""The project as a whole: one environment, notebooks that run, a teacher that is what its card says."""

import json
import re
import tomllib
from pathlib import Path
from statistics import median

import nbformat
import papermill
import pytest
import torch
import yaml

import hdlib
from experiments.prune_cost import measure
from hdlib.families import FAMILIES

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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
        assert notebook.cells[0].cell_type == "markdown", f"{path.name} opens with its question"
        assert [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])] == cells[:1], path.name
        assert "save_result" in cells[-1].source, f"{path.name} ends with its result"
        assert all(len(cell.source.splitlines()) <= 25 for cell in cells), path.name
        assert not any(re.search(r"^\s*class ", cell.source, re.M) for cell in cells), path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_at_smoke_scale(path, tmp_path):
    executed = tmp_path / path.name
    papermill.execute_notebook(
        path, executed, parameters={"runs": str(tmp_path)}, cwd=path.parent, progress_bar=False, kernel_name="python3"
    )
    (result,) = tmp_path.rglob("result.json")
    outputs = [o for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a figure"
    assert not [o.text for o in outputs if o.get("name") == "stderr" and "Warning" in o.text], "no warnings"
    result = json.loads(result.read_text())
    if path.stem == "03_narrowing":
        assert result["largest_difference"] <= 1e-5 and result["toy_difference"] <= 1e-6
        assert result["norms_count_zeros"] > 0.05 and result["attention_scale_forgotten"] > 0.005
        assert result["families"] == len(FAMILIES)
        assert result["kl_sensitivity"] < result["kl_magnitude"] < result["kl_random"]
    if path.stem == "00_quickstart":
        assert result["encoder_parameters_ratio"] <= 0.15
        assert result["largest_logit_difference_stock"] <= 1e-5
        assert 0 < result["held_out_kl"] < 10 and result["step_time_ratio_after_last_prune"] < 1


def test_the_embedded_teacher_is_what_its_card_says():
    """It fits, it is stored in half precision, and it guesses as well as the card claims on documentation."""
    folder = ROOT / "hdlib" / "teacher"
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0" and "MiniLM" in card
    model, tokenizer = hdlib.load_teacher()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _, validation = hdlib.load_corpus("embedded", tokenizer, 128, validation_blocks=200)
    measured = hdlib.discrepancy(model, model, validation)["accuracy"]
    claimed = {metric["name"]: metric["value"] for metric in header["model-index"][0]["results"][0]["metrics"]}
    assert measured == pytest.approx(claimed["masked-token accuracy, documentation"], abs=0.04)
    assert claimed["masked-token accuracy, Wikipedia"] >= 0.30


def test_a_prune_costs_little():
    """Scores to narrowed model and optimiser, on a BERT-base shape: a tenth of one forward and backward at most."""
    seconds = measure(turns=2, beside=False)
    assert median(seconds["prune"]) <= 0.1 * median(seconds["forward_backward"])
