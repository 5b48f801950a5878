"""All that changes while a student is trained, from its first step or from a checkpoint on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from .checkpoints import BrokenCheckpoint, load_state
from .config import DistillConfig
from .discrepancy import discrepancy
from .families import HIDDEN
from .losses import DistillationLoss
from .masks import Masks, applied
from .models import SAFE_LOADING, no_progress_bars, random_student, student_of
from .runs import Run
from .scorers import scorer
from .widths import Widths, all_neurons, width_groups


class Training:
    """All that changes while training, which is what a checkpoint must hold, beside what it is measured against."""

    def __init__(self, teacher, target: Widths, held_out, config: DistillConfig, student: PreTrainedModel):
        self.teacher, self.target, self.held_out, self.config = teacher, target, held_out, config
        self.student = student
        self.loss = _loss(teacher, Widths.of(student), config).to(teacher.device)
        self.importance = scorer(config.scorer, **config.scorer_options())
        self.masks = Masks(student, self.loss, config.scope, config.recover) if config.under_masks else None
        self.optimizer = _optimizer(student, self.loss, config)
        self.learning_rate = get_linear_schedule_with_warmup(
            self.optimizer, round(config.warmup * config.steps), config.steps
        )
        self.step, self.seconds, self.last_seconds, self._started = 0, 0.0, 0.0, 0.0
        self.sizes = {name: group.size for name, group in width_groups(teacher).items()}  # the teacher's neurons
        self._kept = all_neurons(student) if config.initial == "teacher" else {}

    @classmethod
    def begin(cls, teacher, target: Widths, held_out, config: DistillConfig, resumed: Run | None) -> Training:
        """Step 0, or where the newest sound checkpoint of a run left off."""
        for folder in reversed(resumed.checkpoints() if resumed else []):
            try:
                state = load_state(folder, teacher.device)
            except BrokenCheckpoint as error:
                tqdm.write(f"{error}: looking at the checkpoint before, or beginning again if there is none")
                continue
            with no_progress_bars():
                student = type(teacher).from_pretrained(folder, dtype=torch.float32, **SAFE_LOADING).to(teacher.device)
            training = cls(teacher, target, held_out, config, student.requires_grad_(True).eval())
            training._load(state)
            return training
        copied = config.initial == "teacher"
        student = student_of(teacher) if copied else random_student(teacher, target, config.seed)
        return cls(teacher, target, held_out, config, student)

    def _load(self, state: dict) -> None:
        self.step, self.seconds, self._kept = state["step"], state["seconds"], state["kept"]
        self._kept = {name: neurons.cpu() for name, neurons in self._kept.items()}
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def state(self) -> dict:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {"step": self.step, "seconds": self.seconds, "kept": self._kept} | parts

    def _parts(self) -> dict:
        parts = {"loss": self.loss, "importance": self.importance, "optimizer": self.optimizer}
        parts |= {"learning_rate": self.learning_rate}
        return parts if self.masks is None else parts | {"masks": self.masks}

    def start_clock(self) -> None:
        self._started = perf_counter()

    def stop_clock(self, step: int) -> None:
        self.step, self.last_seconds = step, perf_counter() - self._started
        self.seconds += self.last_seconds

    def prunes(self, step: int, widths: Widths) -> bool:
        """Whether neurons are to go after this step (or, under masks, to be ranked anew)."""
        due = widths != self.widths if self.masks is None else self.config.chooses_at(step)
        return due and widths.fits_in(self.widths)

    def keep(self, kept: dict[str, torch.Tensor]) -> None:
        self._kept = {name: before[kept[name].cpu()] for name, before in self._kept.items()}

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """Which of the teacher's neurons and heads the student still has; empty if it was never its copy."""
        return self._kept if self.masks is None else self.masks.kept

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All that the optimiser moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def widths(self) -> Widths:
        return Widths.of(self.student) if self.masks is None else self.masks.widths

    @property
    def num_parameters(self) -> int:
        """Of the student as it is; what is masked does not count."""
        return sum(p.numel() for p in self.student.parameters()) if self.masks is None else self.masks.num_parameters()

    def discrepancy(self) -> dict[str, float]:
        """The held-out measures of the student as it is; the step's clock stands still meanwhile."""
        started = perf_counter()
        neurons = None if self.masks is None else self.masks.kept.get(HIDDEN)
        with applied(self.masks):
            measured = discrepancy(self.student, self.teacher, self.held_out, neurons=neurons, heads=self.loss.heads)
        self._started += perf_counter() - started
        return measured


def _loss(teacher: PreTrainedModel, widths: Widths, config: DistillConfig) -> DistillationLoss:
    return DistillationLoss(
        teacher.config.hidden_size,
        teacher.config.num_hidden_layers,
        widths.heads,
        student_hidden_size=widths.hidden,
        **config.loss_options(),
    )


def _optimizer(student: PreTrainedModel, loss: DistillationLoss, config: DistillConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and the projections (decay would pull them off the identity) do not decay."""
    parameters = list(student.parameters())
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() == 1] + list(loss.parameters())
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps, fused=True)


class Stopped(RuntimeError):
    """The run was asked to stop, and did so after a step, with a checkpoint of it."""


class StopRequest:
    """Whether SIGTERM has come: how batch systems say that time is up. Only the main thread is told of signals.

    Every process of a run must stop after the same step, or the others would wait for it forever; so they ask
    each other.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.came = accelerator, False

    def __enter__(self) -> StopRequest:
        self.listens = threading.current_thread() is threading.main_thread()
        if self.listens:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        if self.listens:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_) -> None:
        self.came = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all get the same answer."""
        if self.accelerator.num_processes == 1:
            return self.came
        came = torch.tensor(float(self.came), device=self.accelerator.device)
        return bool(self.accelerator.reduce(came, "sum"))


@contextmanager
def memory_guard(run: Run) -> Iterator[None]:
    """Say which settings to lower where memory does not suffice. Raises MemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise MemoryError(
            f"memory does not suffice ({said}). Lower micro_batch_size (the blocks that go "
            "through the models at once; the batch stays what it is), then the length of the blocks or eval_blocks. "
            f"{run.resume_hint}"
        ) from error
