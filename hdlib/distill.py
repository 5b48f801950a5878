"""The loop: HomoDistil's Algorithm 1, each step one call into the file of its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import MAY_CHANGE, DistillConfig
from .data import Blocks, Masking, NextToken, TrainingBatches, as_blocks, micro_batches
from .masks import applied
from .models import forward, frozen_copy, recording
from .narrowing import narrow
from .precision import autocast, bfloat16_gain, cast_once, casting_again, chosen
from .runs import RECORDED, Prune, Run
from .training import Stopped, StopRequest, Training, memory_guard
from .widths import Widths, family


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
        teacher: a model with its language-model head, masked or causal; left as it is, on its device.
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
        ValueError: anything that makes the run impossible, before the first step; training that is sharded, too.
        FileExistsError: `run_dir` holds another run, or another process is writing to it.
        Diverged: a loss or gradient that is not finite.
        Stopped: SIGTERM came; the step was finished and there is a checkpoint of it.
        MemoryError: memory does not suffice; the message says which settings to lower.
        OSError: something could not be written, on a full disk for instance.
        Checkpoints up to then stay, and `resume` goes on from the newest.
    """
    accelerator = Accelerator()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"a student cannot be narrowed while {accelerator.distributed_type.value} shards it over the devices: "
            "launch without it (accelerate launch --multi_gpu), and lower micro_batch_size if memory does not suffice"
        )
    target = config.check(teacher, tokenizer, train, validation, accelerator.num_processes)
    arguments = _arguments(config, teacher, train, validation)
    arguments["precision"] = chosen(config.precision, accelerator.device)
    with _opened(accelerator, run_dir, arguments, resume) as run, memory_guard(run):
        if run.finished:
            return run
        teacher = frozen_copy(teacher, accelerator.device)
        held_out = Blocks(**as_blocks(validation)[: config.eval_blocks])
        training = Training.begin(teacher, target, held_out, config, run if resume else None)
        if resume and accelerator.is_main_process:
            run.rewind(training.step or -1)  # before the first step even the record of step 0 is made again
        share = (accelerator.process_index, accelerator.num_processes)
        task = NextToken() if family(teacher).causal else Masking.of(tokenizer, config.mask_probability)
        steps = TrainingBatches(train, task, config.batch_size, config.seed, share)
        batches = DataLoader(steps, batch_size=None, sampler=range(training.step, config.steps))
        with _Reporter(accelerator, run, training, tokenizer, on_step) as report:
            _homotopy(accelerator, training, batches, report)
        _finish(accelerator, run, training, tokenizer)
    return run


def _homotopy(accelerator: Accelerator, training: Training, batches: DataLoader, report: _Reporter) -> None:
    """Algorithm 1: from the teacher's copy to the target width, distilling all the way."""
    config, teacher, student, loss = training.config, training.teacher, training.student, training.loss
    optimizer, importance, masks = training.optimizer, training.importance, training.masks
    precision = report.run.arguments["precision"]
    frozen = cast_once(teacher, precision)  # the teacher as the steps read it
    report.precision(precision, accelerator.device)
    if training.step == 0:
        report.baseline(training.widths, training.discrepancy())
    with recording(frozen, student), casting_again(student), StopRequest(accelerator) as stop:
        for step, batch in enumerate(batches, training.step + 1):
            training.start_clock()
            computed = {}
            for part, share in micro_batches(batch, config.micro_batch_size, accelerator.device):
                with applied(masks):
                    # 1. Teacher and student read the same text; their heads only what the loss looks at.
                    positions = loss.loss_positions(part["labels"])
                    read = {"input_ids": part["input_ids"], "positions": positions, "in_pieces": True}
                    with autocast(precision, accelerator.device):
                        with torch.no_grad():
                            theirs = forward(frozen, **read) if loss.compares else None
                        ours = forward(student, **read)
                        # 2. The total loss: language modelling and the distillation terms.
                        terms = loss(ours, theirs, part["labels"])
                    del ours, theirs  # the backward needs the room, and neither of them
                    # 3. Backward, and the importance of every neuron while weights and gradients belong together.
                    accelerator.backward(share * terms.total)
                computed = {name: computed.get(name, 0.0) + share * value for name, value in terms.named().items()}
            _average_gradients(accelerator, training.parameters)
            if masks is not None:
                masks.mask_gradients()
            if config.still_prunes(step):
                importance.update(student)

            # 4. The optimiser's step.
            norm = torch.nn.utils.clip_grad_norm_(training.parameters, config.max_grad_norm)
            computed = _numbers(computed | {"gradient_norm": norm})
            _check_finite(step, computed, report.run)
            optimizer.step()
            training.learning_rate.step()
            optimizer.zero_grad()

            # 5. Keep the most important neurons, as many as the schedule leaves.
            widths = config.widths_at(step, teacher, training.target)
            prunes = training.prunes(step, widths)
            before = training.discrepancy() if prunes and config.eval_prunes else {}
            scores, were = importance.scores() if prunes else {}, training.kept
            if prunes and masks is not None:
                masks.choose(widths, scores)
            elif prunes:
                kept = narrow(student, widths, scores, optimizer)
                importance.narrow(kept)
                loss.narrow(kept, optimizer)
                training.keep(kept)

            training.stop_clock(step)
            if prunes:
                report.prune(scores, were)
            due = before or step % config.eval_every == 0 or step == config.steps
            measured = _held_out(training.discrepancy()) if due else {}
            _check_finite(step, measured, report.run)
            report.step(computed, training.widths, measured | _named("before_prune", before))
            stopped = stop.agreed()
            if (stopped or step % config.checkpoint_every == 0) and step < config.steps:
                report.checkpoint()
                if stopped:
                    raise Stopped(f"asked to stop, and stopped after step {step}. {report.run.resume_hint}")


def _finish(accelerator: Accelerator, run: Run, training: Training, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the student; what was masked is removed from it first, where a stock model can be had."""
    exported = training.masks is None or training.masks.scope == "local"
    if training.masks is not None and exported:
        training.masks.export()
    if exported and Widths.of(training.student) != training.target:
        raise RuntimeError(f"asked for {training.target}, got {Widths.of(training.student)}")
    if accelerator.is_main_process:
        if training.kept:
            run.save_kept(training.kept)
        if exported:
            run.save_student(training.student, tokenizer, training.teacher)
        else:
            run.save_checkpoint(training.step, training.student, tokenizer, training.state(), training.config.keep_last)
    accelerator.wait_for_everyone()


class _Reporter:
    """Tells what happens: metrics.jsonl, the progress bar, checkpoints, and whoever asked through on_step."""

    def __init__(self, accelerator: Accelerator, run: Run, training: Training, tokenizer, on_step):
        self.accelerator, self.run, self.training, self.tokenizer = accelerator, run, training, tokenizer
        self.on_step, self.main = on_step or (lambda record: None), accelerator.is_main_process
        steps = training.config.steps
        self.bar = tqdm(total=steps, initial=training.step, desc=run.folder.name, unit="step", disable=not self.main)
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
        record = {"step": 0, "seconds": 0.0, "elapsed": 0.0} | _widths_record(widths)
        self._tell(record | {"parameters": self.training.num_parameters} | _held_out(measured))

    def step(self, computed: dict[str, float], widths: Widths, measured: dict) -> None:
        training = self.training
        record = {"step": training.step, "seconds": training.last_seconds, "elapsed": training.seconds}
        record |= computed | {"learning_rate": training.learning_rate.get_last_lr()[0]}
        self._tell(record | _widths_record(widths) | {"parameters": training.num_parameters} | measured)
        self.bar.update()

    def prune(self, scores: dict, were: dict) -> None:
        """Record a prune, of many an even selection: enough for every picture, and no burden on the disk."""
        training, config = self.training, self.training.config
        last = max(self.run.pruned_at, default=-1)
        every = -(-config.steps // RECORDED)
        if self.main and (training.step // every > last // every or training.widths == training.target):
            self.run.save_prune(Prune.of(training.step, training.sizes, scores, were, training.kept))

    def checkpoint(self) -> None:
        training = self.training
        if self.main:
            self.run.save_checkpoint(
                training.step, training.student, self.tokenizer, training.state(), training.config.keep_last
            )
        self.accelerator.wait_for_everyone()  # nobody may end the run while it is being written

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


@contextmanager
def _opened(accelerator: Accelerator, run_dir, arguments: dict, resume: bool) -> Iterator[Run]:
    """The folder of the run, begun or taken up again, for this run alone until it ends; a finished one is just read."""
    run = Run(run_dir)
    with ExitStack() as held:
        if accelerator.is_main_process and not (resume and run.finished):
            held.enter_context(run.alone())
            if not (resume and run.begun):
                Run.start(run_dir, arguments, accelerator.num_processes)
        accelerator.wait_for_everyone()
        if resume:
            _check_unchanged(run, arguments)
        yield run


def _arguments(config: DistillConfig, teacher: PreTrainedModel, train, validation) -> dict:
    blocks = {"train": len(train), "validation": len(validation), "length": len(train[0]["input_ids"])}
    return {"config": config.to_dict(), "blocks": blocks, "teacher": teacher.name_or_path or type(teacher).__name__}


def _check_unchanged(run: Run, arguments: dict) -> None:
    for part in ("config", "blocks"):
        was, now = run.arguments[part], arguments[part]
        fixed = [name for name in now if name not in MAY_CHANGE]
        changed = [f"{name} was {was.get(name)}, is {now[name]}" for name in fixed if was.get(name) != now[name]]
        if changed:
            raise ValueError(f"{run.folder} holds a run with another {part}: {'; '.join(changed)}")


def _average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """The gradient of the global batch on every process, so that all rank the same neurons highest.

    Explicit instead of DistributedDataParallel, which would have to be wrapped anew after every prune.
    """
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


def _numbers(computed: dict[str, torch.Tensor]) -> dict[str, float]:
    """What a step computed, as plain numbers: a GPU is waited for once, when all of it is under way."""
    return dict(zip(computed, torch.stack(list(computed.values())).tolist(), strict=True))


def _check_finite(step: int, values: dict[str, float], run: Run) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        name = next((name for name in broken if name != "total"), broken[0])
        raise Diverged(
            f"step {step}: {name.replace('_', ' ')} is {values[name]}. {run.resume_hint} "
            "A lower learning_rate or a longer warmup is the usual way out."
        )


def _widths_record(widths: Widths) -> dict[str, int]:
    names = {"hidden": "hidden_size", "ffn": "intermediate_size", "head_dim": "head_dim", "heads": "num_heads"}
    return {names[name]: width for name, width in asdict(widths).items()}


def _held_out(measured: dict[str, float]) -> dict[str, float]:
    return _named("held_out", measured)


def _named(prefix: str, measured: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in measured.items()}
