"""Execute the cells of a study through papermill, each in its own process, then the whole study.

- runs/STUDY/SCALE/cells/CELL/: the executed notebook of one cell, its parameters and result
- runs/STUDY/SCALE/runs/: the training runs, which the cells share
- runs/STUDY/SCALE/: table.csv, figure.png and .svg, study.json, notebook.ipynb of the whole study

The folder of a cell that runs or failed is named CELL.unfinished.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from time import monotonic

import nbformat
import psutil
import torch
import yaml
from filelock import FileLock, Timeout
from ipykernel.kernelspec import write_kernel_spec
from tqdm import tqdm

from .study import NOTEBOOKS, Cell, ConfigError, Study


@dataclass(frozen=True)
class Outcome:
    cell: Cell
    seconds: float
    error: str | None  # None: success


class Runner:
    """Executes a study's notebook.

    Args:
        study: the study.
        folder: of the study at this scale.
        minutes: time limit of a cell; a cell that exceeds it is stopped and repeated once.
        jobs: cells at the same time; they share the cores, and each has one of the GPUs.
    """

    def __init__(self, study: Study, folder: Path, minutes: float, jobs: int = 1):
        self.study, self.folder, self.minutes, self.jobs = study, folder.resolve(), minutes, jobs
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()
        self._gpus: SimpleQueue[str] = SimpleQueue()  # a place for every job
        for _, gpu in zip(range(jobs), cycle(_gpus() or [""]), strict=False):
            self._gpus.put(gpu)

    def done(self, cell: Cell) -> bool:
        """Whether the cell has finished with these parameters. Raises ConfigError if it has finished with others."""
        path = self._folder(cell) / "parameters.yaml"
        if not path.exists():
            return False
        was = yaml.safe_load(path.read_text())
        now = self._parameters(cell, self._folder(cell), False)
        was, now = ({name: value for name, value in each.items() if name != "results"} for each in (was, now))
        changed = [f"{name} was {was.get(name)}, is {now[name]}" for name in now if was.get(name) != now[name]]
        if changed:
            raise ConfigError(
                f"{self.folder} holds this study with other parameters: {'; '.join(changed)}. "
                "Use another folder (--runs), or remove that one"
            )
        return True

    def run(self, cells: list[Cell]) -> list[Outcome]:
        """Execute the cells that have not finished. A cell that fails or is stopped does not stop the others."""
        left = [cell for cell in cells if not self.done(cell)]
        if len(left) < len(cells):
            tqdm.write(f"{len(cells) - len(left)} of {len(cells)} cells have finished already")
        outcomes = []
        bar = tqdm(total=len(left), desc=self.study.name, unit="cell", disable=not left)
        with ThreadPoolExecutor(self.jobs) as pool, bar:
            waiting = [pool.submit(self._run_cell, cell) for cell in left]
            try:
                for future in as_completed(waiting):
                    outcome = future.result()
                    outcomes.append(outcome)
                    tqdm.write(f"{outcome.cell.name}: {outcome.error or f'done in {outcome.seconds:.0f} s'}")
                    bar.update()
            except BaseException:  # Ctrl-C: leave no running process
                self._stopped.set()
                for future in waiting:
                    future.cancel()
                for process in list(self._running):
                    _kill(process)
                raise
        return outcomes

    def gather(self, everything: Cell) -> Outcome:
        """Execute the notebook with all values over the finished runs, for the table and figure of the study."""
        unfinished = self.folder / "all.unfinished"
        outcome = self._execute(everything, unfinished, draw_only=True)
        if outcome.error is None:
            for path in unfinished.iterdir():
                os.replace(path, self.folder / path.name)
            unfinished.rmdir()
        return outcome

    def _run_cell(self, cell: Cell) -> Outcome:
        folder = self._folder(cell)
        unfinished = folder.with_name(folder.name + ".unfinished")
        outcome = self._execute(cell, unfinished)
        if outcome.error is None:
            os.replace(unfinished, folder)
        return outcome

    def _execute(self, cell: Cell, folder: Path, draw_only: bool = False) -> Outcome:
        started = monotonic()
        for _ in range(2):  # again after the time limit, or if the kernel dies: another process can take its port
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            values = self._parameters(cell, folder, draw_only)
            (folder / "parameters.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
            code = self._papermill(folder)
            error = _raised(folder) if code else None
            if code == 0 or error or self._stopped.is_set():
                break
        if code != 0:
            stopped = f"stopped after {self.minutes:g} minutes, twice"
            error = error or (stopped if code is None else _last_line(folder))
            error += f" (see {folder / 'log.txt'})"
        return Outcome(cell, monotonic() - started, error)

    def _papermill(self, folder: Path) -> int | None:
        """The exit status; None after the time limit."""
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3", "--cwd", NOTEBOOKS]
        command += ["--start-timeout", "600"]  # seconds; a busy machine starts many kernels slowly
        command += ["-f", folder / "parameters.yaml", self.study.notebook, folder / "notebook.ipynb"]
        # An own OMP_NUM_THREADS stays: beside other work, threads that wait for each other are slower than one.
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))} | os.environ
        if gpu := self._gpus.get():
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with tempfile.TemporaryDirectory() as jupyter, (folder / "log.txt").open("w") as log:
            write_kernel_spec(Path(jupyter) / "kernels" / "python3")  # this interpreter, before any other python3
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment | {"JUPYTER_PATH": jupyter},
            )
            self._running.add(process)
            try:
                if self._stopped.is_set():
                    _kill(process)
                return process.wait(self.minutes * 60)
            except subprocess.TimeoutExpired:
                _kill(process)
                return None
            finally:
                self._running.discard(process)
                self._gpus.put(gpu)

    def _parameters(self, cell: Cell, folder: Path, draw_only: bool) -> dict:
        managed = {"runs": str(self.folder / "runs"), "results": str(folder), "draw_only": draw_only}
        return cell.parameters | managed

    def _folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name


def _gpus() -> list[str]:
    """The GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a study's folder. Raises ConfigError if another process has locked it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(
            f"{folder} is in use by another process: wait for it, or use another folder (--runs)"
        ) from error


def _kill(process: subprocess.Popen) -> None:
    """Kill a process and its descendants: the notebook's kernel is not in the process group."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def _raised(folder: Path) -> str | None:
    """One line: the error that the notebook raised; None if it raised none."""
    path = folder / "notebook.ipynb"
    for cell in nbformat.read(path, as_version=4).cells if path.exists() else []:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                return f"{output['ename']}: {' '.join(output['evalue'].split())}"
    return None


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text().strip().splitlines()
    return lines[-1] if lines else "papermill printed nothing"
