"""Masks: outputs of a masked model, neurons that return, and models that cannot be saved."""

import copy

import pytest
import torch

import hdlib
from hdlib import DistillConfig, Masks, Widths
from hdlib.checkpoints import load_state
from hdlib.data import sample
from hdlib.models import forward
from hdlib.widths import family_of

from conftest import ARGUMENTS, full, random_batch
from invariants import close, loss_for, sensitivities
from models import KINDS, narrower, random_model
from reference import Doubles
from test_loop import weights

CASES = [  # by default one width a family, in rotation
    pytest.param(name, width, marks=() if place == number % len(widths) else pytest.mark.full)
    for number, name in enumerate(KINDS)
    for widths in [[width for width in narrower(name, random_model(name), 0.5) if width != "layers"]]
    for place, width in enumerate(widths)
]


def random_scores(model, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = hdlib.width_groups(model)
    return {name: torch.rand(group.size, generator=generator) for name, group in groups.items()}


@pytest.mark.parametrize("name, width", CASES)
def test_a_masked_model_computes_what_the_narrowed_one_does(name, width):
    """Logits, every loss term, and all gradients of kept neurons; the weights are restored."""
    with Doubles():
        teacher = random_model(name).double()
        model, narrow = (random_model(name, seed=5).double() for _ in range(2))
        widths = narrower(name, model, 0.5)[width]
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        input_ids, labels = random_batch()
        scores = random_scores(model)
        kept = hdlib.narrow(narrow, widths, scores)
        loss, narrow_loss = loss_for(teacher).double(), loss_for(teacher).double()
        narrow_loss.narrow(kept)
        masks = Masks(model, loss)
        chosen = masks.choose(widths, scores)
        assert chosen.keys() == kept.keys() and all(torch.equal(chosen[name], kept[name]) for name in kept)
        expected = narrow_loss(forward(narrow, input_ids), forward(teacher, input_ids), labels)
        expected.total.backward()
        with masks.applied():
            output = forward(model, input_ids)
            close(output.logits, forward(narrow, input_ids).logits, 1e-9)
            terms = loss(output, forward(teacher, input_ids), labels)
            for term, value in expected.named().items():
                close(terms.named()[term], value, 1e-9)
            terms.total.backward()
        masks.mask_gradients()
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        # Masked neurons have no gradient, kept ones that of the narrowed model, unless queries were rescaled.
        sums = (sum(p.grad.abs().sum() for p in m.parameters() if p.grad is not None) for m in (model, narrow))
        if widths.head_dim == Widths.of(model).head_dim:
            close(*sums, 1e-9)


@pytest.mark.parametrize("given", [{"head_dim": 3}, {"heads": 2, "ffn": 20}])
def test_widths_that_are_not_given_follow_as_in_a_narrowed_model(given):
    model, narrow = random_model("bert").double(), random_model("bert").double()
    kept = hdlib.narrow(narrow, Widths(**given), random_scores(model))
    masks = Masks(model)
    chosen = masks.choose(Widths(**given), random_scores(model))
    assert masks.widths == Widths.of(narrow)
    assert chosen.keys() == kept.keys() and all(torch.equal(chosen[name], kept[name]) for name in kept)
    with pytest.raises(ValueError, match=r"is wider than .* masked neurons stay masked"):
        masks.choose(Widths(ffn=10), random_scores(model))  # all heads and their dimensions again


@pytest.mark.parametrize("name, width", CASES)
def test_an_exported_model_is_the_masked_one(name, width):
    model = random_model(name).double()
    masks = Masks(model)
    with Doubles():
        for ratio in (0.7, 0.5):  # two prunes, the second of the neurons that the first kept
            masks.choose(narrower(name, random_model(name), ratio)[width], random_scores(model, seed=int(10 * ratio)))
        with masks.applied(), torch.no_grad():
            expected = forward(model, random_batch()[0])
        masks.export()
        got = forward(model, random_batch()[0])
    assert Widths.of(model) == masks.widths
    close(got.logits, expected.logits, 1e-9)


def test_without_recovery_masked_neurons_stay_masked():
    model = random_model("bert", ffn=40)
    masks, last = Masks(model), None
    for step, ffn in enumerate((30, 20, 10)):
        kept = set(
            masks.choose(Widths(ffn=ffn).resolved(model), random_scores(model, seed=step))["layer.0.ffn"].tolist()
        )
        assert len(kept) == ffn and (last is None or kept < last)
        last = kept


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3"])
@pytest.mark.parametrize("fewer_heads", [True, False])
def test_with_recovery_neurons_may_return(name, fewer_heads):
    if not (fewer_heads or KINDS[name].head_dims):
        pytest.skip("only whole heads can be removed")
    model = random_model(name)
    masks = Masks(model, recover=True)
    wide, narrow = Widths.of(model), Widths.at(model, 0.5)
    narrow = narrow if fewer_heads else Widths(narrow.hidden, narrow.ffn, heads=wide.heads).resolved(model)
    scores = random_scores(model)
    kept = copy.deepcopy(masks.choose(narrow, scores))
    with masks.applied():
        forward(model, random_batch()[0]).logits.square().sum().backward()
    masks.mask_gradients()
    # Masked neurons need a nonzero score, from the gradients of the weights that read them, to return.
    scorer = hdlib.scorer("sensitivity")
    scorer.update(model)
    removed = {key: sorted(set(range(len(score))) - set(kept[key].tolist())) for key, score in scorer.scores().items()}
    # A query or key of a head whose values are all masked has no effect: the score of the head is that of its values.
    scored = {key for key in removed if not (fewer_heads and key.endswith("query_key"))}
    assert all((scorer.scores()[key][removed[key]] > 0).all() for key in scored)
    turned = masks.choose(narrow, {key: 1 - score for key, score in scores.items()})
    assert all(len(turned[key]) == len(kept[key]) and not torch.equal(turned[key], kept[key]) for key in removed)
    masks.choose(wide, scores)
    with masks.applied(), torch.no_grad():
        assert torch.equal(forward(model, random_batch()[0]).logits, model(random_batch()[0]).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3", "modernbert", "mpnet"])
@pytest.mark.parametrize("recover", [True, False])
def test_a_global_quota_ranks_all_layers_together(name, recover):
    model = random_model(name, layers=3)
    masks = Masks(model, scope="global", recover=recover)
    widths = Widths.at(model, 0.5)
    scores = random_scores(model)
    scores["layer.1.ffn"] *= 0.01  # the least important neurons are in the middle layer
    scores = {key: score.double() for key, score in scores.items()}
    before = copy.deepcopy(scores)
    kept = masks.choose(widths, scores)
    assert all(torch.equal(score, before[key]) for key, score in scores.items()), "the scorer's averages are unchanged"
    counts = [len(kept[f"layer.{layer}.ffn"]) for layer in range(3)]
    assert sum(counts) == 3 * widths.ffn and counts[1] == max(1, 3 * widths.ffn - 2 * 56)
    outer = [f"layer.{layer}.ffn" for layer in (0, 2)]
    best = torch.cat([scores[name] for name in outer]).sort().values[-counts[0] - counts[2] :]
    assert torch.equal(torch.cat([scores[name][kept[name]] for name in outer]).sort().values, best)
    if "hidden" in kept:
        assert len(kept["hidden"]) == widths.hidden
    with masks.applied(), torch.no_grad():
        assert not torch.equal(model(random_batch()[0]).logits, random_model(name, layers=3)(random_batch()[0]).logits)
    with pytest.raises(ValueError, match=r"scope='global'.*no stock class reads"):
        masks.export()


@pytest.mark.parametrize("name", ["bert", "llama", *full(*(name for name in KINDS if name not in ("bert", "llama")))])
def test_no_stock_class_has_widths_by_layer(name):
    """Configs can hold them, but no class of these families reads them. Once one does, a global quota has a student."""
    config = copy.deepcopy(random_model(name).config)
    ffn = family_of(config.model_type).ffn
    config.per_layer_config = {1: {config.attribute_map.get(ffn, ffn): 20}}
    config.allow_global_per_layer_attribute_access = True  # else the class refuses them
    groups = hdlib.width_groups(KINDS[name].model(config)).values()
    assert {group.size for group in groups if group.kind == "ffn"} == {56}


def test_an_unknown_scope():
    with pytest.raises(ValueError, match="scope is one of local, global"):
        Masks(random_model("bert"), scope="everywhere")
    with pytest.raises(ValueError, match="scope is one of local, global"):
        DistillConfig(scope="everywhere")


def test_sensitivities_are_those_of_the_narrowed_model():
    """Kept neurons have the same scores in both, so the next prune keeps the same neurons."""
    model = random_model("bert")
    widths = Widths(ffn=20, heads=2).resolved(model)
    scores = sensitivities(model, random_batch())
    narrow = copy.deepcopy(model)
    kept = hdlib.narrow(narrow, widths, scores)
    masks = Masks(model)
    masks.choose(widths, scores)
    for each, context in ((model, masks.applied()), (narrow, torch.enable_grad())):
        with context:
            forward(each, random_batch()[0]).logits.square().sum().backward()
    masks.mask_gradients()
    masked_scorer, narrow_scorer = hdlib.scorer(), hdlib.scorer()
    masked_scorer.update(model)
    narrow_scorer.update(narrow)
    for name, score in narrow_scorer.scores().items():
        torch.testing.assert_close(masked_scorer.scores()[name][kept[name]], score, rtol=1e-3, atol=1e-5)


# --- whole runs


def test_the_dense_baseline_trains_what_narrowing_trains(teacher, tokenizer, blocks, tmp_path):
    """Masking until the end and narrowing during training give the same run. head_dim is fixed here, since Adam's
    steps are not proportional to rescaled queries."""
    arguments = ARGUMENTS | {"target": {"hidden": 12, "ffn": 28, "heads": 2, "head_dim": 6}}
    narrowed = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**arguments), tmp_path / "narrowed")
    masked = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**arguments, masked=True), tmp_path / "masked")
    for column in ("total", "attention", "hidden", "gradient_norm", "held_out_kl", "held_out_hidden", "hidden_size"):
        got, wanted = (run.metrics[column].dropna().to_list() for run in (masked, narrowed))
        assert got == pytest.approx(wanted, rel=2e-3, abs=1e-5), column
    expected = weights(narrowed)
    assert expected.keys() == weights(masked).keys()
    for name, tensor in weights(masked).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-3, msg=name)


def test_a_run_with_recovery_ends_as_a_stock_model(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS, recover=True, schedule="linear")  # its last choice is at an odd step
    run = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)
    student, _ = run.student()
    assert Widths.of(student) == Widths.at(teacher, 0.5)
    measured = hdlib.discrepancy(student.eval(), teacher, sample(blocks[1], ARGUMENTS["eval_blocks"]))
    for name in ("kl", "agreement", "hidden"):
        assert measured[name] == pytest.approx(run.metrics[f"held_out_{name}"].iloc[-1], rel=1e-3), name


def test_a_run_with_a_global_quota_has_no_student(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS, scope="global")
    run = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)
    assert run.finished and run.metrics["intermediate_size"].iloc[-1] == 28
    with pytest.raises(FileNotFoundError, match=r"scope='global'.*no stock class reads.*step_00000024"):
        run.student()
    state = load_state(run.checkpoints()[-1])
    assert sum(len(state["masks"]["kept"][f"layer.{layer}.ffn"]) for layer in range(2)) == 2 * 28
    again = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path, resume=True, on_step=pytest.fail)
    assert again.finished


@pytest.mark.parametrize(
    "options", [{"recover": True}, *full({"scorer": "platon"}, {"masked": True}, {"scorer": "movement"})]
)
def test_resumed_is_undisturbed(teacher, tokenizer, blocks, tmp_path, options):
    config = DistillConfig(**ARGUMENTS | options)
    whole = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "whole")

    def kill(record):
        if record["step"] == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", on_step=kill)
    resumed = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", resume=True)
    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in got)
