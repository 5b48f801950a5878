"""The training loop: Algorithm 1 of HomoDistil, each step one call into the file of its name."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import MAY_CHANGE, DistillConfig
from .data import Masking, NextToken, TrainingBatches, as_blocks, batches, longest, sample
from .discrepancy import main_measure
from .models import frozen_copy, is_encoder, recording
from .precision import recompute_casts, resolve_precision
from .rotation import rotate_heads
from .runs import RECORDED, Prune, Run
from .training import Diverged, Pruned, Training
from .widths import Widths, family, width_groups

ROTATED = 128  # blocks whose moments decide how heads are rotated


class Stopped(RuntimeError):
    """The run received SIGTERM and ended after a step, with a checkpoint of it."""


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
    """Distil a teacher into a student that starts as its copy and is pruned to its target widths (HomoDistil).

    Args:
        teacher, tokenizer: a masked or causal model with its language-model head, and its tokenizer; do not change.
        train, validation: blocks from `load_corpus`; `train` may be an array of token ids (N, S).
        config: every number of the run.
        run_dir: the folder of the run.
        on_step: called with the record of every step, as in metrics.jsonl.
        resume: continue from the newest intact checkpoint in `run_dir`, or start if there is none.

    Returns:
        The finished Run. Its student is a stock checkpoint in `run_dir/student`; with scope="global", which no stock
        model can represent, the last checkpoint holds the wide model and its masks.

    Raises:
        ValueError: the run is impossible, or the launcher asks for another one; raised before the first step.
        FileExistsError: `run_dir` holds another run, or another process writes to it.
        Diverged: a loss or gradient is not finite, or processes have different weights.
        Stopped: SIGTERM; the step was completed and saved.
        MemoryError: out of memory; the message names the settings to lower.
        OSError: a file could not be written. As after all others but the first, `resume` continues.
    """
    accelerator = Accelerator()
    _check_launcher(accelerator, config)
    train, validation = as_blocks(train), as_blocks(validation)
    target = config.check(teacher, tokenizer, train, validation, accelerator.num_processes)
    arguments = _arguments(config, teacher, train, validation, accelerator.device)
    with _opened(accelerator, run_dir, arguments, resume) as run, memory_guard(run):
        if run.finished:
            return run
        teacher = frozen_copy(teacher, accelerator.device)
        if config.rotate:
            teacher = deepcopy(teacher)  # whose weights are the caller's
            rotate_heads(teacher, batches(sample(train, ROTATED), 16, accelerator.device))
        held_out = sample(validation, config.eval_blocks)
        config = replace(config, precision=run.arguments["precision"])
        training = Training.begin(teacher, target, held_out, config, run if resume else None)
        if resume and accelerator.is_main_process:
            run.rewind(training.step or -1)  # before the first step the record of step 0 is dropped too
        masking = NextToken() if family(teacher).causal else Masking.of(tokenizer, config.mask_probability)
        task = None if is_encoder(teacher) else masking
        process = accelerator.process_index, accelerator.num_processes
        data = TrainingBatches(train, task, config.batch_size, config.seed, process)
        steps = map(data.__getitem__, range(training.step, config.steps))
        shown = {"desc": run.folder.name, "unit": "step", "disable": not accelerator.is_main_process}
        with ThreadPoolExecutor(1) as writer, tqdm(total=config.steps, initial=training.step, **shown) as bar:
            _homotopy(training, steps, _Reporter(accelerator, run, training, tokenizer, on_step, bar, writer))
        _finish(accelerator, run, training, tokenizer)
    return run


def _homotopy(training: Training, batches: Iterator[dict[str, torch.Tensor]], report: _Reporter) -> None:
    """Algorithm 1: the student starts as the teacher and is distilled and pruned, step by step, to the target."""
    config, student, optimizer = training.config, training.student, training.optimizer
    if training.step == 0:
        report.step({})
    with recording(training.cast_teacher, student), recompute_casts(student), _stop_request(training):
        for step, batch in enumerate(batches, training.step + 1):
            training.start_step(step)
            # 1. Loss: forward of teacher and student on the same tokens, total loss, backward.
            terms = training.forward_backward(batch)
            # 2. Importance of every neuron, before clipping, while weights and gradients belong together.
            if config.still_prunes(step):
                training.score()
            # 3. Optimiser step.
            norm = clip_grad_norm_(training.parameters, config.max_grad_norm)
            terms["gradient_norm"] = norm.to(terms["total"].device)  # without gradients, a 0 on the CPU
            values = report.values(terms)
            optimizer.step()
            training.learning_rate.step()
            optimizer.zero_grad()
            # 4. Schedule: the widths after this step, from the kept fraction r(t).
            widths = config.widths_at(step, training.teacher, training.target)
            # 5. Prune: keep the neurons of highest importance; loss, scores and optimiser follow.
            pruned = training.prune(widths)
            # 6. Fade: scale down the layer that leaves next.
            training.fade()
            training.stop_clock()
            report.step(values, pruned)
            report.checkpoint()


def _finish(accelerator: Accelerator, run: Run, training: Training, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the student, without its masked neurons; with scope="global" only a checkpoint, as no stock model exists."""
    exported = training.masks is None or training.masks.scope == "local"
    if training.masks is not None and exported:
        training.masks.export()
        training.pool_as_teacher()
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
    """Writes the records, prunes and checkpoints of a run, updates the progress bar and calls `on_step`."""

    def __init__(self, accelerator: Accelerator, run: Run, training: Training, tokenizer, on_step, bar: tqdm, writer):
        self.accelerator, self.run, self.training, self.tokenizer = accelerator, run, training, tokenizer
        self.on_step, self.bar, self.main, self.shown = on_step, bar, accelerator.is_main_process, {}
        self._writer, self._written = writer, None  # the newest checkpoint, a Future
        self._stopped: float | None = None  # the number of processes whose stop was requested
        if self.main and run.config.precision == "auto":
            tqdm.write(f"{run.folder.name}: {training.config.precision} on {accelerator.device.type}")

    def values(self, terms: dict[str, torch.Tensor]) -> dict[str, float]:
        """The loss terms of a step as finite numbers, with one host synchronisation for all."""
        values = dict(zip(terms, torch.stack([*terms.values()]).tolist(), strict=True))
        self._stopped = values.pop("stop_requested", None)
        return self.finite(values)

    def finite(self, values: dict[str, float]) -> dict[str, float]:
        """The values themselves. Raises Diverged if one is not finite."""
        if broken := [name for name, value in values.items() if not math.isfinite(value)]:
            name = min(broken, key=lambda name: name == "total")  # a term, if one is among them
            raise Diverged(
                f"step {self.training.step}: {name.replace('_', ' ')} is {values[name]}. {self.run.resume_hint} "
                "Use a lower learning_rate or a longer warmup."
            )
        return values

    def step(self, values: dict[str, float], pruned: Pruned | None = None) -> None:
        """Log a step, with held-out measures if they are due; step 0 has no other values."""
        training, config, widths = self.training, self.training.config, self.training.widths
        before = pruned.measured if pruned else None
        due = before or training.step % config.eval_every == 0 or training.step == config.steps
        after = training.discrepancy() if due else None
        parts = {"held_out": after or {}, "before_prune": before or {}}
        measured = self.finite(
            {f"{part}_{name}": value for part, each in parts.items() for name, value in each.items()}
        )
        record = {"step": training.step, "seconds": training.last_seconds, "elapsed": training.seconds} | values
        record |= {"learning_rate": training.learning_rate.get_last_lr()[0]} if values else {}
        record |= {"hidden_size": widths.hidden, "intermediate_size": widths.ffn, "head_dim": widths.head_dim}
        record |= {"num_heads": widths.heads, "num_layers": widths.layers, "parameters": training.num_parameters}
        record |= measured
        if self.main:
            if after is not None and after.kl_of_blocks is not None:
                self.run.log_blocks(training.step, after.kl_of_blocks)
            self._write(record, pruned)

    def _write(self, record: dict, pruned: Pruned | None) -> None:
        training, every = self.training, -(-self.training.config.steps // RECORDED)
        last = max(self.run.pruned_at, default=-1)
        if pruned and (training.step // every > last // every or training.widths == training.target):
            sizes = {name: group.size for name, group in width_groups(training.teacher).items()}
            self.run.save_prune(Prune.of(training.step, sizes, pruned.scores, pruned.kept, training.kept))
        self.run.log(record)
        names = {"loss": "total", "discrepancy": f"held_out_{main_measure(training.teacher)}"}
        self.shown |= {"width": f"{record['hidden_size']}/{record['intermediate_size']}"}
        self.shown |= {name: f"{record[key]:.3f}" for name, key in names.items() if key in record}
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(training.step - self.bar.n)
        if self.on_step:
            self.on_step(record)

    def checkpoint(self) -> None:
        """Save a checkpoint if it is due; raise Stopped if the run was stopped before its last step.

        A device goes on while a copy in the memory of the host is written; on a CPU the run waits.
        """
        training, step, config = self.training, self.training.step, self.training.config
        stopped = training.stop_requested if self._stopped is None else self._stopped
        if step == config.steps:
            self._wait_for_writer()
        if step == config.steps or not (stopped or step % config.checkpoint_every == 0):
            return
        training.synchronise()
        if self.main:
            self._wait_for_writer()
            student, state = frozen_copy(training.student, "cpu"), send_to_device(training.state(), "cpu")
            content = step, student, self.tokenizer, state, config.keep_last
            self._written = self._writer.submit(self.run.save_checkpoint, *content)
            if stopped or training.teacher.device.type == "cpu":
                self._wait_for_writer()
        if stopped:
            self.accelerator.wait_for_everyone()  # no process may end the run while the checkpoint is written
            raise Stopped(f"SIGTERM: the run stopped after step {step}. {self.run.resume_hint}")

    def _wait_for_writer(self) -> None:
        """Until the newest checkpoint is written. Raises what was raised meanwhile."""
        if self._written is not None:
            self._written.result()


def _check_launcher(accelerator: Accelerator, config: DistillConfig) -> None:
    """Raise ValueError for a setting of Accelerate, often from its environment variables, that a run ignores."""
    engine, accumulation = accelerator.distributed_type, accelerator.gradient_accumulation_steps
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"a student cannot be narrowed while {engine.value} shards it over the devices: "
            "launch without it (accelerate launch --multi_gpu), and lower micro_batch_size if memory does not suffice"
        )
    precision = {"no": config.precision, "bf16": "bfloat16"}.get(accelerator.mixed_precision, "none of ours")
    asked = {
        f"gradient accumulation over {accumulation} steps": (accumulation != 1, "set micro_batch_size"),
        f"mixed precision {accelerator.mixed_precision}": (precision != config.precision, "set precision"),
        "torch.compile": (accelerator.state.dynamo_plugin.backend != DynamoBackend.NO, "a run does not compile"),
        "tensor or context parallelism": (accelerator.parallelism_config is not None, "use data parallelism"),
    }
    for name, (differs, way_out) in asked.items():
        if differs:
            raise ValueError(
                f"the launcher or an ACCELERATE_ environment variable asks for {name}, but the config of the run "
                f"decides: {way_out}, and launch without it"
            )


@contextmanager
def _opened(accelerator: Accelerator, run_dir: str, arguments: dict, resume: bool) -> Iterator[Run]:
    """The folder of the run, new or resumed, locked for this run until it ends. A finished run is only read."""
    run = Run(run_dir)
    writes = accelerator.is_main_process and not (resume and run.finished)
    with run.alone() if writes else nullcontext():
        if writes and not (resume and run.begun):
            Run.start(run_dir, arguments, accelerator.num_processes)
        accelerator.wait_for_everyone()
        for part in ("config", "blocks", "content") if resume else ():
            was, now = run.arguments.get(part, {}), arguments[part]
            changed = [name for name in now if name not in MAY_CHANGE and was.get(name) != now[name]]
            if changed:
                differences = "; ".join(f"{name} was {was.get(name)}, is {now[name]}" for name in changed)
                raise ValueError(f"{run.folder} holds a run with another {part}: {differences}. Use another run_dir.")
        yield run


def _arguments(config: DistillConfig, teacher: PreTrainedModel, train, validation, device: torch.device) -> dict:
    blocks = {"train": len(train), "validation": len(validation), "length": longest(train)}
    blocks |= {"tokens": int(train.lengths.sum())} if is_encoder(teacher) else {}
    name, precision = teacher.name_or_path or type(teacher).__name__, resolve_precision(config.precision, device)
    content = {"teacher": _digest(teacher.parameters())}
    if is_encoder(teacher):
        content["pooling"] = str(teacher.sentence_pooling)
    for part, every in (("train", train), ("validation", validation)):
        content[part] = _digest([every[list(range(0, len(every), 1 + len(every) // 256))]["input_ids"]])
    parts = {"config": config.to_dict(), "blocks": blocks, "content": content}
    return parts | {"teacher": name, "precision": precision}


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of some thousand entries of each tensor: a resumed run must have the same teacher and text."""
    digest = sha256()
    for tensor in tensors:
        some = tensor.detach().flatten()[:: 1 + tensor.numel() // 4096]
        digest.update(some.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _stop_request(training: Training) -> Iterator[None]:
    """Let SIGTERM set `training.stop_requested`. Only the main thread can receive signals."""
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, lambda *_: setattr(training, "stop_requested", True))
            stack.callback(signal.signal, signal.SIGTERM, before)
        yield


@contextmanager
def memory_guard(run: Run) -> Iterator[None]:
    """Turn an out-of-memory error into a MemoryError that names the settings to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise MemoryError(
            f"out of memory ({cause}). Lower micro_batch_size (the blocks in one forward pass; the batch stays the "
            f"same), then the length of the blocks or eval_blocks. {run.resume_hint}"
        ) from error
