"""Sentence encoders without training: semantic textual similarity (STS) and retrieval.

`encode` is a function from N texts to embeddings (N, E), such as `functools.partial(hdlib.encode, model, tokenizer)` or
`SentenceTransformer(folder).encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize

from .tasks import PAIR, Task, labelled, load_parts


def load_pairs(
    source: str | Path, texts: tuple[str, str] = PAIR, score: str | None = "score", part: str = "test"
) -> Dataset:
    """Read a table with two texts and a score a row: the columns `text`, `pair` and `label`.

    Args:
        source: a folder that holds the part as parquet, csv, tsv or jsonl; or a data set on the hub.
        texts: the columns of the two texts.
        score: the column of the score; None: every score is 1, as for pairs of a query and its document.
        part: name of the file or of the part.

    Raises the errors of `load_task`: a part, column or text that is missing, a score that is no finite number.
    """
    name = Path(source).name
    rows = load_parts(name, source, {part: part}, (*texts, *([score] if score else [])))[part]
    if score is None:
        score, rows = "score", rows.select_columns(texts).add_column("score", [1.0] * len(rows))
    return labelled(Task(name=name, texts=texts, label=score, regression=True), part, rows, None)


def sts(encode: Callable[[list[str]], Tensor], pairs: Dataset) -> dict[str, float]:
    """Correlation of the cosine of two embeddings with the scores of `pairs`, from `load_pairs`.

    Returns `spearman`, the usual measure, and `pearson`, in [-1, 1]; multiplied by 100 they are points. ValueError if
    all scores are equal.
    """
    from scipy.stats import pearsonr, spearmanr  # here, because its import is slow

    scores = list(pairs["label"])
    if len(set(scores)) < 2:
        raise ValueError(f"all {len(scores)} scores are {scores[0]}: a correlation needs different ones")
    texts = list(dict.fromkeys([*pairs["text"], *pairs["pair"]]))
    rows, embeddings = {text: row for row, text in enumerate(texts)}, _unit(encode(texts))
    first, second = (embeddings[[rows[text] for text in pairs[column]]] for column in ("text", "pair"))
    cosines = (first * second).sum(1).numpy()
    return {"spearman": float(spearmanr(cosines, scores)[0]), "pearson": float(pearsonr(cosines, scores)[0])}


def retrieval(
    encode_queries: Callable[[list[str]], Tensor],
    encode_documents: Callable[[list[str]], Tensor],
    pairs: Dataset,
    distractors: Sequence[str] = (),
) -> dict[str, float]:
    """Search an index of documents by queries; the student's queries in the teacher's index, if these differ.

    Args:
        encode_queries, encode_documents: into the same space.
        pairs: from `load_pairs`: `text` is a query, `pair` a document; relevant where the label is above 0.
        distractors: more documents of the index.

    Returns:
        recall_1, recall_10: of the relevant documents of a query, the fraction among the nearest 1 (10); at most 1.
        ndcg_10: normalised discounted cumulative gain of the nearest 10, with gain 1 for a relevant document.
        Means over the queries that have a relevant document.

    Raises ValueError if no row is relevant, or embeddings of queries and documents differ in dimension.
    """
    relevant: dict[str, set[str]] = {}
    for query, document, label in zip(pairs["text"], pairs["pair"], pairs["label"], strict=True):
        if label > 0:
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise ValueError("no pair has a label above 0: there is no relevant document")
    documents = list(dict.fromkeys([*pairs["pair"], *distractors]))
    queries, index = _unit(encode_queries(list(relevant))), _unit(encode_documents(documents))
    if queries.shape[1] != index.shape[1]:
        sizes = f"queries have {queries.shape[1]} dimensions, documents {index.shape[1]}"
        raise ValueError(f"{sizes}: encode both in the same space, such as that of the teacher")
    rows = {document: row for row, document in enumerate(documents)}
    is_relevant = torch.zeros(len(queries), len(documents))
    for query, found in enumerate(relevant.values()):
        is_relevant[query, [rows[document] for document in found]] = 1.0
    nearest = (queries @ index.T).topk(min(10, len(documents))).indices  # (Q, 10)
    gains, counts = is_relevant.gather(1, nearest), is_relevant.sum(1)
    discounts = 1 / torch.arange(2, 2 + gains.shape[1]).log2()
    best = discounts.cumsum(0)[counts.clamp(max=gains.shape[1]).long() - 1]
    measures = {"recall_1": gains[:, 0] / counts.clamp(max=1), "recall_10": gains.sum(1) / counts.clamp(max=10)}
    return {name: float(values.mean()) for name, values in (measures | {"ndcg_10": gains @ discounts / best}).items()}


def _unit(embeddings) -> Tensor:
    return normalize(torch.as_tensor(embeddings).float(), dim=-1)
