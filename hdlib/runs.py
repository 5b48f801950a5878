"""Runs are folders: what a training did, in files that outlive it.

run.json                    arguments, versions, teacher, data; written before the first step
metrics.jsonl               one line of JSON for each logged step
checkpoints/step_00000400/  a stock model folder, the tokenizer, and the training state beside them
kept.json                   which of the teacher's neurons the student still has, by group; written before it
neurons/step_00000120.safetensors  importance of the teacher's neurons at a prune, and which stayed; about 100 of them
student/                    the result, a stock model folder; missing where neurons were ranked over all layers
.lock                       held by the process that writes here
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import save_folder
from .config import DistillConfig
from .models import SAFE_LOADING, language_model_class, no_progress_bars
from .neurons import Prune, step_of

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("run.json", "metrics.jsonl", "checkpoints", "neurons", "kept.json", "student")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


class Run:
    """A run folder, opened. Everything is read from files when asked for; the metrics again when they have grown."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._read: tuple[tuple[int, int] | None, pd.DataFrame | None] = (None, None)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Open a run folder, finished or not.

        Raises:
            FileNotFoundError: no run.json there.
        """
        run = cls(folder)
        if not run.begun:
            raise FileNotFoundError(f"{folder} is no run folder: it holds no run.json")
        return run

    @classmethod
    def start(cls, folder: str | Path, arguments: dict, processes: int = 1) -> Run:
        """Make a new run folder. Raises FileExistsError if another run is there, or a part of one."""
        run = cls(folder)
        if there := [name for name in PARTS if run._file(name).exists()]:
            raise FileExistsError(
                f"{folder} already holds a run ({', '.join(there)}); "
                "pass resume=True to go on with it, or another folder for a new one"
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        description = {"arguments": arguments, "processes": processes, "versions": _versions(), "machine": _machine()}
        write_whole(run._file("run.json"), json.dumps(description, indent=2, allow_nan=False) + "\n")
        return run

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder: two runs that write to one would mix.

        Raises:
            FileExistsError: another process holds it.
            OSError: nothing can be written there.
        """
        lock = FileLock(self._file(".lock"), timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise FileExistsError(
                f"another process is writing to {self.folder}: wait for it, or name another folder"
            ) from error
        except OSError as error:
            raise OSError(f"nothing can be written to {self.folder} ({error.strerror}): name another folder") from error
        try:
            yield
        finally:
            lock.release()

    @property
    def description(self) -> dict:
        """Arguments, versions and machine, as they were when the run started."""
        try:
            return json.loads(self._file("run.json").read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._file('run.json')} is damaged and cannot be read: {error}") from error

    @property
    def arguments(self) -> dict:
        return self.description["arguments"]

    @property
    def config(self) -> DistillConfig:
        return DistillConfig(**self.arguments["config"])

    @property
    def metrics(self) -> pd.DataFrame:
        """Every logged step as a pandas DataFrame, indexed by step; empty before the first.

        Raises:
            ValueError: a line that cannot be read.
        """
        import pandas as pd

        path = self._file("metrics.jsonl")
        if not path.exists():
            return pd.DataFrame()
        state = path.stat()
        stamp = (state.st_mtime_ns, state.st_size)
        if self._read[0] != stamp:  # it has grown, or was never read
            self._read = (stamp, _read_metrics(path))
        return self._read[1].copy(deep=False)  # written to, it is copied

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl. A last line that was cut off by a kill is left out."""
        path = self._file("metrics.jsonl")
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def begun(self) -> bool:
        return self._file("run.json").exists()

    @property
    def finished(self) -> bool:
        return self.begun and (self.has_student or self._last_step().is_dir())

    @property
    def has_student(self) -> bool:
        """Whether there is a result that stock classes open; under a global quota there never is."""
        return self._file("student").is_dir()

    @property
    def student_folder(self) -> Path:
        """Where the result lies: a folder that plain AutoModelForMaskedLM (or ForCausalLM) opens."""
        if not self.finished:
            raise FileNotFoundError(f"{self.folder} holds no student yet: the run has not finished")
        if not self.has_student:
            raise FileNotFoundError(
                f"{self.folder} has no student that could be saved: neurons were ranked over all layers "
                f"(scope='global'), which no stock class can hold. Its wide model and masks are in {self._last_step()}"
            )
        return self._file("student")

    def student(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The result and its tokenizer, through the stock classes."""
        auto_class = language_model_class(AutoConfig.from_pretrained(self.student_folder, trust_remote_code=False))
        with no_progress_bars():
            model = auto_class.from_pretrained(self.student_folder, dtype=torch.float32, **SAFE_LOADING)
        return model, AutoTokenizer.from_pretrained(self.student_folder, trust_remote_code=False)

    @property
    def kept(self) -> dict[str, list[int]]:
        """Which of the teacher's neurons the student still has: group name to indices.

        Raises:
            FileNotFoundError: not finished, or the student never was the teacher's copy.
        """
        path = self._file("kept.json")
        if not path.exists():
            why = "it began with random weights" if self.finished else "the run has not finished"
            raise FileNotFoundError(f"{self.folder} does not say which neurons were kept: {why}")
        return json.loads(path.read_text())

    def checkpoints(self) -> list[Path]:
        """Whole checkpoint folders, oldest first."""
        return sorted(path for path in self._file("checkpoints").glob("step_*") if path.suffix != ".tmp")

    def _last_step(self) -> Path:
        """The checkpoint of the last step: only a run that must stay under its masks has one."""
        return self._file("checkpoints") / f"step_{self.arguments['config']['steps']:08d}"

    @property
    def way_back(self) -> str:
        """Where a run that cannot go on may be taken up again, in words."""
        saved = self.checkpoints()
        return f"The last good checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl."""
        with self._written("metrics.jsonl"), self._file("metrics.jsonl").open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def save_checkpoint(self, step: int, model, tokenizer, state: dict, keep: int) -> None:
        """Save model, tokenizer and training state as of after `step`; keep the newest `keep` of them."""
        folder = self._file("checkpoints") / f"step_{step:08d}"
        with self._written(f"the checkpoint of step {step}"):
            save_folder(folder, model, tokenizer, state)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)

    @property
    def pruned_at(self) -> list[int]:
        """The steps of the prunes that were recorded."""
        return sorted(step_of(path) for path in self._file("neurons").glob("step_*.safetensors"))

    def prune(self, step: int) -> Prune:
        """What was recorded at a step out of `pruned_at`. Raises ValueError for a file that is damaged."""
        return Prune.load(self._file("neurons") / f"step_{step:08d}.safetensors")

    def save_prune(self, prune: Prune) -> None:
        with self._written("what was pruned"):
            prune.save(self._file("neurons"))

    def students(self) -> dict[int, Path]:
        """The saved models that are the student after a step; of a run under masks there is only the result."""
        saved = {} if self.config.under_masks else {step_of(folder): folder for folder in self.checkpoints()}
        return saved | ({self.config.steps: self.student_folder} if self.has_student else {})

    def save_student(self, model, tokenizer, card: str) -> None:
        with self._written("the student"):
            save_folder(self._file("student"), model, tokenizer, card=card)

    @contextmanager
    def _written(self, what: str) -> Iterator[None]:
        """Say what could not be written, and that it is not for nothing: a disk that is full, for instance."""
        try:
            yield
        except OSError as error:
            raise OSError(f"{what} could not be written to {self.folder}: {error}. {self.way_back}") from error

    def save_kept(self, kept: dict[str, torch.Tensor]) -> None:
        indices = {name: neurons.tolist() for name, neurons in sorted(kept.items())}
        write_whole(self._file("kept.json"), json.dumps(indices) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run logs it again."""
        lines = [json.dumps(record) for record in self.records() if record["step"] <= step]
        write_whole(self._file("metrics.jsonl"), "".join(line + "\n" for line in lines))
        for path in self._file("neurons").glob("step_*.safetensors"):
            if step_of(path) > step:
                path.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / name


def _read_metrics(path: Path) -> pd.DataFrame:
    """A record as a table; Arrow is quick with a long one."""
    import pandas as pd
    from pyarrow import ArrowInvalid
    from pyarrow.json import read_json

    whole = path.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1]  # the last one may be cut off by a kill, or still being written
    if not lines:
        return pd.DataFrame()
    try:
        return read_json(BytesIO(lines)).to_pandas().set_index("step")
    except (ArrowInvalid, KeyError) as error:
        raise ValueError(f"{path} is damaged and cannot be read: {error}") from error


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        package: version(package) for package in PACKAGES if find_spec(package)
    }


def _machine() -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
