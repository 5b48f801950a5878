"""The loop: HomoDistil's Algorithm 1, each step one call into the file of its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from .config import DistillConfig
from .data import Masking, NextToken, TrainingBatches
from .discrepancy import discrepancy
from .families import HIDDEN
from .losses import DistillationLoss, LossTerms
from .masking import Masks, applied
from .models import forward, random_student, recording, student_of, without_bars
from .narrowing import narrow
from .precision import autocast, bfloat16_gain, cast_once, chosen
from .runs import Run
from .scorers import Scorer, scorer
from .widths import Widths, all_neurons, family


class Diverged(ArithmeticError):
    """The loss or its gradient is no longer finite; the message names the step and the term."""


def distill(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train,
    validation,
    config: DistillConfig,
    run_dir: str | Path,
    *,
    on_step: Callable[[dict], None] | None = None,
    resume: bool = False,
) -> Run:
    """Distil a teacher into a student that starts as its copy and is narrowed on the way (HomoDistil).

    Args:
        teacher: a model with its language-model head, masked or causal; keeps its weights, in float32, in eval
            mode, on the device of the run.
        tokenizer: the teacher's.
        train, validation: blocks from `load_corpus`.
        config: every number of the run.
        run_dir: the folder of this run.
        on_step: called with the record of every step, the one that is also written to metrics.jsonl.
        resume: go on from the newest sound checkpoint in `run_dir`, or start there if there is none.

    Returns:
        The finished Run; its student is a stock checkpoint in `run_dir/student` (after a global quota there
        is no such thing, and the last checkpoint holds the wide model and its masks).

    Raises:
        ValueError: anything that makes the run impossible, before the first step.
        FileExistsError: `run_dir` holds another run.
        Diverged: a loss or gradient that is not finite. Checkpoints up to then stay.
    """
    accelerator = Accelerator()
    target = config.check(teacher, tokenizer, train, validation, accelerator.num_processes)
    arguments = _arguments(config, teacher, train, validation)
    arguments["precision"] = chosen(config.precision, accelerator.device)
    run = _open_run(accelerator, run_dir, arguments, resume)
    if run.finished:
        return run
    precision = run.arguments["precision"]
    teacher = teacher.float().eval().to(accelerator.device)
    frozen = cast_once(teacher, precision)  # the teacher as the steps read it
    training = _Training.begin(teacher, config, target, run if resume else None)
    student, loss, masks = training.student, training.loss, training.masks
    optimizer, importance = training.optimizer, training.importance
    held_out = validation.take(min(config.eval_blocks, len(validation)))
    share = (accelerator.process_index, accelerator.num_processes)
    task = NextToken() if family(teacher).causal else Masking.of(tokenizer, config.mask_probability)
    steps = TrainingBatches(train, task, config.batch_size, config.seed, share)
    batches = DataLoader(steps, batch_size=None, sampler=range(training.step, config.steps))
    with _Reporter(accelerator, run, training, config, on_step) as report, recording(frozen, student):
        report.precision(precision, accelerator.device)
        if training.step == 0:
            report.baseline(training.widths, training.discrepancy(teacher, held_out))
        for step, batch in enumerate(batches, training.step + 1):
            training.start_clock()
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}

            with applied(masks):
                # 1. Teacher and student read the same batch; their heads only what the loss looks at.
                positions = loss.looked_at(batch["labels"])
                read = {"input_ids": batch["input_ids"], "positions": positions, "in_pieces": True}
                with autocast(precision, accelerator.device):
                    with torch.no_grad():
                        theirs = forward(frozen, **read) if loss.compares else None
                    ours = forward(student, **read)
                    # 2. The total loss: language modelling and the distillation terms.
                    terms = loss(ours, theirs, batch["labels"])
                del ours, theirs  # the backward needs the room, and neither of them
                # 3. Backward, and the importance of every neuron while weights and gradients belong together.
                accelerator.backward(terms.total)
            _average_gradients(accelerator, optimizer)
            if masks is not None:
                masks.mask_gradients()
            if config.still_prunes(step):
                importance.update(student)

            # 4. The optimiser's step.
            norm = torch.nn.utils.clip_grad_norm_(_parameters(optimizer), config.max_grad_norm)
            computed = _numbers(terms, norm)
            _check_finite(step, computed, run)
            optimizer.step()
            training.learning_rate.step()
            optimizer.zero_grad()

            # 5. Keep the most important neurons, as many as the schedule leaves.
            widths = config.widths_at(step, teacher, target)
            prunes = training.prunes(step, widths)
            before = training.discrepancy(teacher, held_out) if prunes and config.eval_prunes else {}
            if prunes and masks is not None:
                masks.choose(widths, importance.scores())
            elif prunes:
                kept = narrow(student, widths, importance.scores(), optimizer)
                importance.narrow(kept)
                loss.narrow(kept, optimizer)
                training.keep(kept)

            training.stop_clock(step)
            due = before or step % config.eval_every == 0 or step == config.steps
            measured = _held_out(training.discrepancy(teacher, held_out)) if due else {}
            _check_finite(step, measured, run)
            report.step(computed, training.widths, measured | _named("before_prune", before))
            if step % config.checkpoint_every == 0 and step < config.steps:
                report.checkpoint(tokenizer)
    _finish(accelerator, run, training, target, tokenizer)
    return run


def _finish(accelerator: Accelerator, run: Run, training: _Training, target: Widths, tokenizer) -> None:
    """Save the student; what was masked is removed from it first, where a stock model can be had."""
    exported = training.masks is None or training.masks.scope == "local"
    if training.masks is not None and exported:
        training.masks.export()
    if exported and Widths.of(training.student) != target:
        raise RuntimeError(f"asked for {target}, got {Widths.of(training.student)}")
    if accelerator.is_main_process:
        if training.kept:
            run.save_kept(training.kept)
        if exported:
            run.save_student(training.student, tokenizer)
        else:
            run.save_checkpoint(training.step, training.student, tokenizer, training.state())
    accelerator.wait_for_everyone()


class _Training:
    """All that changes while training: what a checkpoint must hold."""

    def __init__(self, student: PreTrainedModel, loss: DistillationLoss, importance: Scorer, config: DistillConfig):
        self.student, self.loss, self.importance, self.config = student, loss, importance, config
        self.masks = Masks(student, loss, config.scope, config.recover) if config.under_masks else None
        self.optimizer = _optimizer(student, loss, config)
        self.learning_rate = get_linear_schedule_with_warmup(
            self.optimizer, round(config.warmup * config.steps), config.steps
        )
        self.step, self.seconds, self.last_seconds, self._started = 0, 0.0, 0.0, 0.0
        self._kept = all_neurons(student) if config.initial == "teacher" else {}

    @classmethod
    def begin(cls, teacher: PreTrainedModel, config: DistillConfig, target: Widths, resumed: Run | None) -> _Training:
        """Step 0, or where the newest sound checkpoint of a run left off."""
        for folder in reversed(resumed.checkpoints() if resumed else []):
            try:
                return cls._from_checkpoint(folder, teacher, config, resumed)
            except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
                tqdm.write(f"{folder} cannot be read ({error}); going on from the one before")
        if resumed:
            resumed.rewind(-1)
        copied = config.initial == "teacher"
        student = student_of(teacher) if copied else random_student(teacher, target, config.seed)
        loss = _loss(teacher, Widths.of(student), config).to(teacher.device)
        return cls(student, loss, scorer(config.scorer, **config.scorer_options()), config)

    @classmethod
    def _from_checkpoint(cls, folder: Path, teacher: PreTrainedModel, config: DistillConfig, run: Run) -> _Training:
        state = torch.load(folder / "training_state.pt", map_location=teacher.device, weights_only=True)
        with without_bars():
            student = type(teacher).from_pretrained(folder, dtype=torch.float32).to(teacher.device)
        loss = _loss(teacher, Widths.of(student), config).to(teacher.device)
        loss.load_state_dict(state["loss"])
        importance = scorer(config.scorer, **config.scorer_options())
        importance.load_state_dict(state["importance"])
        training = cls(student.requires_grad_(True).eval(), loss, importance, config)
        training.optimizer.load_state_dict(state["optimizer"])
        training.learning_rate.load_state_dict(state["learning_rate"])
        if training.masks is not None:
            training.masks.load_state_dict(state["masks"])
        training.step, training.seconds, training._kept = state["step"], state["seconds"], state["kept"]
        run.rewind(training.step)
        return training

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
    def widths(self) -> Widths:
        return Widths.of(self.student) if self.masks is None else self.masks.widths

    def discrepancy(self, teacher: PreTrainedModel, held_out) -> dict[str, float]:
        """The held-out measures of the student as it is; the step's clock stands still meanwhile."""
        started = perf_counter()
        neurons = None if self.masks is None else self.masks.kept.get(HIDDEN)
        with applied(self.masks):
            measured = discrepancy(self.student, teacher, held_out, neurons=neurons, heads=self.loss.heads)
        self._started += perf_counter() - started
        return measured

    def state(self) -> dict:
        masks = {} if self.masks is None else {"masks": self.masks.state_dict()}
        return masks | {
            "step": self.step,
            "seconds": self.seconds,
            "kept": self._kept,
            "loss": self.loss.state_dict(),
            "importance": self.importance.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
        }


class _Reporter:
    """Tells what happens: metrics.jsonl, the progress bar, checkpoints, and whoever asked through on_step."""

    def __init__(self, accelerator: Accelerator, run: Run, training: _Training, config: DistillConfig, on_step):
        self.run, self.training, self.on_step = run, training, on_step or (lambda record: None)
        self.main = accelerator.is_main_process
        self.bar = tqdm(
            total=config.steps, initial=training.step, desc=run.folder.name, unit="step", disable=not self.main
        )
        self.last = {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def precision(self, used: str, device: torch.device) -> None:
        """Where it was left to the machine, say what was taken, and why."""
        if self.main and self.training.config.precision == "auto":
            tqdm.write(
                f"{self.run.folder.name}: {used} on {device.type}, {torch.get_num_threads()} threads; "
                f"bfloat16 multiplies {bfloat16_gain(device):.1f} times as fast as float32 here"
            )

    def baseline(self, widths: Widths, measured: dict) -> None:
        self._tell({"step": 0, "seconds": 0.0, "elapsed": 0.0} | _widths_record(widths) | _held_out(measured))

    def step(self, computed: dict[str, float], widths: Widths, measured: dict) -> None:
        training = self.training
        record = {"step": training.step, "seconds": training.last_seconds, "elapsed": training.seconds}
        record |= computed | {"learning_rate": training.learning_rate.get_last_lr()[0]}
        self._tell(record | _widths_record(widths) | measured)
        self.bar.update()

    def checkpoint(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.main:
            self.run.save_checkpoint(self.training.step, self.training.student, tokenizer, self.training.state())

    def _tell(self, record: dict) -> None:
        if not self.main:
            return
        self.run.log(record)
        self.last |= record
        shown = {"width": f"{record['hidden_size']}/{record['intermediate_size']}"}
        names = {"loss": "total", "discrepancy": "held_out_kl"}
        shown |= {name: f"{self.last[key]:.3f}" for name, key in names.items() if key in self.last}
        self.bar.set_postfix(shown, refresh=False)
        self.on_step(record)


def _open_run(accelerator: Accelerator, run_dir, arguments: dict, resume: bool) -> Run:
    if resume and (Path(run_dir) / "run.json").exists():
        run = Run.load(run_dir)
        _check_unchanged(run, arguments)
        return run
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        Run.start(run_dir, arguments, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return Run.load(run_dir)


def _arguments(config: DistillConfig, teacher: PreTrainedModel, train, validation) -> dict:
    blocks = {"train": len(train), "validation": len(validation), "length": len(train[0]["input_ids"])}
    return {"config": config.to_dict(), "blocks": blocks, "teacher": teacher.name_or_path or type(teacher).__name__}


def _check_unchanged(run: Run, arguments: dict) -> None:
    for part in ("config", "blocks"):
        was, now = run.arguments[part], arguments[part]
        changed = [f"{name} was {was.get(name)}, is {now[name]}" for name in now if was.get(name) != now[name]]
        if changed:
            raise ValueError(f"{run.folder} holds a run with another {part}: {'; '.join(changed)}")


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


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _average_gradients(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """The gradient of the global batch on every process, so that all rank the same neurons highest.

    Explicit instead of DistributedDataParallel, which would have to be wrapped anew after every prune.
    """
    if accelerator.num_processes > 1:
        for parameter in _parameters(optimizer):
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


def _numbers(terms: LossTerms, norm: torch.Tensor) -> dict[str, float]:
    """What a step computed, as plain numbers: a GPU is waited for once, when all of it is under way."""
    computed = terms.named() | {"gradient_norm": norm}
    return dict(zip(computed, torch.stack(list(computed.values())).tolist(), strict=True))


def _check_finite(step: int, values: dict[str, float], run: Run) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        name = next((name for name in broken if name != "total"), broken[0])
        saved = run.checkpoints()
        raise Diverged(
            f"step {step}: {name.replace('_', ' ')} is {values[name]}. "
            + (f"The last good checkpoint is {saved[-1]}. " if saved else "There is no checkpoint yet. ")
            + "A lower learning_rate or a longer warmup is the usual way out."
        )


def _widths_record(widths: Widths) -> dict[str, int]:
    names = {"hidden": "hidden_size", "ffn": "intermediate_size", "head_dim": "head_dim", "heads": "num_heads"}
    return {names[name]: width for name, width in asdict(widths).items()}


def _held_out(measured: dict[str, float]) -> dict[str, float]:
    return _named("held_out", measured)


def _named(prefix: str, measured: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in measured.items()}
