"""The first six things that must always hold, each as one function that raises AssertionError.

`test_invariants.py` runs them on many models; `test_teeth.py` breaks the library on purpose and sees
each of them fail.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForMaskedLM, BertForMaskedLM

import hdlib
from hdlib import DistillationLoss, Widths
from hdlib.models import forward, student_of

from reference import masked


def loss_for(model, **options) -> DistillationLoss:
    config = model.config
    return DistillationLoss(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, **options)


def backward(model, teacher, batch, loss=None):
    """One backward of the total loss; returns it."""
    input_ids, labels = batch
    loss = loss or loss_for(teacher)
    positions = loss.looked_at(labels)
    with torch.no_grad():
        theirs = forward(teacher, input_ids, positions)
    total = loss(forward(model, input_ids, positions), theirs, labels).total
    total.backward()
    return total


def sensitivities(model, batch) -> dict[str, torch.Tensor]:
    teacher = copy.deepcopy(model)
    backward(model, teacher, batch)
    scorer = hdlib.scorer("sensitivity")
    scorer.update(model)
    model.zero_grad()
    return scorer.scores()


def identity(teacher: BertForMaskedLM, batch) -> None:
    """1. A student at ratio 1 gives its teacher's logits bit for bit, and every distillation term is 0."""
    student = student_of(teacher)
    hdlib.narrow(student, Widths.at(student, 1.0))
    input_ids, labels = batch
    assert torch.equal(student(input_ids).logits, teacher(input_ids).logits)
    terms = loss_for(teacher)(forward(student, input_ids), forward(teacher, input_ids), labels)
    for term in ("prediction", "hidden", "attention", "embedding"):
        assert getattr(terms, term).item() == 0.0, term
    assert terms.total.item() == terms.mlm.item() > 0


def mask_equals_narrow(teacher: BertForMaskedLM, widths: Widths, batch) -> None:
    """2. The masked wide model and the narrowed one give the same logits, hidden states and attention scores."""
    wide, student = copy.deepcopy(teacher), student_of(teacher)
    kept = hdlib.narrow(student, widths, sensitivities(wide, batch))
    input_ids, _ = batch
    with torch.no_grad(), masked(wide, kept):
        expected = forward(wide, input_ids)
    got = forward(student, input_ids)
    assert student.config.hidden_size < teacher.config.hidden_size or widths.hidden == teacher.config.hidden_size
    close(got.logits, expected.logits)
    for ours, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs[..., kept["hidden"]])
    for layer, (ours, theirs) in enumerate(zip(got.attentions, expected.attentions, strict=True)):
        close(ours.scores(), theirs.scores()[:, kept[f"layer.{layer}.heads"]])


def stock(teacher: BertForMaskedLM, widths: Widths, batch, folder: Path) -> None:
    """3. The saved student is a stock checkpoint: same logits, as many parameters as its config says, ties kept."""
    student = student_of(teacher)
    hdlib.narrow(student, widths, sensitivities(copy.deepcopy(teacher), batch))
    student.save_pretrained(folder)
    loaded, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(loaded.eval()(batch[0]).logits, student(batch[0]).logits)
    assert "hdlib" not in (folder / "config.json").read_text()
    for model in (student, loaded):
        assert model.num_parameters() == type(teacher)(loaded.config).num_parameters()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def asked_is_got(teacher: BertForMaskedLM, widths: Widths, batch) -> None:
    """4. The widths asked for are those of the config, of every weight, and of what the model computes."""
    student = student_of(teacher)
    kept = hdlib.narrow(student, widths, sensitivities(copy.deepcopy(teacher), batch))
    assert Widths.of(student) == widths
    sizes = {"hidden": widths.hidden, "ffn": widths.ffn, "heads": widths.heads}
    sizes |= dict.fromkeys(("query_key", "value_output"), widths.heads * widths.head_dim)
    for name, group in hdlib.width_groups(student).items():
        assert group.size == len(kept[name]) == sizes[group.kind], name
    output = forward(student, batch[0])
    assert all(states.shape[-1] == widths.hidden for states in output.hidden_states)
    assert all(pair.query.shape[1::2] == (widths.heads, widths.head_dim) for pair in output.attentions)
    assert all((indices.diff() > 0).all() for indices in kept.values())


def live_optimizer(teacher: BertForMaskedLM, shapes: list[Widths], batch) -> None:
    """5. After each prune every parameter is in the optimiser once, with its moments, and moves at the next step."""
    student = student_of(teacher)
    loss = loss_for(teacher)
    optimizer = torch.optim.AdamW([*student.parameters(), *loss.parameters()], lr=1e-3, weight_decay=0.0)
    for widths in shapes:
        backward(student, teacher, batch, loss)
        optimizer.step()
        before = {n: (p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for n, p in student.named_parameters()}
        scorer = hdlib.scorer("sensitivity")
        scorer.update(student)
        optimizer.zero_grad()
        kept = hdlib.narrow(student, widths, scorer.scores(), optimizer)
        loss.narrow(kept, optimizer)
        trained = [*student.parameters(), *loss.parameters()]
        held = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        assert held == Counter(id(parameter) for parameter in trained)
        assert set(optimizer.state) == set(trained), "state of parameters that are gone, or state that was lost"
        _moments_follow(student, optimizer, before)
        now = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
        backward(student, teacher, batch, loss)
        optimizer.step()
        still = [name for name, parameter in student.named_parameters() if torch.equal(parameter, now[name])]
        assert not still, f"these did not move: {still}"
        optimizer.zero_grad()


def _moments_follow(student, optimizer, before) -> None:
    """Each element kept its moment: (weight, moment) pairs after the prune are among those before it.

    weight x first moment is compared, which the folded attention scale leaves as it was.
    """
    for name, parameter in student.named_parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        assert moment.shape == parameter.shape == optimizer.state[parameter]["exp_avg_sq"].shape
        weight, past = before[name]
        ours = (parameter * moment).detach().double().flatten()
        theirs = (weight * past).double().flatten().sort().values
        right = torch.searchsorted(theirs, ours).clamp(max=len(theirs) - 1)
        nearest = torch.minimum((theirs[right] - ours).abs(), (theirs[(right - 1).clamp(min=0)] - ours).abs())
        assert (nearest <= 1e-6 * ours.abs() + 1e-12).all(), name


def taylor(teacher: BertForMaskedLM, batch, neurons: int = 3, epsilon: float = 1e-4) -> None:
    """6. A neuron's score is how fast the loss rises when all it owns is scaled a little against its interest.

    Measured in float64: element theta is scaled by 1 + eps * sign(theta * gradient), which a first-order
    expansion says raises the loss by eps * |theta * gradient|.
    """
    # Not the teacher itself: there every distillation term is 0 and so is its gradient.
    model, teacher = copy.deepcopy(teacher).double(), teacher.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    loss = loss_for(teacher).double()
    backward(model, teacher, batch, loss)
    scorer = hdlib.scorer("sensitivity")
    scorer.update(model)
    signs = {name: (p.detach() * p.grad).sign() for name, p in model.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for group in hdlib.width_groups(model).values():
        for neuron in torch.linspace(0, group.size - 1, neurons).long().unique().tolist():
            losses = []
            for direction in (1, -1):
                _scale_neuron(model, group, neuron, weights, signs, direction * epsilon)
                losses.append(backward(model, teacher, batch, loss).item())
            slope = (losses[0] - losses[1]) / (2 * epsilon)
            score = scorer.scores()[group.name][neuron].item()
            assert abs(slope - score) <= 1e-3 * abs(score) + 1e-7, (group.name, neuron, slope, score)


@torch.no_grad()
def _scale_neuron(model, group, neuron, weights, signs, epsilon) -> None:
    for name, parameter in model.named_parameters():
        owned = torch.zeros_like(parameter, dtype=torch.bool)
        for member, axis in group.members:
            if member == name:
                owned.index_fill_(axis, torch.tensor([neuron]), True)
        parameter.copy_(weights[name] * (1 + epsilon * signs[name] * owned))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the size of what is compared."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))
