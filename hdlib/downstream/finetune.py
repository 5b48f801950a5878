"""Fine-tune a stock checkpoint on a task with Hugging Face's `Trainer`."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from .metrics import measure
from .tasks import Task

PRECISIONS = ("float32", "bfloat16")
HEAD_PARTS = ("pooler", "sequence_summary")  # of the backbone, but no part of language modelling


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """How a checkpoint is fine-tuned. Raises ValueError, naming the field, for what cannot be."""

    learning_rate: float = 1e-4  # peak, AdamW
    epochs: float | None = None  # passes over the training part; None: the task's
    batch_size: int = 32  # rows a step
    length: int = 128  # tokens a row at most; longer ones are cut
    warmup: float = 0.06  # fraction of the steps in which the learning rate rises; it falls linearly after
    weight_decay: float = 0.01
    train_rows: int | None = None  # so many rows of the training part, drawn once for all seeds; None: all
    precision: str = "float32"  # of matrix products: float32 or bfloat16; weights are float32 always
    seed: int = 0  # of the new head, dropout and the order of rows

    def __post_init__(self):
        for name in ("learning_rate", "batch_size", "length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        for name in ("epochs", "train_rows"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, or None; got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of the steps, from 0 to below 1; got {self.warmup}")


def finetune(
    checkpoint: str | Path, task: Task, data: DatasetDict, config: FineTuneConfig, save_to: str | Path | None = None
) -> dict[str, float]:
    """Fine-tune one checkpoint once, and measure it after the last epoch (no epoch is picked by its score).

    Args:
        checkpoint: a folder that `save_pretrained` left, with its tokenizer, or a hub name.
        task, data: as `load_task` reads them.
        config: the arguments.
        save_to: where the fine-tuned model goes, as another stock checkpoint; None: nowhere.

    Returns:
        The task's measures on the held-out part, with `seconds` of training.

    Raises:
        ValueError: the checkpoint lacks weights other than the new head's, which would be random, or cannot be opened.
        ArithmeticError: training came apart: there are weights or logits that are not finite.
    """
    set_seed(config.seed)  # before the head is made
    model, tokenizer = _open(checkpoint, task, data)
    rows = drawn(data["train"], config.train_rows)
    length = min(config.length, tokenizer.model_max_length)
    train, held_out = (_tokenised(part, tokenizer, length) for part in (rows, data["validation"]))
    collator, epochs = DataCollatorWithPadding(tokenizer), config.epochs or task.epochs
    # Rows of like lengths share a batch, so that little of it is padding.
    trainer, seconds = train_with(model, train, config, epochs, collator, train_sampling_strategy="group_by_length")
    logits, labels, _ = trainer.predict(held_out)  # (N, classes) or (N, 1), and (N,): by length, not in the rows' order
    predictions = logits[:, 0] if task.regression else logits.argmax(-1)
    if not np.isfinite(logits).all():
        raise ArithmeticError(
            f"fine-tuning {checkpoint} on {task.name} came apart: its logits are not finite. "
            f"Lower learning_rate (now {config.learning_rate:g})"
        )
    if save_to is not None:
        trainer.save_model(str(save_to))
        tokenizer.save_pretrained(str(save_to))
    return measure(task.measures, labels, predictions) | {"seconds": seconds}


def train_with(model: PreTrainedModel, rows, config, epochs: float, collator, **more) -> tuple[Trainer, float]:
    """A trained `Trainer` and the seconds that training took; nothing is left on disk. Errors as in `finetune`."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            learning_rate=config.learning_rate,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=128,
            warmup_steps=config.warmup,  # below 1 it is a fraction
            weight_decay=config.weight_decay,
            seed=config.seed,
            bf16=config.precision == "bfloat16",
            use_cpu=not torch.accelerator.is_available(),  # where there is none, bf16 wants to be told
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **more,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(PrinterCallback)  # the numbers that matter are returned
        started = perf_counter()
        trainer.train()
        seconds = perf_counter() - started
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ArithmeticError(
            f"fine-tuning {model.name_or_path} came apart: its weights are not finite. "
            f"Lower learning_rate (now {config.learning_rate:g})"
        )
    return trainer, seconds


def _open(checkpoint: str | Path, task: Task, data: DatasetDict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    labels = {"num_labels": 1, "problem_type": "regression"}
    if not task.regression:
        names = data["train"].features["label"].names
        labels = {"num_labels": len(names), "problem_type": "single_label_classification"}
        labels["id2label"] = dict(enumerate(names))
        labels["label2id"] = {name: index for index, name in enumerate(names)}
    return open_with_head(AutoModelForSequenceClassification, checkpoint, **labels)


def open_with_head(kind: type, checkpoint: str | Path, **changes) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint with a new head for a task, and its tokenizer; stock classes, float32 weights.

    Args:
        kind: the auto class that adds the head.
        checkpoint: a local folder or a hub name.
        changes: of its config.

    Raises:
        ValueError: it cannot be opened, or lacks weights beside those of the head.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **changes)
        if config.pad_token_id is None:  # causal models come without; the head looks for the last real token
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            config.pad_token_id = tokenizer.pad_token_id
        with _quiet():
            model, report = kind.from_pretrained(
                checkpoint,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint} cannot be opened for fine-tuning: {error}") from error
    backbone = f"{model.base_model_prefix}."
    random = [
        key
        for key in sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
        if key.startswith(backbone) and key.removeprefix(backbone).split(".")[0] not in HEAD_PARTS
    ]
    if random:
        raise ValueError(
            f"{checkpoint} lacks weights that would be random: {', '.join(random[:5])}{' ...' if random[5:] else ''}. "
            "Only the head of the task is new in fine-tuning"
        )
    return model, tokenizer


@contextmanager
def _quiet():
    """Without a bar, and without the report on weights that are new: which of them may be is checked here."""
    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shown:
            logging.enable_progress_bar()


def _tokenised(rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    texts = [list(rows[column]) for column in ("text", "pair") if column in rows.column_names]
    return Dataset.from_dict(tokenizer(*texts, truncation=True, max_length=length) | {"labels": list(rows["label"])})


def drawn(rows: Dataset, count: int | None) -> Dataset:
    """So many rows, always the same; all of them if there are no more, or for None."""
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=0).select(range(count))
