"""Importance against an independent NumPy reference; averages after a prune."""

import copy

import numpy as np
import pytest
import torch

import hdlib
from hdlib import Widths

from conftest import random_batch, random_bert
from invariants import are_among, backward
from models import random_model


@pytest.fixture
def trained():
    """A model with gradients of the total loss against a teacher with other weights."""
    return with_gradients("bert")


def with_gradients(name: str):
    shape = {"heads": 4, "head_dim": 4, "ffn": 17, "hidden": 20}
    model = random_model(name, **shape)
    backward(model, random_model(name, **shape, seed=9), random_batch())
    return model


def elements(model) -> dict[str, np.ndarray]:
    return {name: (p.detach() * p.grad).abs().double().numpy() for name, p in model.named_parameters()}


# --- the reference: row and column sums of |theta * gradient|, one matrix after the other


def bert_importance(e: dict, layers: int) -> dict[str, np.ndarray]:
    transform = e["cls.predictions.transform.dense.weight"]
    hidden = transform.sum(0) + transform.sum(1) - transform.diagonal()
    hidden = hidden + e["cls.predictions.transform.dense.bias"]
    for table in ("word", "position", "token_type"):
        hidden = hidden + e[f"bert.embeddings.{table}_embeddings.weight"].sum(0)
    for norm in [name.removesuffix(".weight") for name in e if name.endswith("LayerNorm.weight")]:
        hidden = hidden + e[f"{norm}.weight"] + e[f"{norm}.bias"]
    scores = {}
    for layer in range(layers):
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


def gpt2_importance(e: dict, layers: int) -> dict[str, np.ndarray]:
    hidden = e["transformer.wte.weight"].sum(0) + e["transformer.wpe.weight"].sum(0)  # weights are (in, out)
    for norm in [name for name in e if ".ln_" in name]:
        hidden = hidden + e[norm]
    scores = {}
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        (q, k, v), (qb, kb, vb) = (np.split(e[f"{at}.attn.c_attn.{part}"], 3, -1) for part in ("weight", "bias"))
        out, up, down = (e[f"{at}.{name}.weight"] for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
        scores[f"layer.{layer}.query_key"] = q.sum(0) + k.sum(0) + qb + kb
        scores[f"layer.{layer}.value_output"] = v.sum(0) + vb + out.sum(1)
        scores[f"layer.{layer}.ffn"] = up.sum(0) + e[f"{at}.mlp.c_fc.bias"] + down.sum(1)
        hidden = hidden + q.sum(1) + k.sum(1) + v.sum(1) + out.sum(0) + up.sum(1) + down.sum(0)
        hidden = hidden + e[f"{at}.attn.c_proj.bias"] + e[f"{at}.mlp.c_proj.bias"]
    return scores | {"hidden": hidden}


def qwen3_importance(e: dict, layers: int) -> dict[str, np.ndarray]:
    hidden = e["model.embed_tokens.weight"].sum(0) + e["lm_head.weight"].sum(0) + e["model.norm.weight"]
    scores = {}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        q, k, v, o = (e[f"{at}.self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (e[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        # 4 query heads on 2 key/value heads of 4 dimensions: a group has 8 rows of q and columns of o, 4 of k and v.
        sums = (q.sum(1).reshape(2, 8), k.sum(1).reshape(2, 4), v.sum(1).reshape(2, 4), o.sum(0).reshape(2, 8))
        scores[f"layer.{layer}.head_groups"] = sum(part.sum(1) for part in sums)
        scores[f"layer.{layer}.ffn"] = gate.sum(1) + up.sum(1) + down.sum(0)
        hidden = hidden + q.sum(0) + k.sum(0) + v.sum(0) + o.sum(1) + gate.sum(0) + up.sum(0) + down.sum(1)
        hidden = hidden + e[f"{at}.input_layernorm.weight"] + e[f"{at}.post_attention_layernorm.weight"]
    return scores | {"hidden": hidden}


def highest(score: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-score, kind="stable")[:count].tolist())


REFERENCES = {"bert": bert_importance, "gpt2": gpt2_importance, "qwen3": qwen3_importance}


@pytest.mark.parametrize("name", REFERENCES)
def test_importance_and_kept_neurons_agree_with_numpy(name):
    model = with_gradients(name)
    scorer = hdlib.scorer("sensitivity")
    scorer.update(model)
    expected = REFERENCES[name](elements(model), layers=2)
    assert set(scorer.scores()) == set(expected)
    for group, score in scorer.scores().items():
        np.testing.assert_allclose(score.numpy(), expected[group], rtol=1e-4, err_msg=group)
        assert (score >= 0).all()
    grouped = name == "qwen3"
    widths = Widths(hidden=9, ffn=7, heads=2) if grouped else Widths(hidden=6, ffn=7, heads=2, head_dim=3)
    kept = hdlib.narrow(model, widths, scorer.scores())
    assert kept["hidden"].tolist() == highest(expected["hidden"], 9 if grouped else 6)
    for layer in range(2):
        at = f"layer.{layer}"
        assert kept[f"{at}.ffn"].tolist() == highest(expected[f"{at}.ffn"], 7)
        if grouped:
            (group,) = highest(expected[f"{at}.head_groups"], 1)
            assert kept[f"{at}.head_groups"].tolist() == [group]
            assert kept[f"{at}.heads"].tolist() == [2 * group, 2 * group + 1]
            continue
        pairs = {pair: expected[f"{at}.{pair}"].reshape(4, 4) for pair in ("query_key", "value_output")}
        heads = highest(sum(score.sum(1) for score in pairs.values()), 2)
        assert kept[f"{at}.heads"].tolist() == heads
        for pair, score in pairs.items():
            assert kept[f"{at}.{pair}"].tolist() == [4 * h + i for h in heads for i in highest(score[h], 3)]


def test_platon_equals_its_published_formulas():
    """Sensitivity smoothed with beta_1, times |difference| smoothed with beta_2, summed over a neuron."""
    scorer = hdlib.scorer("platon", smoothing=0.85, uncertainty=0.95)
    smoothed, uncertain = 0.0, 0.0
    model = with_gradients("bert")
    for factor in (1.0, 3.0, 0.5, 2.0):
        for parameter in model.parameters():
            parameter.grad *= factor
        scorer.update(model)
        now = elements(model)
        if not smoothed:
            smoothed, uncertain = ({name: np.zeros_like(e) for name, e in now.items()} for _ in range(2))
        smoothed = {name: 0.85 * smoothed[name] + 0.15 * e for name, e in now.items()}
        uncertain = {name: 0.95 * uncertain[name] + 0.05 * np.abs(e - smoothed[name]) for name, e in now.items()}
    expected = bert_importance({name: smoothed[name] * uncertain[name] for name in smoothed}, layers=2)
    for group, score in scorer.scores().items():
        np.testing.assert_allclose(score.numpy(), expected[group], rtol=1e-4, err_msg=group)


def test_platon_follows_prunes():
    """After two prunes in a row every remaining weight still has its own average."""
    model = with_gradients("gpt2")
    scorer = hdlib.scorer("platon")
    scorer.update(model)
    for widths in (Widths(hidden=12, ffn=9), Widths(hidden=6, ffn=5, heads=2, head_dim=3)):
        kept = hdlib.narrow(model, widths, scorer.scores())
        before = scorer.scores()
        scorer.narrow(kept)
        assert all(torch.equal(score, before[name][kept[name]]) for name, score in scorer.scores().items())
    for name, parameter in model.named_parameters():
        assert scorer._smoothed[name].shape == parameter.shape
        # smoothed once from 0; |theta * gradient| is the same for a rescaled query
        torch.testing.assert_close(scorer._smoothed[name], 0.15 * (parameter * parameter.grad).abs())


def test_magnitude_is_the_sum_of_absolute_weights(trained):
    scorer = hdlib.scorer("magnitude")
    scorer.update(trained)
    weights = {name: parameter.detach().abs().double().numpy() for name, parameter in trained.named_parameters()}
    for group, expected in bert_importance(weights, layers=2).items():
        np.testing.assert_allclose(scorer.scores()[group].numpy(), expected, rtol=1e-4, err_msg=group)


def test_movement_keeps_weights_that_move_away_from_zero(trained):
    scorer = hdlib.scorer("movement", smoothing=0.0)
    scorer.update(trained)
    signed = {name: (-(p.detach() * p.grad)).double().numpy() for name, p in trained.named_parameters()}
    expected = bert_importance(signed, layers=2)
    lowest = min(score.min() for score in expected.values())
    for group, score in scorer.scores().items():
        np.testing.assert_allclose(score.numpy(), expected[group] - lowest, rtol=1e-3, atol=1e-4, err_msg=group)
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
    kept = hdlib.narrow(trained, Widths(hidden=8, ffn=7, head_dim=2, heads=4), scorer.scores())
    scorer.narrow(kept)
    for name, score in scorer.scores().items():
        assert torch.equal(score, before[name][kept[name]])
    backward(trained, copy.deepcopy(trained), random_batch())
    scorer.update(trained)
    assert all(len(score) == len(kept[name]) for name, score in scorer.scores().items())


def test_gradients_follow_a_prune(trained):
    before = {name: (parameter * parameter.grad).detach() for name, parameter in trained.named_parameters()}
    hdlib.narrow(trained, Widths(hidden=8, ffn=7, head_dim=2, heads=4))
    for name, parameter in trained.named_parameters():
        assert are_among((parameter * parameter.grad).detach(), before[name])


def test_the_highest_scores_are_kept(trained):
    scorer = hdlib.scorer("sensitivity")
    scorer.update(trained)
    scores = scorer.scores()
    kept = hdlib.narrow(trained, Widths(hidden=8, ffn=7, head_dim=2, heads=4), scores)
    assert set(kept["layer.1.ffn"].tolist()) == set(np.argsort(-scores["layer.1.ffn"].numpy())[:7])
    assert set(kept["hidden"].tolist()) == set(np.argsort(-scores["hidden"].numpy())[:8])
    by_head = scores["layer.0.query_key"].reshape(4, 4).numpy()
    expected = {head * 4 + i for head in range(4) for i in np.argsort(-by_head[head])[:2]}
    assert set(kept["layer.0.query_key"].tolist()) == expected


def test_heads_are_ranked_by_the_sum_of_their_dimensions():
    model = random_bert(heads=4, head_dim=3)
    scores = {name: torch.ones(group.size) for name, group in hdlib.width_groups(model).items()}
    scores["layer.1.query_key"][3:6] = 5.0  # head 1 of layer 1
    scores["layer.1.value_output"][9:12] = 4.0  # head 3
    kept = hdlib.narrow(model, Widths(heads=2, head_dim=3), scores)
    assert kept["layer.1.heads"].tolist() == [1, 3]
    assert kept["layer.0.heads"].tolist() == [0, 1]
    assert kept["layer.1.query_key"].tolist() == kept["layer.1.value_output"].tolist() == [3, 4, 5, 9, 10, 11]


@pytest.mark.parametrize("name", ["sensitivity", "platon", "magnitude", "movement", "random"])
def test_every_scorer_scores_every_group(trained, name):
    scorer = hdlib.scorer(name)
    with pytest.raises(RuntimeError, match="no scores yet"):
        scorer.scores()
    scorer.update(trained)
    groups = hdlib.width_groups(trained)
    assert {key: len(score) for key, score in scorer.scores().items()} == {k: g.size for k, g in groups.items()}
    hdlib.narrow(trained, Widths(hidden=8), scorer.scores())
    assert trained.config.hidden_size == 8


def test_unknown_names_and_bad_smoothing_are_refused():
    with pytest.raises(ValueError, match="there are: sensitivity"):
        hdlib.scorer("taylor")
    with pytest.raises(ValueError, match="smoothing"):
        hdlib.scorer("sensitivity", smoothing=1.0)
