"""Answer a study's question in batch: `python -m experiments STUDY --scale smoke|laptop|gpu|paper`.

Executes the study's notebook for every cell of its grid through papermill, and once more for all of them
together, which leaves `runs/STUDY/SCALE/table.csv` and `figure.png`. What is done already is not done again. The exit
status is 0 if every cell went well.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import pandas as pd
import yaml

from . import report
from .runner import Runner, alone_in
from .study import Cell, ConfigError, Scale, Study, cells, names, only, parameters


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's way to say Ctrl-C
    arguments = _arguments()
    try:
        if arguments.study is None:
            print(_overview())
            return
        if arguments.jobs < 1:
            raise ConfigError(f"--jobs is at least 1; got {arguments.jobs}")
        study, scale = Study.load(arguments.study), Scale.load(arguments.scale)
        folder = Path(arguments.runs) / study.name / scale.name
        if arguments.estimate:
            print(report.estimate(study, Path(arguments.runs) / study.name / arguments.estimate, scale))
            return
        values = parameters(study, scale, _overrides(arguments.set))
        every = cells(study, values)
        wanted = only(every, arguments.only) if arguments.only else every
        with alone_in(folder):
            failed = _run(study, scale, Runner(study, folder, scale.minutes, arguments.jobs), values, every, wanted)
    except ConfigError as mistake:
        sys.exit(f"{mistake}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: cells that were done stay, the others go on where they were at the next start")
    sys.exit(1 if failed else 0)


def _run(study: Study, scale: Scale, runner: Runner, values: dict, every: list[Cell], wanted: list[Cell]) -> bool:
    """The cells that are wanted, then all that there are together; returns whether anything failed."""
    print(f"{study.question}\n{study.notebook.name}, scale {scale.name}: {scale.about}")
    failed = [outcome for outcome in runner.run(wanted) if outcome.error]
    gathered = runner.gather(Cell("all together", values))
    if gathered.error:
        failed.append(gathered)
    else:
        _tell(study, scale, runner.folder, values)
    for outcome in failed:
        print(f"FAILED {outcome.cell.name}: {outcome.error}")
    missing = [cell.name for cell in every if not runner.done(cell)]
    if missing:
        print(f"{len(missing)} of {len(every)} cells are missing: {'; '.join(missing)}")
    return bool(failed)


def _tell(study: Study, scale: Scale, folder: Path, values: dict) -> None:
    table = pd.read_csv(folder / "table.csv")
    found = report.answers(study, table)
    report.save(folder, study, scale, values, found, table)
    for answer in found:
        print(report.describe(answer))
    print(report.estimate(study, folder, Scale.load("paper")))
    print(f"table: {folder / 'table.csv'}\nfigure: {folder / 'figure.png'}")


def _overview() -> str:
    studies = {name: Study.load(name).question for name in names("studies")}
    scales = {name: Scale.load(name).about for name in names("scales")}
    lines = [f"  {name:26} {text}" for name, text in studies.items()]
    return "\n".join(["studies", *lines, "scales", *(f"  {name:26} {text}" for name, text in scales.items())])


def _overrides(pairs: list[str]) -> dict:
    """`NAME=VALUE` to values as YAML reads them. What is a path here stays one where the notebook runs."""
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes NAME=VALUE; got {pair!r}")
        value = yaml.safe_load(text)
        is_path = name in ("teacher", "corpus", "tables") and isinstance(value, str) and Path(value).exists()
        values[name] = str(Path(value).resolve()) if is_path else value
    return values


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__.split("\n\n")[0])
    parser.add_argument("study", nargs="?", help="which question; none: list the studies and scales")
    parser.add_argument(
        "--scale", default="smoke", help="how large: a name, or the path of a YAML file (default: smoke)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at the same time (default: 1)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="AXIS=VALUE", help="only cells with one of these on each axis"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="parameters of the notebook")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="where everything goes (default: runs)")
    parser.add_argument(
        "--estimate", metavar="MEASURED", help="run nothing: what the scale would take, from that one's runs"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
