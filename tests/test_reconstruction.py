"""Rotation of heads, the least-squares fold and the refit of norms: exactness, NumPy, runs."""

import copy
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForMaskedLM
from transformers.pytorch_utils import Conv1D

import hdlib
from hdlib import DistillConfig, Widths
from hdlib.models import forward, student_of
from hdlib.narrowing import choose
from hdlib.reconstruction import RIDGE, RIDGE_OF_FEW, Compensation, Moments, _Layers, refit_norm, regression
from hdlib.rotation import rotate_heads
from hdlib.widths import all_neurons, source_layers, width_groups

from conftest import ARGUMENTS, full, random_batch, random_bert
from invariants import close, loss_for, sensitivities
from models import KINDS, random_model
from test_loop import weights

SOME = ("bert", "deberta-v2", "gpt2", "albert")


def rows(count: int = 200, length: int = 16, vocabulary: int = 60) -> torch.Tensor:
    return torch.randint(5, vocabulary, (count, length), generator=torch.Generator().manual_seed(7))


def observed(model, loss=None) -> Compensation:
    compensation = Compensation()
    with torch.no_grad(), compensation.recording(model):
        forward(model, rows(), torch.ones(200, 16, dtype=torch.bool))
    return compensation


@pytest.mark.parametrize("kind", [*SOME, *full(*(kind for kind in KINDS if kind not in SOME))])
def test_rotated_heads_change_no_logit(kind, tmp_path):
    """A stock model again, with all its neurons; whole heads are left as they are."""
    model = random_model(kind).eval()
    rotated = copy.deepcopy(model)
    rotate_heads(rotated, [{"input_ids": rows(4)}, {"input_ids": rows(2)}])
    input_ids, _ = random_batch()
    with torch.no_grad():
        close(rotated(input_ids).logits, model(input_ids).logits, 1e-5)
    inside = any(group.kind == "query_key" for group in width_groups(model).values())
    pairs = zip(rotated.parameters(), model.parameters(), strict=True)
    assert any(not torch.equal(*pair) for pair in pairs) == inside
    rotated.save_pretrained(tmp_path)
    with torch.no_grad():
        close(type(model).from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits, 1e-5)


def test_a_head_without_effect_is_rotated_too():
    model, input_ids = random_bert().eval(), rows(4)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight[:, :6] = 0.0
        expected = model(input_ids).logits
        rotate_heads(model, [{"input_ids": input_ids}])
        close(model(input_ids).logits, expected, 1e-5)


def test_rotation_puts_the_work_of_a_head_into_few_dimensions():
    """Rotated queries and keys have the same diagonal products; so have values and their output matrix."""
    model = random_bert(layers=1).double()
    rotate_heads(model, [{"input_ids": rows(40)}])
    read = {}
    attention = model.bert.encoder.layer[0].attention
    for name in ("query", "key"):
        getattr(attention.self, name).register_forward_hook(lambda _, __, out, name=name: read.update({name: out}))
    attention.output.dense.register_forward_pre_hook(lambda _, inputs: read.update(values=inputs[0]))
    with torch.no_grad():
        model(rows(40))
    heads = {name: states.flatten(0, 1).unflatten(-1, (4, -1)).transpose(0, 1) for name, states in read.items()}
    query, key = heads["query"], heads["key"] - heads["key"].mean(1, keepdim=True)
    products = [states.mT @ states / states.shape[1] for states in (query, key)]
    for each in products:
        size = each.diagonal(dim1=-2, dim2=-1)
        assert (each - torch.diag_embed(size)).abs().max() < 1e-3 * size.max(), "no product of different dimensions"
        assert (size.diff(dim=-1) <= 1e-9).all(), "the largest first"
    assert (products[0] - products[1]).abs().max() < 1e-3 * products[0].max()


def test_a_fold_against_numpy():
    """x_P ~ A x_K + c by ridge regression, with and without a constant; and the layer that reads it."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(500, 9)) @ draw.normal(size=(9, 9)) + draw.normal(size=9)
    kept, removed, ridge = np.array([0, 2, 3, 7, 8]), np.array([1, 4, 5, 6]), 1e-2
    tensors = torch.tensor(x)
    means = Moments.of(tensors).means()
    for centred in (True, False):
        found = regression(*means, torch.tensor(kept), centred, ridge)
        center = x.mean(0) if centred else np.zeros(9)
        inner = (x - center)[:, kept]
        own = inner.T @ inner / 500
        own += ridge * np.diag(own).mean() * np.eye(5)
        expected = np.linalg.solve(own, inner.T @ (x - center)[:, removed] / 500).T
        constant = center[removed] - expected @ center[kept]
        assert found[1].tolist() == removed.tolist()
        np.testing.assert_allclose(found[2], expected, rtol=1e-8)
        np.testing.assert_allclose(found[3], constant, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_every_reader_against_numpy(kind):
    """Each layer's new weights follow from what it read in one forward pass, in twenty lines of NumPy."""
    model = random_model(kind).eval()
    read = {}
    for name in _Layers.of(model).readers:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: read.update({name: inputs[0].detach()})
        )
    scores = sensitivities(model, random_batch())
    kept = choose(scores, Widths.of(model), Widths.at(model, 0.5), source_layers(model))
    axes = _Layers.of(model).readers
    before = {name: copy.deepcopy(model.get_submodule(name)) for name in axes}
    observed(model).apply(model, loss_for(model), kept)
    checked = 0
    for name, (block,) in axes.items():
        module, x = model.get_submodule(name), read[name].flatten(0, -2).double().numpy()
        keep = block.indices(kept[block.group]).numpy()
        lost = np.setdiff1d(np.arange(x.shape[1]), keep)
        if len(lost) == 0 or name.startswith(("cls", "lm_head")):  # the head reads all positions, not those hooked here
            continue
        old = before[name].weight.detach().double().numpy()
        new = module.weight.detach().double().numpy()
        old, new = (old.T, new.T) if isinstance(module, torch.nn.Linear) else (old, new)  # (D, out)
        center = x.mean(0) if module.bias is not None else 0 * x[0]
        inner = (x - center)[:, keep]
        own = inner.T @ inner / len(x)
        own += RIDGE * np.diag(own).mean() * np.eye(len(keep))
        fit = np.linalg.solve(own, inner.T @ (x - center)[:, lost] / len(x))  # (K, P)
        np.testing.assert_allclose(new[keep], old[keep] + fit @ old[lost], rtol=1e-3, atol=1e-4)
        if module.bias is not None:
            moved = (center[lost] - center[keep] @ fit) @ old[lost]
            np.testing.assert_allclose(
                module.bias.detach(), before[name].bias.detach().numpy() + moved, rtol=1e-3, atol=1e-4
            )
        checked += 1
    assert checked > 4


@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert"])
def test_the_score_of_reconstruction_is_the_error_of_a_fold(kind):
    """Of each neuron, predicted from all others by the regression of the folds, over all layers that read it."""
    model = random_model(kind).eval()
    compensation = observed(model)
    scorer, sensitivity = hdlib.scorer("reconstruction", compensation=compensation), hdlib.scorer("sensitivity")
    model(rows(4)).logits.square().sum().backward()
    scorer.update(model), sensitivity.update(model)
    found, others = scorer.scores(), sensitivity.scores()
    expected = defaultdict(float)
    for name, (block, *_) in _Layers.of(model).readers.items():
        if not block.group.endswith(("hidden", "value_output")):
            continue
        errors = []
        module = model.get_submodule(name)
        weight = module.weight if isinstance(module, Conv1D) else module.weight.T  # (D, out)
        mean, products = compensation._moments[compensation._source[name]].means()
        covariance = products - torch.outer(mean, mean)
        size = covariance.diagonal().mean()
        for neuron in range(len(mean)):
            rest = torch.arange(len(mean)) != neuron
            ridge = RIDGE_OF_FEW * size / covariance.diagonal()[rest].mean()  # in the units of the regression
            _, _, fit, _ = regression(mean, products, rest.nonzero()[:, 0], True, float(ridge))
            error = covariance[neuron, neuron] - fit[0] @ covariance[neuron, rest] + RIDGE_OF_FEW * size
            errors.append(weight[neuron].double().square().sum() * error)
        expected[block.group] += torch.stack(errors)
    for group, errors in expected.items():
        torch.testing.assert_close(found[group].double(), errors, rtol=1e-5, atol=0)
    assert found.keys() == others.keys() and "hidden" in expected
    assert all(torch.equal(found[name], others[name]) for name in found.keys() - expected.keys())


@pytest.mark.parametrize("kind", [*SOME, *full(*(kind for kind in KINDS if kind not in SOME))])
def test_a_fold_of_nothing_changes_nothing(kind):
    model = random_model(kind).eval()
    before, loss = copy.deepcopy(model), loss_for(model)
    compensation = observed(model)
    compensation.apply(
        model, loss, choose(sensitivities(model, random_batch()), *2 * [Widths.of(model)], source_layers(model))
    )
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


def test_neurons_that_others_express_are_removed_without_a_trace():
    """Half of the values of each head are copies of the others: the output matrix can do without them."""
    model = random_bert().eval()
    heads, half = Widths.of(model).heads, Widths.of(model).head_dim // 2
    kept, layers = all_neurons(model), model.bert.encoder.layer
    with torch.no_grad():
        for number, layer in enumerate(layers):
            for parameter in layer.attention.self.value.parameters():
                by_head = parameter.unflatten(0, (heads, -1))  # (H, E, ...)
                by_head[:, half:] = by_head[:, :half]
            kept[f"layer.{number}.value_output"] = torch.arange(2 * heads * half).view(heads, -1)[:, :half].flatten()
        expected = model(rows()).logits
        sliced = copy.deepcopy(model)
        observed(model).apply(model, loss_for(model), kept)
        for each in (sliced, model):
            for layer in each.bert.encoder.layer:
                layer.attention.output.dense.weight.unflatten(1, (heads, -1))[:, :, half:] = 0.0
        error = (model(rows()).logits - expected).abs().max()
        assert error < 1e-5 * (sliced(rows()).logits - expected).abs().max()


@pytest.mark.parametrize("kind", [*SOME, *full(*(kind for kind in KINDS if kind not in SOME))])
def test_a_compensated_prune_is_nearer_to_the_model_before(kind):
    """Logits and what the loss's projections make of hidden states; feed-forward neurons, never folded, all stay."""
    model = random_model(kind).eval()
    loss, compensation = loss_for(model), observed(model)
    scores = sensitivities(model, random_batch())
    widths = replace(Widths.at(model, 0.5), ffn=Widths.of(model).ffn)
    kept = choose(scores, Widths.of(model), widths, source_layers(model))
    sliced, sliced_loss = student_of(model), copy.deepcopy(loss)
    compensation.apply(folded := student_of(model), loss, kept)
    errors = {}
    labels = torch.where(torch.rand(200, 16, generator=torch.Generator().manual_seed(0)) < 0.3, rows(), -100)
    for name, student, its_loss in (("sliced", sliced, sliced_loss), ("folded", folded, loss)):
        its_loss.narrow(hdlib.narrow(student, widths, scores))
        assert Widths.of(student) == widths
        with torch.no_grad():
            terms = its_loss(forward(student, rows()), forward(model, rows()), labels)
            errors[name] = functional.mse_loss(student(rows()).logits, model(rows()).logits), terms.hidden
    assert errors["folded"][0] < errors["sliced"][0]
    if widths.hidden < Widths.of(model).hidden:
        assert errors["folded"][1] < errors["sliced"][1]


def test_moments_follow_a_prune():
    """The moments of the kept neurons are those of before; the next prune can use them."""
    model, loss = random_bert().eval(), None
    loss, compensation = loss_for(model), observed(model)
    before = dict(compensation._moments)
    scores, widths = sensitivities(model, random_batch()), Widths.at(model, 0.75)
    kept = choose(scores, Widths.of(model), widths, source_layers(model))
    compensation.apply(model, loss, kept)
    name = "bert.encoder.layer.0.attention.output.dense"
    own = kept["layer.0.value_output"]
    assert torch.equal(compensation._moments[name].products, before[name].products[own][:, own])
    hdlib.narrow(model, widths, scores)
    again = choose(sensitivities(model, random_batch()), widths, Widths.at(random_bert(), 0.5), source_layers(model))
    compensation.apply(model, loss, again)  # without a new forward pass


def test_compensated_runs(teacher, tokenizer, blocks, tmp_path):
    """Nearer to the teacher right after every prune; killed and resumed to the last bit; a stock student."""
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    still = ARGUMENTS | {"learning_rate": 1e-12, "weight_decay": 0.0, "eval_prunes": True}
    runs = {}
    for name, options in {"sliced": {}, "compensated": {"rotate": True, "compensate": True}}.items():
        runs[name] = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**still | options), tmp_path / name)
    jumps = {name: run.metrics["held_out_kl"].dropna().iloc[-1] for name, run in runs.items()}
    assert runs["compensated"].metrics.loc[0, "held_out_kl"] == 0.0, "the teacher's copy is rotated too"
    assert jumps["compensated"] < jumps["sliced"]

    def kill(record):
        if record["step"] == 13:
            raise KeyboardInterrupt

    config = DistillConfig(**ARGUMENTS | {"rotate": True, "compensate": True})
    whole = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", on_step=kill)
    resumed = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())
    student = AutoModelForMaskedLM.from_pretrained(resumed.student_folder)
    assert Widths.of(student) == Widths.at(teacher, 0.5)


def test_compensation_under_masks_is_refused():
    with pytest.raises(ValueError, match=r"which compensate=True changes.*DistillConfig.paper"):
        DistillConfig(recover=True)
    assert DistillConfig.paper(recover=True).under_masks


def test_reconstruction_needs_the_moments_of_compensation():
    with pytest.raises(ValueError, match=r"scorer='reconstruction' .* set compensate=True or scorer"):
        DistillConfig(compensate=False)


def test_the_head_gives_moments_of_all_tokens():
    """It runs at the loss positions only, too few for a fit; its states are those of all tokens."""
    model, compensation = random_bert().eval(), Compensation()
    with torch.no_grad(), compensation.recording(model):
        forward(model, rows(8), torch.arange(3))
    source = compensation._source["cls.predictions.transform.dense"]
    assert compensation._moments[source].tokens == rows(8).numel()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_last_norm_aims_at_a_tied_decoder(kind):
    """It shares the moments of the decoder, though the base of a GPT-2 returns a view of what its last norm gives."""
    model = random_model(kind).eval()
    layers, source = _Layers.of(model), observed(model)._source
    assert source[[*layers.norms][-1]] == source[next(iter(layers.tied))]


def test_a_refit_norm_against_numpy():
    """Scale and shift of least squares, with one deviation for all tokens; the kept neurons have a common mean."""
    draw, kept = np.random.default_rng(0), [0, 2, 3]
    z = draw.normal(size=(400, 6)) + np.array([3.0, -3.0, 3.5, 2.5, -3.0, -3.0])
    n = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    norm = torch.nn.LayerNorm(6).double()
    scale, shift = draw.normal(size=6), draw.normal(size=6)
    norm.load_state_dict({"weight": torch.tensor(scale), "bias": torch.tensor(shift)})
    y = n * scale + shift
    with torch.no_grad():
        refit_norm(norm, *Moments.of(torch.tensor(y)).means(), torch.tensor(kept))
    own = n[:, kept] - n[:, kept].mean(1, keepdims=True)
    deviation, change, target = np.sqrt((own**2).mean()), own - own.mean(0), y[:, kept] - y[:, kept].mean(0)
    new = deviation * (change * target).mean(0) / (change**2).mean(0)
    np.testing.assert_allclose(norm.weight.detach()[kept], new, rtol=1e-6)
    np.testing.assert_allclose(
        norm.bias.detach()[kept], y[:, kept].mean(0) - new * own.mean(0) / deviation, rtol=1e-6, atol=1e-9
    )
