"""SQuAD 1.1 and 2.0: answers are spans of a passage, or none; scored by the published rules."""

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

from .finetune import FineTuneConfig, open_with_head, sample, train_with
from .tasks import Task, load_parts

SQUAD = {
    name: Task(name=name, texts=("question", "context"), label="answers", measures=("f1", "exact"))
    for name in ("squad", "squad_v2")
}
BEST = 20  # start and end candidates of each window that are combined into spans


@dataclass(frozen=True, kw_only=True)
class SquadConfig(FineTuneConfig):
    """Hyper-parameters of fine-tuning on SQuAD; `batch_size` counts windows."""

    length: int = 384  # tokens of question and passage together; a longer passage is read in windows
    stride: int = 128  # tokens that two windows share
    longest_answer: int = 30  # tokens


# ------------------------------------------------------------------------------------------------------ scoring


def normalised(answer: str) -> str:
    """The answer in lower case, without punctuation and the articles a, an, the; words separated by single spaces."""
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """Return 1.0 if the prediction equals one of the answers, all of them normalised, else 0.0.

    No answers: the question has none, and the empty prediction is right (SQuAD 2.0). An answer without a word
    after normalisation is ignored if there are others.
    """
    return max(float(normalised(prediction) == answer) for answer in _gold(answers))


def squad_f1(prediction: str, answers: Iterable[str]) -> float:
    """Return the F1 of the normalised words, repeated ones included; the maximum over the answers, in [0, 1].

    Where prediction or answer has no words, 1.0 if neither has any, else 0.0.
    """
    return max(_f1(normalised(prediction).split(), answer.split()) for answer in _gold(answers))


def _gold(answers: Iterable[str]) -> list[str]:
    return [plain for answer in answers if (plain := normalised(answer))] or [""]


def _f1(predicted: list[str], answer: list[str]) -> float:
    if not predicted or not answer:
        return float(predicted == answer)
    return 2 * (Counter(predicted) & Counter(answer)).total() / (len(predicted) + len(answer))


def score_answers(predictions: dict[str, str], rows: Dataset) -> dict[str, float]:
    """Compute mean exact match and F1 of predictions (by id, "" for none) over questions; each is at most 1.

    Where only some questions have an answer, also over those with and those without one.
    """
    answers = {row["id"]: row["answers"]["text"] for row in rows}
    answerable = [question for question, texts in answers.items() if texts]
    groups = {"": list(answers)}
    if 0 < len(answerable) < len(answers):
        groups |= {"answerable_": answerable, "unanswerable_": [each for each in answers if not answers[each]]}
    return {
        f"{group}{name}": mean(function(predictions[each], answers[each]) for each in questions)
        for group, questions in groups.items()
        for name, function in (("exact", exact_match), ("f1", squad_f1))
    }


def load_squad(name: str = "squad", source: str | Path = "rajpurkar") -> tuple[Task, DatasetDict]:
    """Read SQuAD's `train` and `validation` parts, with the hub's columns.

    Args:
        name: squad (1.1) or squad_v2 (2.0).
        source: a folder that holds `NAME/train.parquet` and `NAME/validation.parquet`; or the owner on the hub.

    Raises:
        ValueError, FileNotFoundError: as `load_task`; or an answer that is not at its position in the passage.
    """
    if name not in SQUAD:
        raise ValueError(f"unknown version of SQuAD {name!r}: use squad (1.1) or squad_v2 (2.0)")
    source = source if Path(source).expanduser().exists() else f"{source}/{name}"
    parts = {"train": "train", "validation": "validation"}
    found = load_parts(name, source, parts, ("id", "context", "question", "answers"))
    for part, rows in found.items():
        for row in rows:
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                if not row["context"].startswith(text, start):
                    raise ValueError(
                        f"task {name} ({part}): question {row['id']}: the answer {text!r} is not at character {start} "
                        "of its passage. Correct answer_start"
                    )
    return SQUAD[name], DatasetDict(found)


# --------------------------------------------------------------------------------------------------- fine-tuning


def finetune_squad(checkpoint: str | Path, task: Task, data: DatasetDict, config: SquadConfig) -> dict[str, float]:
    """Fine-tune a checkpoint once to find answers, and measure it on the held-out part after the last epoch.

    A long passage is read in overlapping windows. A question without an answer has the first token, [CLS], as its
    target. Its lowest score over the windows is compared with the score of the best span.

    Args:
        checkpoint: a folder written by `save_pretrained`, tokenizer included, or a hub name.
        task, data: as returned by `load_squad`.
        config: the hyper-parameters.

    Returns:
        `exact` and `f1` of `score_answers`, and `seconds` of training.

    Raises:
        ValueError, ArithmeticError: as `finetune`; or a tokenizer without character offsets or [CLS].
    """
    set_seed(config.seed)  # before the head is created
    model, tokenizer = open_with_head(AutoModelForQuestionAnswering, checkpoint, num_labels=2)
    if not tokenizer.is_fast or tokenizer.cls_token_id is None:
        raise ValueError(f"{checkpoint}: its tokenizer has no character offsets or no [CLS]; SQuAD needs both")
    rows, held_out = sample(data["train"], config.train_rows), data["validation"]
    train = rows.map(
        lambda batch: _targets(_windows(batch, tokenizer, config), batch, tokenizer.cls_token_id),
        batched=True,
        remove_columns=rows.column_names,
    )
    windows = held_out.map(
        lambda batch: _windows(batch, tokenizer, config), batched=True, remove_columns=held_out.column_names
    )
    inputs = [name for name in tokenizer.model_input_names if name in train.column_names]
    targets = train.select_columns([*inputs, "start_positions", "end_positions"])
    trainer, seconds = train_with(model, targets, config, config.epochs or task.epochs, DefaultDataCollator())
    starts, ends = trainer.predict(windows.select_columns(inputs)).predictions  # (windows, S) each
    predictions = best_spans(starts, ends, windows, held_out, config.longest_answer)
    return score_answers(predictions, held_out) | {"seconds": seconds}


def _windows(batch: dict, tokenizer, config: SquadConfig) -> dict:
    """Tokenise question and passage, in as many overlapping windows as the passage needs.

    `offsets` holds the characters of each token in the passage, (-1, -1) for tokens outside it; `row` the question's
    id; `index` its position in the batch.
    """
    length = min(config.length, tokenizer.model_max_length)
    questions = [question.strip() for question in batch["question"]]
    limits = {"truncation": True, "max_length": length // 3, "add_special_tokens": False}  # most is for the passage
    ends = tokenizer(questions, **limits, return_offsets_mapping=True)["offset_mapping"]
    encoded = tokenizer(
        [question[: end[-1][1]] if end else "" for question, end in zip(questions, ends, strict=True)],
        batch["context"],
        truncation="only_second",
        max_length=length,
        stride=min(config.stride, length // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )
    encoded["index"] = encoded.pop("overflow_to_sample_mapping")
    encoded["row"] = [batch["id"][index] for index in encoded["index"]]
    encoded["offsets"] = [
        [offset if part == 1 else (-1, -1) for offset, part in zip(each, encoded.sequence_ids(window), strict=True)]
        for window, each in enumerate(encoded.pop("offset_mapping"))
    ]
    return dict(encoded)


def _targets(windows: dict, batch: dict, cls_token_id: int) -> dict:
    """First and last token of the answer in each window; [CLS] twice where the window does not hold all of it."""
    starts, ends = [], []
    for ids, index, offsets in zip(windows["input_ids"], windows["index"], windows["offsets"], strict=True):
        answers, first, last = batch["answers"][index], None, None
        if answers["text"]:
            begin = answers["answer_start"][0]
            end = begin + len(answers["text"][0])
            first = next((i for i, (a, b) in enumerate(offsets) if a <= begin < b), None)
            last = next((i for i, (a, b) in enumerate(offsets) if a < end <= b), None)
        if first is None or last is None:
            first = last = ids.index(cls_token_id)
        starts.append(first)
        ends.append(last)
    return windows | {"start_positions": starts, "end_positions": ends}


def best_spans(
    starts: np.ndarray, ends: np.ndarray, windows: Dataset, rows: Dataset, longest_answer: int = 30
) -> dict[str, str]:
    """Select the best answer to each question (by id, "" for none) from the scores of all windows of its passage.

    `starts` and `ends`, (windows, S), are the logits of each token as the first and the last of the answer; token 0 is
    [CLS]. An answer has at most `longest_answer` tokens, and may be empty only if some question has no answer.
    """
    may_be_empty = any(not answers["text"] for answers in rows["answers"])
    passages = dict(zip(rows["id"], rows["context"], strict=True))
    best = {row: (-np.inf, "") for row in passages}
    empty = dict.fromkeys(passages, np.inf)
    for row, offsets, start, end in zip(windows["row"], windows["offsets"], starts, ends, strict=True):
        empty[row] = min(empty[row], float(start[0] + end[0]))
        inside = np.array([begin >= 0 for begin, _ in offsets])
        firsts, lasts = (np.argsort(np.where(inside, logits, -np.inf))[::-1][:BEST] for logits in (start, end))
        for first in firsts[inside[firsts]]:
            for last in lasts[inside[lasts]]:
                if first <= last < first + longest_answer and start[first] + end[last] > best[row][0]:
                    text = passages[row][offsets[first][0] : offsets[last][1]]
                    best[row] = (float(start[first] + end[last]), text)
    return {row: "" if may_be_empty and empty[row] > score else text for row, (score, text) in best.items()}
