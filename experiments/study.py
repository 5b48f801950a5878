"""Studies and scales: what is asked, and how large, as YAML files that are checked before anything starts.

A study names its question, its notebook, the grid of the notebook's list parameters, the seeds, and what is
expected to come out. A scale gives values to the notebooks' parameters. A *cell* is one execution of the notebook
with one value of each list; the training runs behind it are shared, so the notebook with all values
at once draws the whole study.
"""

from __future__ import annotations

from ast import literal_eval
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import papermill
import yaml

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list}
MANAGED = ("runs", "results", "draw_only")  # parameters that the runner sets itself


class ConfigError(ValueError):
    """A study, a scale or a value that cannot be; one line that names it and the way out."""


@dataclass(frozen=True)
class Study:
    name: str
    question: str
    notebook: Path
    grid: dict[str, list]
    seeds: list[int]
    expectations: list[dict] = field(default_factory=list)

    @classmethod
    def load(cls, name: str) -> Study:
        """A study by name, from `studies/NAME.yaml`. Raises ConfigError."""
        path = HERE / "studies" / f"{name}.yaml"
        if not path.exists():
            raise ConfigError(f"there is no study {name!r}; there are: {', '.join(names('studies'))}")
        values = _read(path, required={"question", "notebook", "grid", "seeds"}, optional={"expectations"})
        notebook = NOTEBOOKS / f"{values['notebook']}.ipynb"
        if not notebook.exists():
            raise ConfigError(f"{path.name}: there is no notebook {notebook.name} in {NOTEBOOKS.name}/")
        for expectation in values.get("expectations", []):
            if set(expectation) != {"claim", "measure", "lower", "higher"}:
                raise ConfigError(
                    f"{path.name}: an expectation has claim, measure, lower and higher; got {expectation}"
                )
        return cls(name, **values | {"notebook": notebook})


@dataclass(frozen=True)
class Scale:
    name: str
    about: str
    minutes: float  # a cell that takes longer is stopped
    parameters: dict
    studies: dict[str, dict] = field(default_factory=dict)
    teacher_config: dict = field(default_factory=dict)  # of a teacher that is not at hand, to count its cost

    @classmethod
    def load(cls, name: str) -> Scale:
        """A scale by name, from `scales/NAME.yaml`, or by the path of such a file. Raises ConfigError."""
        path = Path(name) if name.endswith((".yaml", ".yml")) else HERE / "scales" / f"{name}.yaml"
        if not path.exists():
            raise ConfigError(
                f"there is no scale {name!r}; there are: {', '.join(names('scales'))}, or the path of a file"
            )
        values = _read(path, required={"about", "minutes", "parameters"}, optional={"studies", "teacher_config"})
        return cls(path.stem, **{key: value or {} for key, value in values.items()})


@dataclass(frozen=True)
class Cell:
    """One execution of a study's notebook."""

    name: str
    parameters: dict


def names(folder: str) -> list[str]:
    """The studies or scales there are."""
    return sorted(path.stem for path in (HERE / folder).glob("*.yaml"))


def parameters(study: Study, scale: Scale, overrides: dict) -> dict:
    """The value of every parameter of the study's notebook, lists whole. Raises ConfigError for a name or type.

    Later ones win: the notebook's defaults, the study's grid and seeds, the scale, the scale's part for this
    study, `overrides`.
    """
    declared = _declared(study.notebook)
    asked = study.grid | {"seeds": study.seeds} | scale.parameters | scale.studies.get(study.name, {}) | overrides
    for name, value in asked.items():
        if name in MANAGED:
            raise ConfigError(f"{name} is set by the runner: leave it out")
        if name not in declared:
            known = ", ".join(known for known in declared if known not in MANAGED)
            raise ConfigError(f"{study.notebook.name} has no parameter {name!r}; it has: {known}")
        _check_type(name, value, *declared[name])
    defaults = {name: default for name, (_, default) in declared.items() if name not in MANAGED}
    return defaults | asked


def cells(study: Study, values: dict) -> list[Cell]:
    """The grid, seed by seed: what is learned first is a whole comparison with one seed."""
    axes = ["seeds", *study.grid]
    made = []
    for choice in product(*(values[axis] for axis in axes)):
        one = dict(zip(axes, choice, strict=True))
        name = ",".join(f"{axis}={value}" for axis, value in sorted(one.items()))
        made.append(Cell(name, values | {axis: [value] for axis, value in one.items()}))
    return made


def only(every: list[Cell], wanted: list[str]) -> list[Cell]:
    """The cells that have one of the wanted values (`AXIS=VALUE`) on each named axis.

    Raises:
        ConfigError: a value that no cell has.
    """
    there = {part for cell in every for part in cell.name.split(",")}
    unknown = [part for part in wanted if part not in there]
    if unknown:
        raise ConfigError(f"no cell has {', '.join(unknown)}; there are: {', '.join(sorted(there))}")
    axes = {part.partition("=")[0] for part in wanted}
    return [cell for cell in every if len(set(wanted) & set(cell.name.split(","))) == len(axes)]


def _declared(notebook: Path) -> dict[str, tuple[str, object]]:
    """Type and default of every parameter of a notebook."""
    found = papermill.inspect_notebook(str(notebook))
    return {name: (entry["inferred_type_name"], literal_eval(entry["default"])) for name, entry in found.items()}


def _check_type(name: str, value, declared: str, default) -> None:
    """A value must have the type that the notebook declares, the members of a list that of the default's first."""
    members, kind = [value], declared
    if declared == "list" and isinstance(value, list):
        _check(bool(value), f"{name} is an empty list: leave it out, or name at least one value")
        members, kind = value, type(default[0]).__name__
    for member in members:
        right = isinstance(member, TYPES[kind]) and (kind == "bool" or not isinstance(member, bool))
        what = f"{name} must be of type {kind}" if kind == declared else f"{name} must be a list of {kind}"
        hint = ": YAML takes a number with an exponent for text unless it has a point, as in 3.0e-4"
        text = kind == "float" and isinstance(member, str)
        _check(right, f"{what}; got {member!r}{hint if text else ''}")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _read(path: Path, required: set[str], optional: set[str]) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must hold names and values")
    if missing := required - values.keys():
        raise ConfigError(f"{path.name} lacks {', '.join(sorted(missing))}")
    if unknown := values.keys() - required - optional:
        raise ConfigError(
            f"{path.name}: unknown {', '.join(sorted(unknown))}; it may have: {', '.join(sorted(required | optional))}"
        )
    return values
