"""SQuAD 1.1 and 2.0: answers as spans of a passage, or none, scored by the published rules."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoModelForQuestionAnswering, DefaultDataCollator, set_seed

from .finetune import FineTuneConfig, drawn, open_with_head, train_with
from .tasks import Task, load_parts

SQUAD = {
    name: Task(name=name, texts=("question", "context"), label="answers", measures=("f1", "exact"), epochs=3)
    for name in ("squad", "squad_v2")
}
COLUMNS = ("id", "context", "question", "answers")
BEST = 20  # starts and ends that are combined into spans


@dataclass(frozen=True, kw_only=True)
class SquadConfig(FineTuneConfig):
    """How a checkpoint is fine-tuned on SQuAD: as on any task, in windows, of which `batch_size` make a step."""

    length: int = 384  # tokens of question and passage together; longer passages are read in windows
    stride: int = 128  # tokens that two windows share
    longest_answer: int = 30  # tokens

    def __post_init__(self):
        super().__post_init__()
        for name in ("stride", "longest_answer"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")


# ------------------------------------------------------------------------------------------------------ scoring


def normalised(answer: str) -> str:
    """Lower case, without punctuation, without the articles a, an and the, words parted by single spaces."""
    plain = "".join(character for character in answer.lower() if character not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", plain).split())


PUNCTUATION = frozenset(string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 if the prediction equals one of the answers once both are normalised, else 0.

    No answers: the question has none, and the empty prediction is right (SQuAD 2.0). Answers that are nothing
    but articles and punctuation are left out where others remain.
    """
    return max(float(normalised(prediction) == normalised(answer)) for answer in _gold(answers))


def squad_f1(prediction: str, answers: Iterable[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, of the answer that fits best.

    Words count as often as they occur. Where prediction or answer has no words, 1 if neither has any, else 0.
    """
    return max(_f1(normalised(prediction).split(), normalised(answer).split()) for answer in _gold(answers))


def _gold(answers: Iterable[str]) -> list[str]:
    return [answer for answer in answers if normalised(answer)] or [""]


def _f1(predicted: list[str], answer: list[str]) -> float:
    if not predicted or not answer:
        return float(predicted == answer)
    shared = sum((Counter(predicted) & Counter(answer)).values())
    return 2 * shared / (len(predicted) + len(answer))


def score_answers(predictions: dict[str, str], rows: Dataset) -> dict[str, float]:
    """Mean exact match and F1 over questions, each at most 1; where some have no answer, of the two kinds apart too.

    Args:
        predictions: the answer to each question by its id, "" for none.
        rows: with `id` and `answers`.
    """
    if missing := [row for row in rows["id"] if row not in predictions]:
        raise ValueError(f"{len(missing)} questions have no prediction, the first is {missing[0]!r}")
    texts = {row["id"]: row["answers"]["text"] for row in rows}
    kinds = {"": list(texts), "answerable_": [], "unanswerable_": []}
    for question, answers in texts.items():
        kinds["answerable_" if answers else "unanswerable_"].append(question)
    if not (kinds["answerable_"] and kinds["unanswerable_"]):
        kinds = {"": kinds[""]}
    return {
        f"{kind}{name}": mean(function(predictions[question], texts[question]) for question in questions)
        for kind, questions in kinds.items()
        for name, function in (("exact", exact_match), ("f1", squad_f1))
    }


# ------------------------------------------------------------------------------------------------------ reading


def load_squad(name: str = "squad", source: str | Path = "rajpurkar") -> tuple[Task, DatasetDict]:
    """SQuAD and its parts, `train` and `validation`, with the hub's columns.

    Args:
        name: squad, or squad_v2.
        source: a folder that holds `NAME/train.parquet` and `NAME/validation.parquet`; or the owner on the hub.

    Raises:
        ValueError, FileNotFoundError: as `load_task`; or an answer that does not stand where it says.
    """
    if name not in SQUAD:
        raise ValueError(f"SQuAD's versions are squad (1.1) and squad_v2 (2.0); got {name!r}")
    parts = {"train": "train", "validation": "validation"}
    found = load_parts(name, source if Path(source).exists() else f"{source}/{name}", parts)
    for part, rows in found.items():
        for column in COLUMNS:
            if column not in rows.column_names:
                raise ValueError(f"{name} ({part}) has no column {column!r}; it has: {', '.join(rows.column_names)}")
        if len(rows) == 0:
            raise ValueError(f"{name}: the {part} part is empty")
        for row in rows:
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                if row["context"][start : start + len(text)] != text:
                    raise ValueError(f"{name} ({part}): question {row['id']}: {text!r} does not stand at {start}")
    return SQUAD[name], DatasetDict(found)


# --------------------------------------------------------------------------------------------------- fine-tuning


def finetune_squad(checkpoint: str | Path, task: Task, data: DatasetDict, config: SquadConfig) -> dict[str, float]:
    """Fine-tune one checkpoint once to find answers, and measure it on the held-out part after the last epoch.

    A passage that is too long is read in windows that overlap. A question without an answer points at the first token,
    [CLS]; its score there, the least over the windows, is compared with that of the best span.

    Args:
        checkpoint: a folder that `save_pretrained` left, with its tokenizer, or a hub name.
        task, data: as `load_squad` gives them.
        config: the arguments.

    Returns:
        `exact` and `f1`, as `score_answers` gives them, and `seconds` of training.

    Raises:
        ValueError: as `finetune`; or a tokenizer that has no offsets or no [CLS].
        ArithmeticError: as `finetune`.
    """
    set_seed(config.seed)
    model, tokenizer = open_with_head(AutoModelForQuestionAnswering, checkpoint)
    if not tokenizer.is_fast or tokenizer.cls_token_id is None:
        raise ValueError(f"{checkpoint}: answers are found by character offsets and [CLS], which its tokenizer lacks")
    train = drawn(data["train"], config.train_rows).map(
        lambda batch: _targets(_windows(batch, tokenizer, config), batch, tokenizer.cls_token_id),
        batched=True,
        remove_columns=data["train"].column_names,
    )
    held_out = data["validation"].map(
        lambda batch: _windows(batch, tokenizer, config), batched=True, remove_columns=data["validation"].column_names
    )
    inputs = [name for name in tokenizer.model_input_names if name in train.column_names]
    targets = train.select_columns([*inputs, "start_positions", "end_positions"])
    trainer, seconds = train_with(model, targets, config, config.epochs or task.epochs, DefaultDataCollator())
    starts, ends = trainer.predict(held_out.select_columns(inputs)).predictions  # (windows, S) each
    predictions = best_spans(starts, ends, held_out, data["validation"], config.longest_answer)
    return score_answers(predictions, data["validation"]) | {"seconds": seconds}


def _windows(batch: dict, tokenizer, config: SquadConfig) -> dict:
    """Question and passage, in as many overlapping windows as the passage needs.

    `offsets` holds for each token its characters in the passage, (-1, -1) for those that are not of the
    passage; `row` the question's id.
    """
    length = min(config.length, tokenizer.model_max_length)
    encoded = tokenizer(
        [question.strip() for question in batch["question"]],
        batch["context"],
        truncation="only_second",
        max_length=length,
        stride=min(config.stride, length // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    rows = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    encoded["row"] = [batch["id"][row] for row in rows]
    encoded["place"] = rows
    encoded["offsets"] = [
        [offset if part == 1 else (-1, -1) for offset, part in zip(each, encoded.sequence_ids(window), strict=True)]
        for window, each in enumerate(offsets)
    ]
    return dict(encoded)


def _targets(windows: dict, batch: dict, cls_token_id: int) -> dict:
    """First and last token of the answer in each window; [CLS] twice where the window does not hold it whole."""
    starts, ends = [], []
    for ids, place, offsets in zip(windows["input_ids"], windows["place"], windows["offsets"], strict=True):
        answers, nothing = batch["answers"][place], ids.index(cls_token_id)
        first = last = None
        if answers["text"]:
            begin = answers["answer_start"][0]
            end = begin + len(answers["text"][0])
            first = next((i for i, (a, b) in enumerate(offsets) if a <= begin < b), None)
            last = next((i for i, (a, b) in enumerate(offsets) if a < end <= b), None)
        whole = first is not None and last is not None
        starts.append(first if whole else nothing)
        ends.append(last if whole else nothing)
    return windows | {"start_positions": starts, "end_positions": ends}


def best_spans(
    starts: np.ndarray, ends: np.ndarray, windows: Dataset, rows: Dataset, longest_answer: int = 30
) -> dict[str, str]:
    """The best answer to each question from the scores of all windows of its passage.

    Args:
        starts, ends: (windows, S), the logits of a token being the first or last one of the answer.
        windows: with `row`, `offsets` and `input_ids`; the first token is [CLS].
        rows: with `id`, `context` and `answers`. Only if some question has no answer may a prediction be empty.
        longest_answer: tokens of a span at most.

    Returns:
        The text of each question's answer by its id, "" for none.
    """
    may_be_empty = any(not answers["text"] for answers in rows["answers"])
    passages = dict(zip(rows["id"], rows["context"], strict=True))
    best = {row: (-np.inf, "") for row in passages}
    nothing = dict.fromkeys(passages, np.inf)
    for row, offsets, start, end in zip(windows["row"], windows["offsets"], starts, ends, strict=True):
        nothing[row] = min(nothing[row], float(start[0] + end[0]))
        inside = np.array([begin >= 0 for begin, _ in offsets])
        firsts, lasts = (np.argsort(np.where(inside, logits, -np.inf))[::-1][:BEST] for logits in (start, end))
        for first in firsts[inside[firsts]]:
            for last in lasts[inside[lasts]]:
                if first <= last < first + longest_answer and start[first] + end[last] > best[row][0]:
                    text = passages[row][offsets[first][0] : offsets[last][1]]
                    best[row] = (float(start[first] + end[last]), text)
    return {row: "" if may_be_empty and nothing[row] > best[row][0] else best[row][1] for row in passages}
