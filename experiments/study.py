"""Studies and scales: YAML files that define what is compared and at which size, checked before anything starts.

A study has a question, a notebook, a grid over the notebook's list parameters, seeds, and expected relations between
results. A scale sets values of the notebooks' parameters. A *cell* is one execution of the notebook with one value of
each list. Cells share the training runs, so an execution with all values draws the whole study.
"""

from __future__ import annotations

import re
from ast import literal_eval
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import papermill
import yaml

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list}
MANAGED = ("runs", "results", "draw_only")  # parameters that the runner sets


class ConfigError(ValueError):
    """An invalid study, scale or value. The message has one line: what is wrong, its value, what to do."""


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
        """Read `studies/NAME.yaml`. Raises ConfigError."""
        path = HERE / "studies" / f"{name}.yaml"
        if not path.exists():
            raise ConfigError(f"unknown study {name!r}: use one of {', '.join(names('studies'))}")
        values = _read(path, required={"question", "notebook", "grid", "seeds"}, optional={"expectations"})
        notebook = NOTEBOOKS / f"{values['notebook']}.ipynb"
        if not notebook.exists():
            raise ConfigError(f"{path.name}: {NOTEBOOKS.name}/ has no notebook {notebook.name}. Correct `notebook`")
        for expectation in values.get("expectations", []):
            if set(expectation) != {"claim", "measure", "lower", "higher"}:
                raise ConfigError(
                    f"{path.name}: the expectation {expectation} is incomplete. Give claim, measure, lower and higher"
                )
        return cls(name, **values | {"notebook": notebook})


@dataclass(frozen=True)
class Scale:
    name: str
    about: str
    minutes: float  # time limit of a cell
    parameters: dict
    studies: dict[str, dict] = field(default_factory=dict)  # parameters for one study only
    teacher_config: dict = field(default_factory=dict)  # shape of a teacher that is not on this machine, for estimates

    @classmethod
    def load(cls, name: str) -> Scale:
        """Read `scales/NAME.yaml`, or the YAML file at the path `name`. Raises ConfigError."""
        path = Path(name) if name.endswith((".yaml", ".yml")) else HERE / "scales" / f"{name}.yaml"
        path = path.expanduser()
        if not path.exists():
            raise ConfigError(f"unknown scale {name!r}: use one of {', '.join(names('scales'))}, or a file's path")
        values = _read(path, required={"about", "minutes", "parameters"}, optional={"studies", "teacher_config"})
        return cls(path.stem, **{key: value or {} for key, value in values.items()})


@dataclass(frozen=True)
class Cell:
    """One execution of a study's notebook."""

    name: str
    parameters: dict


def names(folder: str) -> list[str]:
    """The names of the studies or scales."""
    return sorted(path.stem for path in (HERE / folder).glob("*.yaml"))


def parameters(study: Study, scale: Scale, overrides: dict) -> dict:
    """Return the value of every parameter of the study's notebook, with whole lists.

    Later ones win: the notebook's defaults, the study's grid and seeds, the scale, the scale's values for this study,
    `overrides`. Raises ConfigError for an unknown name or a wrong type.
    """
    declared = _declared(study.notebook)
    given = study.grid | {"seeds": study.seeds} | scale.parameters | scale.studies.get(study.name, {}) | overrides
    for name, value in given.items():
        if name in MANAGED:
            raise ConfigError(f"{name} is set by the runner: remove it")
        if name not in declared:
            known = ", ".join(known for known in declared if known not in MANAGED)
            raise ConfigError(f"{study.notebook.name} has no parameter {name!r}: use one of {known}")
        _check_type(name, value, *declared[name])
    return {name: default for name, (_, default) in declared.items() if name not in MANAGED} | given


def cells(study: Study, values: dict) -> list[Cell]:
    """The cells of the grid, seed by seed, so that a whole comparison with one seed is finished first."""
    axes = ["seeds", *study.grid]
    found = []
    for choice in product(*(values[axis] for axis in axes)):
        one = dict(zip(axes, choice, strict=True))
        name = ",".join(f"{axis}={value}" for axis, value in sorted(one.items()))
        found.append(Cell(name, values | {axis: [value] for axis, value in one.items()}))
    return found


def only(every: list[Cell], wanted: list[str]) -> list[Cell]:
    """Return the cells that have one of the wanted values (`AXIS=VALUE`) on each named axis.

    Raises:
        ConfigError: no cell has such a value.
    """
    known = {part for cell in every for part in cell.name.split(",")}
    unknown = [part for part in wanted if part not in known]
    if unknown:
        raise ConfigError(f"no cell has {', '.join(unknown)}: use {', '.join(sorted(known))}")
    axes = {part.partition("=")[0] for part in wanted}
    return [cell for cell in every if len(set(wanted) & set(cell.name.split(","))) == len(axes)]


def _declared(notebook: Path) -> dict[str, tuple[str, object]]:
    """Type and default of every parameter of a notebook."""
    found = papermill.inspect_notebook(str(notebook))
    return {name: (entry["inferred_type_name"], literal_eval(entry["default"])) for name, entry in found.items()}


def _check_type(name: str, value, declared: str, default) -> None:
    """A value must have the declared type; the members of a list must have the type of the default's first member."""
    members, kind, what = [value], declared, f"{name} must be of type {declared}"
    if declared == "list" and isinstance(value, list):
        if not value:
            raise ConfigError(f"{name} is an empty list: give at least one value, or remove it")
        members, kind = value, type(default[0]).__name__
        what = f"{name} must be a list of {kind}"
    for member in members:
        if not isinstance(member, TYPES[kind]) or (isinstance(member, bool) and kind != "bool"):
            raise ConfigError(f"{what}; got {member!r}{_hint(member) if kind == 'float' else ''}")


def _hint(text) -> str:
    """How to write a number with an exponent: YAML needs a point and a sign, else it reads a text."""
    number = re.fullmatch(r"([-+]?\d+)(\.\d*)?e([-+]?)(\d+)", str(text), re.IGNORECASE)
    if not number:
        return ""
    digits, fraction, sign, exponent = number.groups()
    return f", which YAML reads as a text: write {digits}{fraction or '.0'}e{sign or '+'}{exponent}"


def _read(path: Path, required: set[str], optional: set[str]) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must hold `name: value` lines; got {values!r}")
    if missing := required - values.keys():
        raise ConfigError(f"{path.name} lacks {', '.join(sorted(missing))}: add it")
    if unknown := values.keys() - required - optional:
        known = ", ".join(sorted(required | optional))
        raise ConfigError(f"{path.name} has an unknown field {', '.join(sorted(unknown))}: use {known}")
    return values
