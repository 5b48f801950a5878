"""Fine-tune a stock checkpoint on a task with Hugging Face's `Trainer`, and measure it as GLUE does."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os.path import exists, expanduser
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from scipy import stats
from sklearn import metrics
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

from .tasks import Task

# Parts of a backbone that language modelling does not train, and buffers that old versions saved.
UNTRAINED = {"pooler", "sequence_summary", "position_ids", "token_type_ids", "inv_freq", "masked_bias", "version"}


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """Hyper-parameters of fine-tuning. Raises ValueError that names the field for a value out of range."""

    learning_rate: float = 1e-4  # peak, AdamW
    epochs: float | None = None  # passes over the training part; None: the task's number
    batch_size: int = 32  # rows a step
    length: int = 128  # tokens a row at most; longer rows are truncated
    warmup: float = 0.06  # fraction of the steps in which the learning rate rises; it falls linearly afterwards
    weight_decay: float = 0.01
    train_rows: int | None = None  # rows sampled from the training part, the same for all seeds; None: all
    precision: str = "float32"  # of matrix products: float32 or bfloat16; weights are always float32
    seed: int = 0  # of the new head, dropout and the order of rows

    def __post_init__(self):
        for name, value in vars(self).items():
            if name not in ("warmup", "weight_decay", "precision", "seed") and value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0; got {value}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16; got {self.precision!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a fraction of the steps, from 0 to below 1; got {self.warmup}")


def finetune(
    checkpoint: str | Path, task: Task, data: DatasetDict, config: FineTuneConfig, save_to: str | Path | None = None
) -> dict[str, float]:
    """Fine-tune a checkpoint once and measure it after the last epoch (no selection among epochs).

    Args:
        checkpoint: a folder written by `save_pretrained`, tokenizer included, or a hub name.
        task, data: as for `load_task`.
        config: the hyper-parameters.
        save_to: folder for the fine-tuned model, a stock checkpoint; None: not saved.

    Returns:
        The task's measures on the held-out part, and `seconds` of training.

    Raises:
        ValueError: the checkpoint cannot be opened, or its weights outside the head are not those of its config.
        ArithmeticError: training diverged: weights or logits are not finite.
    """
    set_seed(config.seed)  # before the head is created
    head = {"num_labels": 1}
    if not task.regression:
        names = data["train"].features["label"].names
        head = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model, tokenizer = open_with_head(AutoModelForSequenceClassification, checkpoint, problem_type=None, **head)
    length = min(config.length, tokenizer.model_max_length)
    parts = (sample(data["train"], config.train_rows), data["validation"])
    train, held_out = (_tokenised(rows, tokenizer, length) for rows in parts)
    collator, epochs = DataCollatorWithPadding(tokenizer), config.epochs or task.epochs
    # Batches of rows of similar length need little padding.
    trainer, seconds = train_with(model, train, config, epochs, collator, train_sampling_strategy="group_by_length")
    logits, labels, _ = trainer.predict(held_out)  # (N, classes) or (N, 1), and (N,): sorted by length
    if not np.isfinite(logits).all():
        raise _diverged(f"{checkpoint} on {task.name}", "logits", config)
    if save_to is not None:
        trainer.save_model(expanduser(save_to))
        tokenizer.save_pretrained(expanduser(save_to))
    predictions = logits[:, 0] if task.regression else logits.argmax(-1)
    return measure(task.measures, labels, predictions) | {"seconds": seconds}


def train_with(model: PreTrainedModel, rows, config, epochs: float, collator, **more) -> tuple[Trainer, float]:
    """Train a model; return its `Trainer` and the seconds of training. Leaves no files. Errors as in `finetune`."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            learning_rate=config.learning_rate,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=128,
            warmup_steps=config.warmup,  # a value below 1 is a fraction
            weight_decay=config.weight_decay,
            seed=config.seed,
            bf16=config.precision == "bfloat16",
            use_cpu=not torch.accelerator.is_available(),  # bf16 on a CPU requires it
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            **more,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # in a notebook Trainer would split batches over all GPUs
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(PrinterCallback)  # the measures are returned
        seconds = trainer.train().metrics["train_runtime"]
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise _diverged(model.name_or_path, "weights", config)
    return trainer, seconds


def _diverged(what: str, values: str, config: FineTuneConfig) -> ArithmeticError:
    return ArithmeticError(
        f"fine-tuning {what} diverged: {values} are not finite. Lower learning_rate (now {config.learning_rate:g})"
    )


def open_with_head(kind: type, checkpoint: str | Path, **changes) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a checkpoint with the head of `kind`, an auto class, and its tokenizer, limited to the model's positions.

    `changes` replaces fields of its config. Weights are float32; a head of another shape is replaced, with a warning.
    Raises ValueError if the checkpoint cannot be opened or its other weights do not fit its config.
    """
    checkpoint = expanduser(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **changes)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if config.pad_token_id in tokenizer.all_special_ids:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        config.pad_token_id = tokenizer.pad_token_id  # causal models: the head reads the last token that is not padding
        options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with ExitStack() as stack:  # no progress bar, and no report on new weights, which are checked below
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            model, report = kind.from_pretrained(checkpoint, config=config, **options)
    except Exception as error:  # of Transformers, tokenizers or safetensors
        raise ValueError(f"{checkpoint} cannot be opened for fine-tuning: {' '.join(str(error).split())}") from error
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}  # Transformers makes one up if none is there
    if exists(checkpoint) and not any(exists(Path(checkpoint) / file) for file in files):
        raise ValueError(f"{checkpoint} holds no tokenizer ({', '.join(sorted(files))}): save the model's in it")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{checkpoint} has {config.vocab_size} embeddings for {len(tokenizer)} tokens of its tokenizer"
        )
    new = {key for key, *_ in report["mismatched_keys"]}
    keys = sorted(new | report["missing_keys"] | report["unexpected_keys"])
    backbone = {model.base_model_prefix, *dict(model.base_model.named_children())}  # a checkpoint may lack the prefix
    if misfits := [key for key in keys if key.split(".")[0] in backbone and UNTRAINED.isdisjoint(key.split("."))]:
        names = ", ".join(misfits[:5]) + (" ..." if misfits[5:] else "")
        reason = f"weights outside the head are missing, or do not fit its config.json: {names}"
        raise ValueError(f"{checkpoint}: {reason}. Save the whole model with save_pretrained")
    if new:
        warnings.warn(f"{checkpoint}: a new head replaces one of another shape: {', '.join(sorted(new))}", stacklevel=3)
    tokenizer.model_max_length = min(tokenizer.model_max_length, _num_positions(model))
    return model, tokenizer


def _num_positions(model: PreTrainedModel) -> int:
    """The longest input in tokens; RoBERTa and its relatives number positions from the padding token's id + 1."""
    tables = [each for name, each in model.named_modules() if name.endswith("embeddings.position_embeddings")]
    padding = tables[0].padding_idx if tables else None
    return getattr(model.config, "max_position_embeddings", 10**9) - (0 if padding is None else padding + 1)


def _tokenised(rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    texts = [list(rows[column]) for column in ("text", "pair") if column in rows.column_names]
    return Dataset.from_dict(tokenizer(*texts, truncation=True, max_length=length) | {"labels": list(rows["label"])})


def sample(rows: Dataset, count: int | None) -> Dataset:
    """Sample `count` rows, the same at every call; all rows if there are no more, or for None."""
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=0).select(range(count))


# ------------------------------------------------------------------------------------------------------ measures


def _correlation(function, labels, predictions) -> float:
    """0 where a column is constant and the correlation is undefined."""
    constant = np.ptp(labels) == 0 or np.ptp(predictions) == 0
    return 0.0 if constant else function(labels, predictions).statistic


MEASURES = {
    "accuracy": metrics.accuracy_score,
    "f1": partial(metrics.f1_score, zero_division=0),  # of class 1
    "macro_f1": partial(metrics.f1_score, average="macro", zero_division=0),
    "matthews": metrics.matthews_corrcoef,
    "pearson": partial(_correlation, stats.pearsonr),
    "spearman": partial(_correlation, stats.spearmanr),
}


def measure(names: Iterable[str], labels, predictions) -> dict[str, float]:
    """Compute measures of predictions, (N,) classes or numbers; each is at most 1, the value for a perfect match.

    Raises ValueError for a name that is not in MEASURES, and for no rows.
    """
    if unknown := [name for name in names if name not in MEASURES]:
        raise ValueError(f"unknown measure {', '.join(unknown)}: use one of {', '.join(MEASURES)}")
    return {name: float(MEASURES[name](labels, predictions)) for name in names}
