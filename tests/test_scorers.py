"""Importance against an independent NumPy reference, averages that follow a prune."""

import copy

import numpy as np
import pytest
import torch

import hdlib
from hdlib import Widths

from conftest import random_batch, random_bert
from invariants import backward


@pytest.fixture
def trained():
    """A model with gradients of a real loss against a teacher of other weights."""
    model = random_bert(heads=3, head_dim=4, ffn=17, layers=2)
    backward(model, random_bert(heads=3, head_dim=4, ffn=17, layers=2, seed=9), random_batch())
    return model


def reference_sensitivity(model) -> dict[str, np.ndarray]:
    """Column sums of |theta * gradient|, matrix by matrix, as the paper's coupling asks for them."""
    e = {n: (p.detach() * p.grad).abs().double().numpy() for n, p in model.named_parameters()}
    transform = e["cls.predictions.transform.dense.weight"]
    hidden = transform.sum(0) + transform.sum(1) - transform.diagonal()
    hidden = hidden + e["cls.predictions.transform.dense.bias"]
    for table in ("word", "position", "token_type"):
        hidden = hidden + e[f"bert.embeddings.{table}_embeddings.weight"].sum(0)
    for norm in [name.removesuffix(".weight") for name in e if name.endswith("LayerNorm.weight")]:
        hidden = hidden + e[f"{norm}.weight"] + e[f"{norm}.bias"]
    scores = {}
    for layer in range(model.config.num_hidden_layers):
        at = f"bert.encoder.layer.{layer}"
        q, k, v = (e[f"{at}.attention.self.{name}.weight"] for name in ("query", "key", "value"))
        qb, kb, vb = (e[f"{at}.attention.self.{name}.bias"] for name in ("query", "key", "value"))
        out, up, down = (e[f"{at}.{name}.dense.weight"] for name in ("attention.output", "intermediate", "output"))
        scores[f"layer.{layer}.query_key"] = q.sum(1) + k.sum(1) + qb + kb
        scores[f"layer.{layer}.value_output"] = v.sum(1) + vb + out.sum(0)
        scores[f"layer.{layer}.ffn"] = up.sum(1) + e[f"{at}.intermediate.dense.bias"] + down.sum(0)
        hidden = hidden + q.sum(0) + k.sum(0) + v.sum(0) + out.sum(1) + up.sum(0) + down.sum(1)
        hidden = hidden + e[f"{at}.attention.output.dense.bias"] + e[f"{at}.output.dense.bias"]
    return scores | {"hidden": hidden}


def test_sensitivity_agrees_with_numpy(trained):
    scorer = hdlib.scorer("sensitivity")
    scorer.update(trained)
    expected = reference_sensitivity(trained)
    assert set(scorer.scores()) == set(expected)
    for name, score in scorer.scores().items():
        np.testing.assert_allclose(score.numpy(), expected[name], rtol=1e-4, err_msg=name)
        assert (score >= 0).all()


def test_the_average_is_the_paper_default(trained):
    scorer, single = hdlib.scorer("sensitivity", smoothing=0.85), hdlib.scorer("sensitivity", smoothing=0.0)
    seen = []
    for factor in (1.0, 3.0, 0.5):
        for parameter in trained.parameters():
            parameter.grad *= factor
        scorer.update(trained)
        single.update(trained)
        seen.append(single.scores()["hidden"])
    expected = 0.85 * (0.85 * seen[0] + 0.15 * seen[1]) + 0.15 * seen[2]
    torch.testing.assert_close(scorer.scores()["hidden"], expected)


def test_scores_follow_a_prune(trained):
    scorer = hdlib.scorer("sensitivity")
    scorer.update(trained)
    before = copy.deepcopy(scorer.scores())
    kept = hdlib.narrow(trained, Widths(hidden=6, ffn=7, head_dim=2, heads=3), scorer.scores())
    scorer.narrow(kept)
    for name, score in scorer.scores().items():
        assert torch.equal(score, before[name][kept[name]])
    backward(trained, copy.deepcopy(trained), random_batch())
    scorer.update(trained)
    assert all(len(score) == len(kept[name]) for name, score in scorer.scores().items())


def test_the_highest_scores_stay(trained):
    scorer = hdlib.scorer("sensitivity")
    scorer.update(trained)
    scores = scorer.scores()
    kept = hdlib.narrow(trained, Widths(hidden=6, ffn=7, head_dim=2, heads=3), scores)
    assert set(kept["layer.1.ffn"].tolist()) == set(np.argsort(-scores["layer.1.ffn"].numpy())[:7])
    assert set(kept["hidden"].tolist()) == set(np.argsort(-scores["hidden"].numpy())[:6])
    by_head = scores["layer.0.query_key"].reshape(3, 4).numpy()
    expected = {head * 4 + i for head in range(3) for i in np.argsort(-by_head[head])[:2]}
    assert set(kept["layer.0.query_key"].tolist()) == expected


def test_heads_go_by_the_sum_of_their_dimensions():
    model = random_bert(heads=4, head_dim=3)
    scores = {name: torch.ones(group.size) for name, group in hdlib.width_groups(model).items()}
    scores["layer.1.query_key"][3:6] = 5.0  # head 1 of layer 1
    scores["layer.1.value_output"][9:12] = 4.0  # head 3
    kept = hdlib.narrow(model, Widths(heads=2, head_dim=3), scores)
    assert kept["layer.1.heads"].tolist() == [1, 3]
    assert kept["layer.0.heads"].tolist() == [0, 1]
    assert kept["layer.1.query_key"].tolist() == kept["layer.1.value_output"].tolist() == [3, 4, 5, 9, 10, 11]


@pytest.mark.parametrize("name", ["sensitivity", "magnitude", "random"])
def test_every_scorer_scores_every_group(trained, name):
    scorer = hdlib.scorer(name)
    with pytest.raises(RuntimeError, match="no scores yet"):
        scorer.scores()
    scorer.update(trained)
    groups = hdlib.width_groups(trained)
    assert {key: len(score) for key, score in scorer.scores().items()} == {k: g.size for k, g in groups.items()}
    hdlib.narrow(trained, Widths(hidden=6), scorer.scores())
    assert trained.config.hidden_size == 6


def test_unknown_names_and_bad_smoothing_are_refused():
    with pytest.raises(ValueError, match="there are: sensitivity"):
        hdlib.scorer("taylor")
    with pytest.raises(ValueError, match="smoothing"):
        hdlib.scorer("sensitivity", smoothing=1.0)
