"""Run folders: what one training leaves on the disk.

run.json                           arguments, versions and machine; written before the first step.
metrics.jsonl                      one JSON record for each logged step.
blocks.jsonl                       the KL of every held-out block, for each step that measured it; not of sentences.
checkpoints/step_00000400/         a stock model folder, the tokenizer and the training state.
neurons/step_00000120.safetensors  importance of the teacher's neurons at a prune, and which were kept.
kept.json                          indices of the teacher's neurons and layers that the student kept, by group.
student/                           the result, a stock model folder, of a sentence encoder in the format of
                                   sentence-transformers; absent for scope="global".
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from os.path import expanduser
from pathlib import Path
from typing import Self

import torch
from filelock import FileLock, Timeout
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import save_folder
from .config import DistillConfig
from .models import EMBEDDED_TEACHER, is_encoder, load_teacher
from .widths import Widths, family

PARTS = ("run.json", "metrics.jsonl", "blocks.jsonl", "checkpoints", "neurons", "kept.json", "student")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
# Environment variables that can change the numbers of a run
NUMERIC = ("ACCELERATE_", "CUBLAS_", "NVIDIA_TF32", "ONEDNN_DEFAULT_FPMATH", "TORCH_ALLOW_TF32")
RECORDED = 100  # about this many prunes of a run are recorded at most


@dataclass(frozen=True)
class Prune:
    """Importance of the teacher's neurons at a prune and the neurons it kept, by group."""

    step: int
    importance: Mapping[str, Tensor]  # (N,) at least 0; nan for neurons removed earlier
    kept: Mapping[str, Tensor]  # (N,) bool, after the prune

    @classmethod
    def of(cls, step: int, sizes: Mapping[str, int], scores, before, after) -> Self:
        """From scores of the student's neurons (under masks: all) and the indices kept `before` and `after`.

        Of a layer that has left, all neurons have.
        """
        importance, kept, none = {}, {}, torch.arange(0)
        for name, size in sizes.items():
            score = scores.get(name, torch.zeros(0))
            scored = before.get(name, none).cpu() if len(score) < size else torch.arange(size)
            importance[name] = torch.full((size,), torch.nan).index_copy(0, scored, score.float().cpu())
            kept[name] = torch.zeros(size, dtype=torch.bool).index_fill(0, after.get(name, none).cpu(), True)
        return cls(step, importance, kept)


class Run:
    """An opened run folder. Properties read the files at each access."""

    def __init__(self, folder: str | Path):
        self.folder = Path(expanduser(folder))
        self._parsed = ((), None)  # size and time of metrics.jsonl, and its table

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open a run folder, finished or not. Raises FileNotFoundError if it has no run.json."""
        if not cls(folder).begun:
            raise FileNotFoundError(f"{folder} is no run folder: it holds no run.json")
        return cls(folder)

    @classmethod
    def start(cls, folder: str | Path, arguments: dict, processes: int = 1) -> Self:
        """Create a run folder. Raises FileExistsError if it has files of another run."""
        run = cls(folder)
        if found := [name for name in PARTS if (run.folder / name).exists()]:
            raise FileExistsError(f"{folder} already holds a run ({', '.join(found)}): use resume=True or a new folder")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        machine = {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        machine |= {"float32_products": torch.get_float32_matmul_precision()}
        machine |= {"environment": {name: os.environ[name] for name in os.environ if name.startswith(NUMERIC)}}
        versions = {"python": platform.python_version()}
        versions |= {package: version(package) for package in PACKAGES if find_spec(package)}
        description = {"arguments": arguments, "processes": processes, "versions": versions, "machine": machine}
        write_whole(run.folder / "run.json", json.dumps(description, indent=2, allow_nan=False) + "\n")
        return run

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder. Raises FileExistsError if another process holds it, OSError if it is not writable."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout as error:
            raise FileExistsError(f"another process is writing to {self.folder}: wait, or use a new folder") from error
        except OSError as error:
            raise OSError(f"nothing can be written to {self.folder} ({error.strerror}): name another folder") from error
        with lock:
            yield

    @property
    def description(self) -> dict:
        """Arguments, number of processes, versions and machine at the start of the run."""
        try:
            return json.loads((self.folder / "run.json").read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.folder / 'run.json'} is damaged and cannot be read: {error}") from error

    @property
    def arguments(self) -> dict:
        return self.description["arguments"]

    @property
    def config(self) -> DistillConfig:
        return DistillConfig(**self.arguments["config"])

    @property
    def metrics(self):
        """A DataFrame of the logged steps, indexed by step; empty before the first. Raises ValueError if damaged."""
        import pandas as pd

        path = self.folder / "metrics.jsonl"
        state = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None
        if state != self._parsed[0]:
            lines = self._lines(path.name)
            try:
                frame = pd.read_json(BytesIO(lines), lines=True, engine="pyarrow").set_index("step") if lines else None
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path} is damaged and cannot be read: {error}") from error
            self._parsed = state, pd.DataFrame() if frame is None else frame
        return self._parsed[1].copy(deep=False)

    @property
    def measure(self) -> str:
        """The name of the held-out discrepancy in `metrics`."""
        return "held_out_cosine_distance" if "held_out_cosine_distance" in self.metrics else "held_out_kl"

    def records(self, name: str = "metrics.jsonl") -> list[dict]:
        """The logged steps, one dictionary each."""
        return [json.loads(line) for line in self._lines(name).splitlines()]

    @property
    def kl_of_blocks(self):
        """KL(teacher || student), nats: a DataFrame of one row per measured step, one column per held-out block."""
        import pandas as pd

        steps = {record["step"]: record["kl"] for record in self.records("blocks.jsonl")}
        return pd.DataFrame(steps, dtype=float).T.rename_axis("step")

    def _lines(self, name: str) -> bytes:
        """The complete lines of a file; the last one is incomplete after a kill."""
        path = self.folder / name
        content = path.read_bytes() if path.exists() else b""
        return content.rpartition(b"\n")[0]

    @property
    def begun(self) -> bool:
        return (self.folder / "run.json").exists()

    @property
    def finished(self) -> bool:
        return self.begun and (self.has_student or self.arguments["config"]["steps"] in map(_step, self.checkpoints()))

    @property
    def has_student(self) -> bool:
        """Whether the result is a stock model folder; always False for scope="global"."""
        return (self.folder / "student").is_dir()

    @property
    def student_folder(self) -> Path:
        """The result, a stock model folder. Raises FileNotFoundError before the end or for scope="global"."""
        if not self.finished:
            raise FileNotFoundError(f"{self.folder} has no student: the run has not finished")
        if not self.has_student:
            reason = "scope='global' gives each layer its own widths, which no stock class reads"
            raise FileNotFoundError(f"{self.folder} has no student: {reason}. Its masks: {self.checkpoints()[-1]}")
        return self.folder / "student"

    def student(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The result in float32 and its tokenizer, both of stock classes."""
        return load_teacher(self.student_folder)

    @property
    def kept(self) -> dict[str, list[int]]:
        """Indices of the teacher's neurons and layers that the student kept. Raises FileNotFoundError if none."""
        path = self.folder / "kept.json"
        if not path.exists():
            reason = "the student started from random weights" if self.finished else "the run has not finished"
            raise FileNotFoundError(f"{path} is missing: {reason}")
        return json.loads(path.read_text())

    def checkpoints(self) -> list[Path]:
        """Complete checkpoint folders, oldest first."""
        return sorted(self.folder.glob("checkpoints/step_*[0-9]"))

    @property
    def resume_hint(self) -> str:
        """For error messages: where a run can be resumed."""
        saved = self.checkpoints()
        return f"The last good checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."

    def students(self) -> dict[int, Path]:
        """Saved students by step. A checkpoint under masks holds the wide model and is left out."""
        saved = {} if self.config.under_masks else {_step(folder): folder for folder in self.checkpoints()}
        return saved | ({self.config.steps: self.student_folder} if self.has_student else {})

    @property
    def pruned_at(self) -> list[int]:
        """Steps of the recorded prunes."""
        return sorted(_step(path) for path in self.folder.glob("neurons/step_*.safetensors"))

    def prune(self, step: int) -> Prune:
        """The record of a step in `pruned_at`. Raises ValueError if its file is damaged."""
        path = self.folder / f"neurons/step_{step:08d}.safetensors"
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged and cannot be read: {error}") from error
        kept = {name.removeprefix("stays."): each for name, each in tensors.items() if name.startswith("stays.")}
        return Prune(step, {name: tensors[f"importance.{name}"].float() for name in kept}, kept)

    def log(self, record: dict, name: str = "metrics.jsonl") -> None:
        """Append a line."""
        with self._writing(name), (self.folder / name).open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def log_blocks(self, step: int, kl: Tensor) -> None:
        """Append the discrepancy (n,) of the held-out blocks at a step; null for a block without labels."""
        values = [None if value.isnan() else float(f"{value:.6g}") for value in kl]
        self.log({"step": step, "kl": values}, "blocks.jsonl")

    def save_checkpoint(self, step: int, model, tokenizer, state: dict, keep: int) -> None:
        """Save model, tokenizer and training state after `step`; keep only the newest `keep` checkpoints."""
        with self._writing(f"the checkpoint of step {step}"):
            save_folder(self.folder / f"checkpoints/step_{step:08d}", model, tokenizer, state)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)

    def save_prune(self, prune: Prune) -> None:
        """Save the importance as bfloat16: with the kept neurons, 3 bytes for each neuron of the teacher."""
        tensors = {f"importance.{name}": values.bfloat16() for name, values in prune.importance.items()}
        tensors |= {f"stays.{name}": kept for name, kept in prune.kept.items()}  # keys of the files of hdlib 0.1
        with self._writing(f"the prune of step {prune.step}"):
            write_whole(self.folder / f"neurons/step_{prune.step:08d}.safetensors", save(tensors))

    def save_kept(self, kept: dict[str, Tensor]) -> None:
        write_whole(self.folder / "kept.json", json.dumps({name: kept[name].tolist() for name in sorted(kept)}) + "\n")

    def save_student(self, student: PreTrainedModel, tokenizer, teacher: PreTrainedModel) -> None:
        with self._writing("the student"):
            save_folder(self.folder / "student", student, tokenizer, card=_card(self, student, teacher))

    def rewind(self, step: int) -> None:
        """Delete what was recorded after `step`: a resumed run records it again."""
        for name in ("metrics.jsonl", "blocks.jsonl"):
            lines = [json.dumps(record) + "\n" for record in self.records(name) if record["step"] <= step]
            write_whole(self.folder / name, "".join(lines))
        for path in self.folder.glob("neurons/step_*.safetensors"):
            if _step(path) > step:
                path.unlink()

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Extend the message of an OSError by what was written, the folder and the last checkpoint."""
        try:
            yield
        except OSError as error:
            raise OSError(f"{what} could not be written to {self.folder}: {error}. {self.resume_hint}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a temporary file and rename it: a crash leaves the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _card(run: Run, student: PreTrainedModel, teacher: PreTrainedModel) -> str:
    """The model card, from the record of a run whose last step is done."""
    config, blocks, origin = (run.arguments[name] for name in ("config", "blocks", "teacher"))
    last, read = run.records()[-1], config["steps"] * config["batch_size"]
    tokens = read * blocks.get("tokens", blocks["train"] * blocks["length"]) // blocks["train"]
    name = "the embedded teacher of hdlib" if Path(origin) == EMBEDDED_TEACHER else Path(origin).name
    data = ModelCardData(library_name="transformers", tags=["homodistil", "distillation", "pruning"])
    data.pipeline_tag = "text-generation" if family(teacher).causal else "fill-mask"
    purpose, rows, text, discrepancy = _of_encoder(last) if is_encoder(teacher) else _of_language_model(last, blocks)
    if is_encoder(teacher):
        data.library_name, data.pipeline_tag = "sentence-transformers", "sentence-similarity"
        data.tags.append("sentence-transformers")
    data.base_model = origin if origin.count("/") == 1 and not Path(origin).exists() else None
    return f"""---
{data.to_yaml()}
---

# A student of {name}

{purpose}, distilled from {name} with HomoDistil
([Liang et al., ICLR 2023](https://arxiv.org/abs/2302.09632)). The teacher's licence and restrictions on use apply.

| | this model | teacher |
|---|---|---|
| parameters | {student.num_parameters():,} | {teacher.num_parameters():,} |
| shape | {Widths.of(student)} | {Widths.of(teacher)} |
{rows}
Measured on {min(config["eval_blocks"], blocks["validation"])} held-out {text}. {discrepancy}
Training: {config["steps"]:,} steps of {config["batch_size"]:,} {text.split()[0]}, {tokens:,} tokens;
initial={config["initial"]}, schedule={config["schedule"]}, scorer={config["scorer"]},
learning_rate={config["learning_rate"]:g}, seed={config["seed"]}, precision={run.arguments["precision"]};
{", ".join(f"{package} {version}" for package, version in run.description["versions"].items())}.
"""


def _of_language_model(last: dict, blocks: dict) -> tuple[str, str, str, str]:
    """Of a card: purpose, rows of measures, text and discrepancy."""
    rows = f"""| language-model loss, nats per token | {last["held_out_mlm"]:.3f} | {last["held_out_teacher_mlm"]:.3f} |
| accuracy | {last["held_out_accuracy"]:.3f} | {last["held_out_teacher_accuracy"]:.3f} |
"""
    discrepancy = f"""Mean KL
divergence to the teacher: {last["held_out_kl"]:.3f} nats; same first choice: {last["held_out_agreement"]:.1%}."""
    purpose = "A pre-trained language model for fine-tuning"
    return purpose, rows, f"blocks of {blocks['length']} tokens", discrepancy


def _of_encoder(last: dict) -> tuple[str, str, str, str]:
    discrepancy = f"""Mean cosine distance
to the teacher's embeddings: {last["held_out_cosine_distance"]:.3f}; of the teacher's 10 nearest sentences, found in its
index: {last["held_out_recall"]:.1%}."""
    purpose = """A sentence encoder for sentence-transformers. It embeds into the space of its teacher, so that it
searches an index built by the teacher. It was"""
    return purpose, "", "sentences", discrepancy
