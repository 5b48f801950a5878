"""A run without a notebook, in one process or many: `accelerate launch -m hdlib CONFIG.yaml`.

The file holds arguments of `DistillConfig`, `load_teacher` and `load_corpus` (for a sentence encoder `load_sentences`;
see PLACES), and `run_dir`, the run's folder. `--resume` continues from the newest checkpoint, or starts a run if there
is none. SIGTERM ends the run after its current step, with a checkpoint and exit status 143.
"""

import argparse
import re
import signal
import sys
from dataclasses import fields
from pathlib import Path

import yaml

from . import DistillConfig, Stopped, distill, load_corpus, load_sentences, load_teacher
from .config import hint
from .models import is_encoder
from .widths import family

PLACES = {
    "teacher": "embedded",
    "corpus": "embedded",
    "length": 128,
    "text_column": "text",
    "subset": None,
    "causal": None,
    "streaming": False,
    "prompt": None,
    "run_dir": "",
}
NO_DECIMAL = re.compile(r"[-+]?(0[0-7_]+|0[xb][\da-f_]+|\d[\d_]*(:[0-5]?\d)+([.]\d*)?)", re.IGNORECASE)  # 010 is 8
TYPES = {"corpus": str | list, "subset": str | None, "prompt": str | None, "causal": bool | None}  # else the default's


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hdlib", description="Distil a teacher into a narrower student.")
    parser.add_argument("config", type=Path, help="a YAML file of arguments")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in run_dir")
    arguments = parser.parse_args()
    try:
        places, config = read(arguments.config)
        teacher, tokenizer = load_teacher(places["teacher"])
        places["causal"] = family(teacher).causal if places["causal"] is None else places["causal"]
        load, own = (load_sentences, ["prompt"]) if is_encoder(teacher) else (load_corpus, ["causal", "streaming"])
        text = {name: places[name] for name in ("length", "text_column", "subset", *own)}
        train, validation = load(places["corpus"], tokenizer, **text)
        run = distill(teacher, tokenizer, train, validation, config, places["run_dir"], resume=arguments.resume)
    except Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        raise SystemExit(f"{arguments.config}: {error}") from error
    print(f"student: {run.student_folder}" if run.has_student else f"masked model: {run.checkpoints()[-1]}")


def read(path: Path) -> tuple[dict, DistillConfig]:
    """A YAML file to (places, config). Raises ValueError for invalid YAML and for an unknown name or a wrong value."""
    try:
        text = path.read_text()
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the file is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError("the file has no names with values, such as `steps: 1000`")
    for mapping in (node, *(value for _, value in node.value if isinstance(value, yaml.MappingNode))):
        names = [name.value for name, _ in mapping.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the file sets {twice[0]} several times: keep one of them")
    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken) and token.plain and NO_DECIMAL.fullmatch(token.value):
            raise ValueError(f"{token.value} is read as {yaml.safe_load(token.value)}: write it as a decimal number")
    known = [*PLACES, *(field.name for field in fields(DistillConfig))]
    if unknown := [str(name) for name in values if name not in known]:
        raise ValueError(f"unknown arguments {', '.join(unknown)}; known are: {', '.join(known)}")
    if not values.get("run_dir"):
        raise ValueError("run_dir is missing: name the folder of this run")
    places = {name: values.pop(name, default) for name, default in PLACES.items()}
    for name, value in places.items():
        kind = TYPES.get(name, type(PLACES[name]))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            expected = kind if name in TYPES else kind.__name__
            raise ValueError(f"{name} must be of type {expected}; got {repr(value)[:50]}{hint(value, kind)}")
    if isinstance(places["corpus"], list) and not all(isinstance(path, str) for path in places["corpus"]):
        raise ValueError(f"corpus must be a path or a list of paths; got {str(places['corpus'])[:50]}")
    return places, DistillConfig(**values)


if __name__ == "__main__":
    main()
