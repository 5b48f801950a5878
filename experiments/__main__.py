"""Run a study in batch: `python -m experiments STUDY --scale smoke|laptop|gpu|paper`.

Executes the study's notebook through papermill, once for every cell of its grid, then once over all of them. The last
execution writes `runs/STUDY/SCALE/table.csv` and `figure.png`. Finished cells are not repeated. The exit status is 0 if
every cell succeeded.
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # batch systems stop a job with SIGTERM
    arguments = _arguments()
    try:
        if arguments.study is None:
            print(_overview())
            return
        if arguments.jobs < 1:
            raise ConfigError(f"--jobs must be at least 1; got {arguments.jobs}")
        study, scale = Study.load(arguments.study), Scale.load(arguments.scale)
        folder = Path(arguments.runs).expanduser() / study.name / scale.name
        if arguments.estimate:
            print(report.estimate(study, folder.with_name(arguments.estimate), scale))
            return
        values = parameters(study, scale, _overrides(arguments.set))
        every = cells(study, values)
        wanted = only(every, arguments.only) if arguments.only else every
        with alone_in(folder):
            failed = _run(study, scale, Runner(study, folder, scale.minutes, arguments.jobs), values, every, wanted)
    except ConfigError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: finished cells are kept; start the same command again for the others")
    sys.exit(1 if failed else 0)


def _run(study: Study, scale: Scale, runner: Runner, values: dict, every: list[Cell], wanted: list[Cell]) -> bool:
    """Execute the wanted cells, then the whole study over all finished ones; return whether anything failed."""
    print(f"{study.question}\n{study.notebook.name}, scale {scale.name}: {scale.about}")
    outcomes = [*runner.run(wanted), gathered := runner.gather(Cell("all together", values))]
    if not gathered.error:
        _print_results(study, scale, runner.folder, values)
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"FAILED {outcome.cell.name}: {outcome.error}")
    if missing := [cell.name for cell in every if not runner.done(cell)]:
        print(f"{len(missing)} of {len(every)} cells are missing: {'; '.join(missing)}")
    return bool(failed)


def _print_results(study: Study, scale: Scale, folder: Path, values: dict) -> None:
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
    """`NAME=VALUE` pairs as YAML reads them; paths become absolute, since a notebook runs in another folder."""
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set needs NAME=VALUE; got {pair!r}")
        value = yaml.safe_load(text)
        if name in ("teacher", "corpus", "tables") and isinstance(value, str):
            path = Path(value).expanduser()
            value = str(path.resolve()) if path.exists() else value
        values[name] = value
    return values


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__.split("\n\n")[0])
    parser.add_argument("study", nargs="?", help="name of a study; without it, list the studies and scales")
    parser.add_argument("--scale", default="smoke", help="a name, or the path of a YAML file (default: smoke)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at the same time (default: 1)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="AXIS=VALUE", help="run the cells with these values only"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="set parameters of the notebook")
    parser.add_argument("--runs", default="runs", metavar="FOLDER", help="output folder (default: runs)")
    parser.add_argument(
        "--estimate", metavar="MEASURED", help="run nothing; estimate the time at --scale from the runs at this scale"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
