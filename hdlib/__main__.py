"""A run without a notebook, in one process or many: `accelerate launch -m hdlib CONFIG.yaml`.

The file holds the arguments of `DistillConfig` and, beside them, those of `load_teacher` and `load_corpus`
(`teacher`, `corpus`, `length`, `text_column`, `subset`, `causal`, `streaming`) and the folder of the run, `run_dir`,
which must be named; what else is left out takes its default. `--resume` goes on from the newest checkpoint, or starts
where there is none, so that a batch system can repeat one and the same line. SIGTERM ends the run after its step, with
a checkpoint and the exit status 143.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path

import yaml

from . import DistillConfig, Stopped, distill, load_corpus, load_teacher

PLACES = {
    "teacher": "embedded",
    "corpus": "embedded",
    "length": 128,
    "text_column": "text",
    "subset": None,
    "causal": None,
    "streaming": False,
    "run_dir": None,
}
PLACE_TYPES = {
    "teacher": (str,),
    "corpus": (str, list),
    "length": (int,),
    "text_column": (str,),
    "subset": (str, type(None)),
    "causal": (bool, type(None)),
    "streaming": (bool,),
    "run_dir": (str,),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hdlib", description="Distil a teacher into a narrower student.")
    parser.add_argument("config", type=Path, help="a YAML file of arguments")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run_dir")
    arguments = parser.parse_args()
    try:
        places, config = read(arguments.config)
        teacher, tokenizer = load_teacher(places["teacher"])
        text = {name: places[name] for name in ("length", "text_column", "subset", "causal", "streaming")}
        train, validation = load_corpus(places["corpus"], tokenizer, **text)
        run = distill(teacher, tokenizer, train, validation, config, places["run_dir"], resume=arguments.resume)
    except Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        raise SystemExit(f"{arguments.config}: {error}") from error
    print(f"student: {run.student_folder}" if run.has_student else f"masked model: {run.checkpoints()[-1]}")


def read(path: Path) -> tuple[dict, DistillConfig]:
    """A YAML file to (places, config). Raises ValueError for what is no YAML, and for a name or value that is none."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"no YAML can be read there: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError("there are no names with values there, as in `steps: 1000`")
    known = {field.name for field in fields(DistillConfig)}
    unknown = sorted(map(str, values.keys() - known - PLACES.keys()))
    if unknown:
        raise ValueError(f"unknown arguments {', '.join(unknown)}; there are: {', '.join([*PLACES, *sorted(known)])}")
    if not values.get("run_dir"):
        raise ValueError("run_dir is missing: name the folder of this run")
    places = {name: values.pop(name, default) for name, default in PLACES.items()}
    for name, value in places.items():
        kinds = PLACE_TYPES[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            said = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{name} must be of type {said}; got {str(value)[:50]!r}")
    if isinstance(places["corpus"], list) and not all(isinstance(path, str) for path in places["corpus"]):
        raise ValueError(f"corpus must be a path or a list of paths; got {str(places['corpus'])[:50]}")
    return places, DistillConfig(**values)


if __name__ == "__main__":
    main()
