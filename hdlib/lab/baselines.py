"""What a small sentence encoder is compared with, fewer layers and fewer dimensions by PCA, and its measures.

The first two are examples of sentence-transformers: drop layers and train on the embeddings of the teacher; project
embeddings on their principal components. E dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from os.path import expanduser
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from ..data import Sentences, TrainingBatches, batches, sample
from ..discrepancy import embedding_measures
from ..downstream import sts
from ..losses import embedding_loss
from ..models import forward, load_teacher, trainable
from ..sentences import Dense, encode
from ..widths import spaced_layers
from .cost import WARM_UP, parameters, timed
from .export import save_sentence_encoder


def keep_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy with `count` of the L layers, evenly spaced, the first and the last among them if there are two."""
    layers, smaller = model.config.num_hidden_layers, deepcopy(model)
    kept = spaced_layers(layers, count)
    for module in smaller.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                setattr(module, name, nn.ModuleList(child[layer] for layer in kept))
    smaller.config.num_hidden_layers = count
    return smaller


def distil_embeddings(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Sentences,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
) -> PreTrainedModel:
    """Train a student, in place, on the squared distance of its embeddings to those of the teacher; returns it."""
    parameters = [parameter for parameter in trainable(student).parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    rate = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    data = TrainingBatches(train, None, batch_size, seed)
    for step in range(steps):
        item = data[step]
        batch = {name: item[name].to(student.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            target = forward(teacher, **batch).embeddings  # (B, E)
        embedding_loss(forward(student, **batch).embeddings, target).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), rate.step(), optimizer.zero_grad()
    return student


def depth(teacher: PreTrainedModel, ratio: float) -> int:
    """The number of layers that have about as many parameters as all layers at `ratio` of the width."""
    return max(1, round(ratio**2 * teacher.config.num_hidden_layers))


def fewer_layers(teacher, train: Sentences, ratio: float, **recipe) -> PreTrainedModel:
    """A teacher with `depth(teacher, ratio)` of its layers, trained again."""
    return distil_embeddings(keep_layers(teacher, depth(teacher, ratio)), teacher, train, **recipe)


def fewer_dimensions(teacher, train: Sentences, ratio: float, seed: int = 0) -> PreTrainedModel:
    """A teacher whose embeddings have `ratio` of their dimensions, by PCA of those of 2,000 sentences."""
    embeddings = embed(teacher, sample(train, 2000, seed))  # (N, E)
    _, _, components = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)
    projection = Dense(components[: max(1, round(ratio * embeddings.shape[1]))])
    smaller, pooling = deepcopy(teacher), teacher.sentence_pooling
    smaller.sentence_pooling = replace(pooling, dense=(*pooling.dense, projection))
    return smaller


def saved(folder: str, tokenizer, build: Callable[[], PreTrainedModel] | None) -> PreTrainedModel | None:
    """The encoder in a folder; else the one that `build` makes, saved there; None if there is neither."""
    if Path(expanduser(folder)).exists():
        return load_teacher(folder)[0]
    if build is None:
        return None
    model = build()
    save_sentence_encoder(model, tokenizer, folder)
    return model


@torch.no_grad()
def embed(model: PreTrainedModel, sentences: Sentences) -> Tensor:
    """Embeddings (N, E) of sentences."""
    return torch.cat([forward(model, **batch).embeddings for batch in batches(sentences, 32)])


def measure(model, tokenizer, teacher, sentences: Sentences, pairs: Dataset | None = None) -> dict[str, float]:
    """Parameters of a model and its layers, its discrepancy on held-out sentences, and `spearman` on scored pairs."""
    counts = parameters(model)
    found = {"parameters": counts["total"], "layer_parameters": counts["encoder"]}
    found |= embedding_measures(embed(model, sentences), embed(teacher, sentences))
    return found | ({"spearman": sts(partial(encode, model, tokenizer), pairs)["spearman"]} if pairs else {})


@torch.no_grad()
def latency(
    models: dict[str, PreTrainedModel], sentences: Sentences, batch_size: int, repeats: int = 10
) -> dict[str, float]:
    """Milliseconds a sentence, pooling included: the median over batches of sentences of all lengths."""

    def pooled(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        return model.sentence_pooling(model(**batch).last_hidden_state, batch["attention_mask"])

    rows = torch.linspace(0, len(sentences) - 1, (WARM_UP + repeats) * batch_size).long()
    parts = batches(sentences.select(rows), batch_size, next(iter(models.values())).device)
    times = timed({name: partial(pooled, model, batch) for name, model in models.items()} for batch in parts)
    return {name: each / batch_size for name, each in times.items()}


def search(queries: dict[str, Tensor], index: Tensor, texts: list[str]) -> pd.DataFrame:
    """The five `texts`, of embeddings `index` (N, E), that are nearest to a query, (E,) as each model embeds it."""
    index, found = normalize(index, dim=-1), {}
    for name, query in queries.items():
        cosines = index @ normalize(query, dim=-1)
        nearest = cosines.topk(min(5, len(texts))).indices.tolist()
        found[name] = [f"{cosines[row]:.2f} {texts[row]}" for row in nearest]
    return pd.DataFrame(found).rename(index=lambda row: row + 1).rename_axis("rank")
