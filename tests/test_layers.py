"""Depth: a layer is faded out, which changes the function continuously, then removed; all that is paired follows."""

import copy
from math import ceil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import hdlib
from hdlib import DistillConfig, Masks, Widths
from hdlib.data import Sentences, TrainingBatches
from hdlib.discrepancy import discrepancy
from hdlib.fading import fade
from hdlib.models import forward
from hdlib.narrowing import choose
from hdlib.reconstruction import Compensation
from hdlib.training import Training
from hdlib.widths import new_numbers, renumbered, source_layers, spaced_layers

import invariants
from conftest import ARGUMENTS, random_batch, random_bert
from models import KINDS, random_encoder, random_model

DEEP = [name for name, kind in KINDS.items() if kind.deep]
FEW = {"steps": 12, "batch_size": 2, "eval_every": 12, "eval_blocks": 4}
FADING = ARGUMENTS | FEW | {"target": Widths(layers=2), "prune_start": 0.1, "prune_end": 0.9}


def without(model, *layers: int) -> dict[str, torch.Tensor]:
    """Scores by which these layers leave first."""
    groups = hdlib.width_groups(model).items()
    return {
        name: torch.full((group.size,), float(not name.startswith(tuple(f"layer.{each}." for each in layers))))
        for name, group in groups
    }


@pytest.mark.parametrize("name", DEEP)
def test_a_faded_layer_leaves_without_a_trace(name):
    """Exactly in a pre-norm family; in others where the norm before it gives all tokens the same deviation."""
    model = random_model(name, layers=3)
    for module, entry in model.named_modules():
        if "layer.0." in module and isinstance(entry, torch.nn.LayerNorm):
            torch.nn.init.constant_(entry.weight, 1.7), torch.nn.init.constant_(entry.bias, -0.3)
    input_ids, _ = random_batch()
    with torch.no_grad():
        teacher = forward(model, input_ids).logits
        fade(model, 1, 0.5), fade(model, 1, 0.0)
        faded = forward(model, input_ids).logits
    kept = hdlib.narrow(model, Widths(layers=2), without(model, 1))
    assert kept["layers"].tolist() == [0, 2]
    invariants.close(forward(model, input_ids).logits, faded, 1e-5 if name.startswith(("gpt", "llama")) else 1e-4)
    assert (faded - teacher).abs().max() > 0.01


def test_a_layer_is_faded_in_proportion():
    """Its two output matrices with their biases, and nothing else before a norm."""
    model, before = random_model("gpt2", layers=3), random_model("gpt2", layers=3)
    fade(model, 1, 0.8), fade(model, 1, 0.5)
    outputs = ("transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj")
    for name, weight in before.named_parameters():
        factor = 0.4 if name.startswith(outputs) else 1.0
        torch.testing.assert_close(model.get_parameter(name), factor * weight)


def test_the_norms_of_a_faded_layer_lose_less_than_without():
    """KL of the removal after the fade, against that of a layer whose outputs alone were faded."""
    input_ids, jumps = random_batch(size=16)[0], {}
    for refit in (True, False):
        model = random_bert(layers=3, heads=8, head_dim=8)
        norms = {name: each.clone() for name, each in model.state_dict().items() if ".1." in name and "Norm" in name}
        fade(model, 1, 0.0)
        model.load_state_dict({} if refit else norms, strict=False)
        faded = forward(model, input_ids).logits
        hdlib.narrow(model, Widths(layers=2), without(model, 1))
        jumps[refit] = (forward(model, input_ids).logits - faded).square().mean().item()
    assert jumps[True] < 0.5 * jumps[False]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in DEEP])
def test_layers_that_cannot_leave(name):
    model = random_model(name, layers=3)
    with pytest.raises(
        ValueError, match=r"layers=2 is impossible for '.*': layers stays 3, since .* (norm|weights|num|con)"
    ):
        hdlib.narrow(model, Widths(layers=2))
    assert Widths.of(model).layers == 3


@pytest.mark.parametrize("option", [{"masked": True}, {"recover": True}, {"scope": "global"}], ids=str)
def test_masks_keep_all_layers(option, teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"target": Widths(layers=1)} | option)
    with pytest.raises(ValueError, match=r"layers=1: .* masks, which layers cannot have; take layers=2"):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)


def test_the_least_important_layers_leave():
    """By the sum of their scores, the higher number on a tie; the first one stays."""
    for layers, kept in {(0,): [0, 1, 2], (2,): [0, 1, 3], (): [0, 1, 2]}.items():
        model = random_bert(layers=4)
        assert hdlib.narrow(model, Widths(layers=3), without(model, *layers))["layers"].tolist() == kept


def test_the_pattern_of_local_and_global_attention_follows():
    model = random_model("modernbert", layers=4)
    assert model.config.layer_types == ["full_attention", "sliding_attention"] * 2
    hdlib.narrow(model, Widths(layers=2), without(model, 1, 3))
    assert model.config.layer_types == ["full_attention", "full_attention"]


def test_renumbered():
    named = {"hidden": 0, "layer.1.ffn": 1, "layer.11.ffn": 11, "h.2.mlp.weight": 2, "layer.3.4.x": 3}
    found = renumbered(named, new_numbers({"layers": torch.tensor([0, 2, 3, 11])}))
    assert found == {"hidden": 0, "layer.3.ffn": 11, "h.1.mlp.weight": 2, "layer.2.4.x": 3}


@pytest.fixture(scope="module")
def deep(tokenizer):
    return random_bert(vocabulary=len(tokenizer), layers=4)


@pytest.fixture(scope="module")
def faded(deep, tokenizer, blocks, tmp_path_factory):
    """A run from four layers to two whose weights do not move but for the fade, with all its checkpoints."""
    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "checkpoint_every": 1, "keep_last": 12}
    config = DistillConfig(**FADING | still)
    return hdlib.distill(deep, tokenizer, *blocks, config, tmp_path_factory.mktemp("faded") / "run")


def test_depth_follows_the_schedule(faded, deep):
    """One layer at a time is scaled down to 0 and leaves; every checkpoint is a stock model of whole layers."""
    target, layers, leaving = Widths(layers=2).resolved(deep), [0, 1, 2, 3], None
    for step, folder in faded.students().items():
        depth = faded.config.depth_at(step, deep, target)
        model = AutoModelForMaskedLM.from_pretrained(folder)
        assert Widths.of(model).layers == faded.metrics.loc[step, "num_layers"] == ceil(depth)
        if ceil(depth) < len(layers):
            layers.remove(leaving)
        factors = []
        for layer, number in zip(model.bert.encoder.layer, layers, strict=True):
            original = deep.bert.encoder.layer[number]
            parts = [each.output.dense.weight.data for each in (layer, layer.attention, original, original.attention)]
            factors += [float((parts[0] / parts[2]).median()), float((parts[1] / parts[3]).median())]
        whole, fraction = divmod(depth, 1)
        expected = sorted([1.0] * int(whole) + [fraction] * (fraction > 0))
        assert sorted(factors[::2]) == pytest.approx(expected, abs=1e-3) == sorted(factors[1::2])
        if min(factors) < 0.999:
            leaving = layers[factors.index(min(factors)) // 2]
    assert faded.kept["layers"] == layers and len(layers) == 2


def test_kept_layers_are_recorded(faded, deep, tokenizer):
    kept = faded.kept
    numbers = {name.split(".")[1] for name in kept if name.startswith("layer.")}
    assert numbers == {str(layer) for layer in kept["layers"]}
    student = faded.student()[0]
    for number, layer in enumerate(kept["layers"]):
        own, original = (model.bert.encoder.layer[n] for model, n in ((student, number), (deep, layer)))
        torch.testing.assert_close(own.intermediate.dense.weight, original.intermediate.dense.weight)
    last = faded.prune(faded.pruned_at[-1])
    assert last.kept.keys() == hdlib.width_groups(deep).keys()
    assert {name for name, each in last.kept.items() if not each.any()} == {
        name for name in last.kept if name.startswith("layer.") and name.split(".")[1] not in numbers
    }
    columns = faded.metrics.filter(regex="held_out_attention").iloc[-1].dropna().index
    assert [int(column.rpartition("_")[2]) - 1 for column in columns] == kept["layers"]
    (mesh,) = hdlib.lab.plots.plot_layers(faded, "attention").axes[0].collections
    assert mesh.get_array().shape == (4, 2) and mesh.get_array().mask.sum() == 2, "after the last step two are missing"
    assert hdlib.lab.study.overlap({"one": [faded]}, "layers").shape == (1, 1)


def test_a_resumed_fade_equals_an_uninterrupted_one(deep, tokenizer, blocks, tmp_path):
    """Killed while a layer is faded; with narrower widths too, and scores that are kept for each parameter."""
    target = Widths(layers=2, ffn=30, hidden=16, heads=4)
    config = DistillConfig(**FADING | {"target": target, "scorer": "platon", "compensate": True})

    def kill(record):
        if record["step"] == 8:
            raise KeyboardInterrupt

    whole = hdlib.distill(deep, tokenizer, *blocks, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(deep, tokenizer, *blocks, config, tmp_path / "killed", on_step=kill)
    assert torch.load(tmp_path / "killed/checkpoints/step_00000005/training.pt")["leaving_layers"]
    resumed = hdlib.distill(deep, tokenizer, *blocks, config, tmp_path / "killed", resume=True)
    one, other = (load_file(run.student_folder / "model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert whole.kept == resumed.kept and Widths.of(whole.student()[0]) == target.resolved(deep)


def test_one_shot_removes_them_at_once(deep, tokenizer, blocks, tmp_path):
    config = DistillConfig(**FADING | {"schedule": "one_shot"})
    run = hdlib.distill(deep, tokenizer, *blocks, config, tmp_path)
    assert run.metrics["num_layers"].tolist() == [4] + [2] * 12 and len(run.kept["layers"]) == 2


def test_a_layer_that_began_to_leave_leaves(deep):
    """Also if the scores change later."""
    config = DistillConfig(**FADING, warmup=0.0)
    training = Training.begin(deep, config.shape(deep), None, config, None)
    batch = invariants._batch(random_batch(size=8))
    for step in range(1, 14):
        training.start_step(step)
        training.forward_backward(batch)
        training.score()
        training.optimizer.zero_grad()
        was = [*training._leaving]
        if was:  # now it seems to be the most important
            for name, score in training.importance._averages.items():
                score.fill_(1e3 if name.startswith(f"layer.{was[0]}.") else 1.0)
        before = training.layers
        training.prune(config.widths_at(step, deep, training.target))
        if training.layers != before:
            assert {*before} - {*training.layers} == {before[was[0]]}
            break
        training.fade()
    assert len(training.layers) == 3


def test_the_layers_that_leave_are_those_that_predictions_need_least(deep):
    """Against all scores; to choose them changes no weight."""
    teacher = copy.deepcopy(deep)
    fade(teacher, 2, 0.1), fade(teacher, 3, 0.0)
    config = DistillConfig(**FADING | {"mlm": 0.0})
    training = Training.begin(teacher, config.shape(teacher), None, config, None)
    training.start_step(1)
    training.forward_backward(invariants._batch(random_batch(size=8)))
    training.importance._averages = without(teacher, 1)
    training.choose_leaving(1)
    assert training._leaving == [3]
    training.choose_leaving(2)
    assert training._leaving == [3, 2]
    for weight, same in zip(training.student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(weight, same)
    training._leaving = []
    training._narrow(training.target, training._scores())
    assert training.layers == [0, 1] and not training._leaving


def test_candidates_are_left_out_one_at_a_time(deep, monkeypatch):
    """Beside those that were chosen before."""
    config = DistillConfig(**FADING)
    training, absent = Training.begin(deep, config.shape(deep), None, config, None), []
    layers = training.student.bert.encoder.layer

    def loss() -> float:
        absent.append([number for number, layer in enumerate(layers) if not layer.output.dense.weight.any()])
        return 1.0 / len(absent)

    monkeypatch.setattr(training, "_prediction_loss", loss)
    training._leaving = [1]
    training.choose_leaving(2)
    assert absent == [[1, 2], [1, 3]] and training._leaving == [1, 3]


def test_the_last_states_are_compared():
    """Of a student without its last layer: its last state with the teacher's last, its attention with its layer's."""
    teacher = random_bert(layers=3)
    student = copy.deepcopy(teacher)
    kept = hdlib.narrow(student, Widths(layers=2), without(student, 2))
    loss = invariants.loss_for(teacher)
    for state, projection in enumerate(loss.hidden_projections):
        projection.data.fill_(state)
    loss.narrow(kept)
    assert [projection[0, 0].item() for projection in loss.hidden_projections] == [0, 2]
    input_ids, _ = random_batch()
    whole, some = forward(teacher, input_ids), forward(teacher, input_ids, layers=[0, 1])
    assert some.hidden_states[2] is not whole.hidden_states[2]
    torch.testing.assert_close(some.hidden_states, (*whole.hidden_states[:2], whole.hidden_states[3]))
    assert len(some.attentions) == 2 and torch.equal(some.attentions[1].query, whole.attentions[1].query)


def test_measures_of_a_student_with_fewer_layers(blocks):
    teacher = random_bert(layers=4)
    student = copy.deepcopy(teacher)
    hdlib.narrow(student, Widths(layers=2), without(student, 1, 3))
    blocks = blocks[1].select(range(40))
    found = discrepancy(student, teacher, blocks, layers=[0, 2])
    assert found["attention_1"] == 0.0 and found["attention_3"] > 0.0 and "attention_2" not in found
    assert {name for name in found if name.startswith("hidden_")} == {"hidden_1", "hidden_4"}
    assert "attention_4" in discrepancy(student, teacher, blocks), "the last of evenly spaced ones"
    assert spaced_layers(12, 4) == [0, 4, 7, 11] and spaced_layers(3, 1) == [0]


def test_moments_of_the_layers_that_stay():
    """Under their new numbers, so that a prune right after a removal has them."""
    model = random_bert(layers=4)
    loss, compensation, input_ids = invariants.loss_for(model), Compensation(), random_batch()[0]
    with compensation.recording(model):
        forward(model, input_ids)
    widths, name = Widths(layers=2).resolved(model), "bert.encoder.layer.{}.output.dense"

    def read(layer: str):
        return compensation._moments[compensation._source[layer]].products

    before = {layer: read(f"bert.encoder.layer.{layer}.attention.self.query") for layer in range(4)}
    states = {state: read(f"hidden_states.{state}.") for state in range(5)}
    kept = choose(without(model, 1, 3), Widths.of(model), widths, source_layers(model))
    compensation.apply(model, loss, kept)
    hdlib.narrow(model, widths, without(model, 1, 3))
    loss.narrow(kept)
    assert torch.equal(read("bert.encoder.layer.1.attention.self.query"), before[2])
    assert all(torch.equal(read(f"hidden_states.{new}."), states[old]) for new, old in enumerate((0, 1, 4)))
    assert name.format(2) not in compensation._source and f"hidden_states.{3}." not in compensation._source
    with compensation.recording(model):
        forward(model, input_ids)
    assert compensation._moments.keys() == {*compensation._source.values()}
    narrower = Widths.at(model, 0.5)
    compensation.apply(model, loss, choose(without(model), widths, narrower, source_layers(model)))


def test_an_encoder_that_fades_is_no_copy(tokenizer, tmp_path):
    """It is trained from then on, and still projects into its teacher's space."""
    teacher = random_encoder("bert", vocabulary=len(tokenizer), layers=3)
    config = DistillConfig(**FADING)
    training = Training.begin(teacher, config.shape(teacher), None, config, None)
    assert training.is_copy
    training.start_step(4)
    training.forward_backward(TrainingBatches(Sentences.of(random_batch(size=4)[0].tolist()), None, 4, seed=0)[0])
    training.score()
    training.fade()
    assert not training.is_copy and len(training._leaving) == 1
    training.loss.hidden_projections[-1].data.fill_(7.0)
    training.prune(training.target)
    assert len(training.layers) == 2 and not training._leaving
    assert training.student.sentence_pooling.projection.eq(7.0).all()


def test_masks_of_a_model_have_its_layers():
    model = random_bert(layers=3)
    masks = Masks(model)
    masks.choose(Widths.at(model, 0.5), without(model))
    assert masks.kept["layers"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="layers=2: layers cannot be masked; take layers=3"):
        masks.choose(Widths(layers=2).resolved(model), without(model))
