"""Eight invariants of the library, one function each; they raise AssertionError.

`test_invariants.py` runs them on many models. `test_teeth.py` checks that each fails when the library is broken. The
last two concern whole runs, which `test_loop.py` tests; here the loop's own state makes one training step before a
prune and one after it, which is cheap enough for every family and shape.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import hdlib
from hdlib import DistillationLoss, DistillConfig, Widths
from hdlib.data import TrainingBatches
from hdlib.lab.cost import placeholder_tokenizer
from hdlib.models import forward
from hdlib.precision import cast_once, recompute_casts
from hdlib.training import Training
from hdlib.widths import new_numbers, renumbered

from models import VOCABULARY
from reference import Doubles, without_layers, zeroed


def loss_for(model, **options) -> DistillationLoss:
    config = model.config
    return DistillationLoss(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, **options)


def total_loss(teacher, batch, loss=None, layers=None) -> Callable[[PreTrainedModel], torch.Tensor]:
    """The loss of a student on a batch, with all terms, as a function of the student."""
    input_ids, labels = batch
    loss = loss or loss_for(teacher).to(teacher.dtype)
    positions = loss.loss_positions(labels)
    with torch.no_grad():
        teacher_outputs = forward(teacher, input_ids, positions, layers=layers)
    return lambda student: loss(forward(student, input_ids, positions), teacher_outputs, labels).total


def backward(model, teacher, batch, loss=None, layers=None) -> None:
    """One backward pass of the total loss."""
    total_loss(teacher, batch, loss, layers)(model).backward()


def sensitivities(model, batch) -> dict[str, torch.Tensor]:
    """Scores of a copy of the model with perturbed weights, so that every loss term has a gradient."""
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    backward(student, model, batch)
    scorer = hdlib.scorer("sensitivity")
    scorer.update(student)
    return scorer.scores()


def eight(teacher: PreTrainedModel, widths: Widths, batch, folder: Path) -> None:
    """All eight on one model and one shape.

    Those with a tolerance run in float64: a norm over a few random coordinates can be ill-conditioned.
    """
    identity(teacher, batch)
    stock(teacher, widths, batch, folder)
    asked_is_got(teacher, widths, batch)
    live_optimizer(teacher, [widths], batch)
    resume(teacher, widths, batch, folder)
    with Doubles():
        teacher = copy.deepcopy(teacher).double()
        mask_equals_narrow(teacher, widths, batch, 1e-9)
        taylor(teacher, batch, neurons=1)
        processes(teacher, widths, batch)


def identity(teacher: PreTrainedModel, batch) -> None:
    """1. A student at ratio 1 has exactly its teacher's logits; every distillation term and its gradient is 0."""
    input_ids, labels = batch
    for precision in ("float32", "bfloat16"):
        student, loss = hdlib.models.student_of(teacher), loss_for(teacher, mlm=0.0)
        hdlib.narrow(student, Widths.at(student, 1.0))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"), recompute_casts(student):
            with torch.no_grad():
                expected = forward(cast_once(teacher, precision), input_ids)
            outputs = forward(student, input_ids)
            assert torch.equal(outputs.logits, expected.logits), precision
            terms = loss(outputs, expected, labels)
            assert loss_for(teacher)(outputs, expected, labels).mlm.item() > 0
        assert {*map(float, terms.named().values())} == {0.0} and len(terms.named()) == 5, (precision, terms)
        terms.total.backward()
        for name, parameter in [*student.named_parameters(), *loss.named_parameters()]:
            assert parameter.grad is None or not parameter.grad.any(), (precision, name)


def mask_equals_narrow(teacher: PreTrainedModel, widths: Widths, batch, tolerance: float = 1e-5) -> None:
    """2. The masked wide model and the narrowed one have the same logits, hidden states and attention scores."""
    student = copy.deepcopy(teacher)
    kept = hdlib.narrow(student, widths, sensitivities(teacher, batch))
    input_ids, _ = batch
    with torch.no_grad():
        got = forward(student, input_ids)
        with zeroed(copy.deepcopy(teacher), kept) as wide:
            expected = forward(without_layers(wide, kept["layers"].tolist()), input_ids)
    assert student.config.hidden_size < teacher.config.hidden_size or widths.hidden == teacher.config.hidden_size
    close(got.logits, expected.logits, tolerance)
    for narrow, wide in zip(got.hidden_states, expected.hidden_states, strict=True):
        narrowed = "hidden" in kept and wide.shape[-1] == teacher.config.hidden_size
        close(narrow, wide[..., kept["hidden"]] if narrowed else wide, tolerance)
    for layer, (narrow, wide) in enumerate(zip(got.attentions, expected.attentions, strict=True)):
        wide = wide.of_heads(kept[f"layer.{kept['layers'][layer]}.heads"])
        attended = torch.ones_like(narrow.scores()).bool() if narrow.attended is None else narrow.attended
        close(narrow.scores().where(attended, 0.0), wide.scores().where(attended, 0.0), tolerance)


def stock(teacher: PreTrainedModel, widths: Widths, batch, folder: Path) -> None:
    """3. The saved student is a stock checkpoint: same logits, the parameter count of its config, ties kept."""
    student = hdlib.models.student_of(teacher)
    hdlib.narrow(student, widths, sensitivities(teacher, batch))
    opens_stock(student, teacher, batch, folder)


def opens_stock(student: PreTrainedModel, teacher: PreTrainedModel, batch, folder: Path) -> None:
    student.save_pretrained(folder)
    auto_class = AutoModelForMaskedLM if "MaskedLM" in type(teacher).__name__ else AutoModelForCausalLM
    loaded, report = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        close(loaded.eval()(batch[0]).logits, student(batch[0]).logits)
    assert "hdlib" not in (folder / "config.json").read_text()
    tied = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    for model in (student, loaded):
        assert model.num_parameters() == type(teacher)(loaded.config).num_parameters()
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def asked_is_got(teacher: PreTrainedModel, widths: Widths, batch) -> None:
    """4. The given widths are those of the config, of every weight and of the outputs."""
    student = hdlib.models.student_of(teacher)
    kept = hdlib.narrow(student, widths, sensitivities(teacher, batch))
    assert Widths.of(student) == widths
    inside, shared_by = widths.heads * widths.head_dim, _query_heads_to_a_key(student)
    sizes = {"hidden": widths.hidden, "ffn": widths.ffn, "heads": widths.heads}
    sizes |= {"query_key": inside, "value_output": inside, "head_groups": widths.heads // shared_by}
    for name, group in hdlib.width_groups(student).items():
        assert group.size == len(kept[name]) == sizes[group.kind], name
    with torch.no_grad():
        output = forward(student, batch[0])
    assert all(states.shape[-1] == widths.hidden for states in output.hidden_states[:-1])
    last = student.config.word_embed_proj_dim if student.config.model_type == "opt" else widths.hidden
    assert output.hidden_states[-1].shape[-1] == last
    assert len(output.attentions) == widths.layers == len(kept["layers"]) and kept["layers"][0] == 0
    for layer, recorded in enumerate(output.attentions):
        assert recorded.scores().shape[1] == widths.heads == len(kept[f"layer.{layer}.heads"])
        if hasattr(recorded, "query"):
            assert recorded.query.shape[1::2] == (widths.heads, widths.head_dim)
    assert all((indices.diff() > 0).all() for indices in kept.values())


def _query_heads_to_a_key(model: PreTrainedModel) -> int:
    return model.config.num_attention_heads // (
        getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    )


def live_optimizer(teacher: PreTrainedModel, shapes: list[Widths], batch, after_each=lambda student: None) -> None:
    """5. After each prune every parameter is in the optimiser once, with its moments, and changes at the next step."""
    student = hdlib.models.student_of(teacher)
    loss, layers = loss_for(teacher), torch.arange(teacher.config.num_hidden_layers)
    optimizer = torch.optim.AdamW([*student.parameters(), *loss.parameters()], lr=1e-3, weight_decay=0.0)
    for widths in shapes:
        backward(student, teacher, batch, loss, layers.tolist())
        optimizer.step()
        unused = {name for name, parameter in loss.named_parameters() if parameter.grad is None}
        used = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
        before = {name: _products(student.get_parameter(name), optimizer) for name in used}
        scorer = hdlib.scorer("sensitivity")
        scorer.update(student)
        optimizer.zero_grad()
        kept = hdlib.narrow(student, widths, scorer.scores(), optimizer)
        loss.narrow(kept, optimizer)
        layers, numbers = layers[kept["layers"]], new_numbers(kept)
        used, before = {*renumbered(dict.fromkeys(used), numbers)}, renumbered(before, numbers)
        last = len(layers) - 1
        unused = {f"hidden_projections.{last}"} if unused else unused
        trained = [*student.parameters(), *loss.parameters()]
        held = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        assert held == Counter(id(parameter) for parameter in trained)
        idle = {parameter for name, parameter in student.named_parameters() if name not in used}
        idle |= {parameter for name, parameter in loss.named_parameters() if name in unused}
        assert len(idle) <= 1, "unused: one bias of an untied BERT, or the last projection of a projected OPT"
        assert set(optimizer.state) == set(trained) - idle, "state of removed parameters, or state that was lost"
        for name, products in before.items():
            for now, earlier in zip(_products(student.get_parameter(name), optimizer), products, strict=True):
                assert are_among(now, earlier), name
        now = {name: student.get_parameter(name).detach().clone() for name in used}
        backward(student, teacher, batch, loss, layers.tolist())
        optimizer.step()
        still = [name for name, weight in now.items() if torch.equal(student.get_parameter(name), weight)]
        assert not still, f"these did not change: {still}"
        optimizer.zero_grad()
        after_each(student)


def _products(parameter, optimizer) -> list[torch.Tensor]:
    """Of each weight with its moments; they do not depend on the attention scale folded into the queries."""
    state, weight = optimizer.state[parameter], parameter.detach().double()
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape
    return [weight * state["exp_avg"], weight.square() * state["exp_avg_sq"]]


def are_among(products: torch.Tensor, earlier: torch.Tensor) -> bool:
    """Whether each number is one of the earlier ones: every element kept what belongs to it."""
    after, earlier = products.double().flatten(), earlier.double().flatten().sort().values
    right = torch.searchsorted(earlier, after).clamp(max=len(earlier) - 1)
    nearest = torch.minimum((earlier[right] - after).abs(), (earlier[(right - 1).clamp(min=0)] - after).abs())
    return bool((nearest <= 1e-6 * after.abs() + 1e-12).all())


def taylor(teacher: PreTrainedModel, batch, neurons: int = 3, epsilon: float = 1e-6) -> None:
    """6. The loss rises by eps times a neuron's score when its elements theta grow by eps * sign(theta * gradient).

    To first order, each element adds eps * |theta * gradient|. Measured by central differences in float64.
    """
    # Perturbed, since every distillation term and its gradient are 0 for the teacher itself.
    model, teacher = copy.deepcopy(teacher).double(), copy.deepcopy(teacher).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    loss = total_loss(teacher, batch)
    loss(model).backward()
    scorer = hdlib.scorer("sensitivity")
    scorer.update(model)
    scores = scorer.scores()
    signs = {name: (p.detach() * p.grad).sign() for name, p in model.named_parameters() if p.grad is not None}
    for group in hdlib.width_groups(model).values():
        for neuron in torch.linspace(0, group.size - 1, neurons).long().unique().tolist():
            losses = []
            for direction in (epsilon, -epsilon):
                with torch.no_grad(), _scaled(model, group, neuron, signs, direction):
                    losses.append(loss(model).item())
            slope = (losses[0] - losses[1]) / (2 * epsilon)
            score = scores[group.name][neuron].item()
            assert abs(slope - score) <= 1e-3 * abs(score) + 1e-7, (group.name, neuron, slope, score)


@contextmanager
def _scaled(model, group, neuron, signs, epsilon):
    """The elements of a neuron are scaled; each once, also where two of its slices cross."""
    owned = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name, *_ in group.members}
    for name, axis, start, unit in group.members:
        first = start + neuron * unit
        owned[name].index_fill_(axis, torch.arange(first, first + unit), True)
    before = {name: model.get_parameter(name).detach().clone() for name in owned if name in signs}  # the loss reads it
    for name, weight in before.items():
        model.get_parameter(name).copy_(weight * (1 + epsilon * signs[name] * owned[name]))
    yield
    for name, weight in before.items():
        model.get_parameter(name).copy_(weight)


def resume(teacher: PreTrainedModel, widths: Widths, batch, folder: Path) -> None:
    """7. A checkpoint after a prune changes nothing: the next step gives the same weights, scores and kept neurons."""
    run, training = hdlib.Run(folder / "run"), _training(teacher, widths, batch)
    _step(training, batch)
    training.prune(widths)
    run.save_checkpoint(1, training.student, placeholder_tokenizer(VOCABULARY), training.state(), keep=1)
    loaded = _training(teacher, widths, batch, run)
    assert loaded.step == 1 and loaded.kept.keys() == training.kept.keys()
    for each in (training, loaded):
        _step(each, batch)
    assert all(torch.equal(p, q) for p, q in zip(training.parameters, loaded.parameters, strict=True))
    assert all(torch.equal(indices, loaded.kept[name]) for name, indices in training.kept.items())
    scores = loaded.importance.scores()
    assert all(torch.equal(score, scores[name]) for name, score in training.importance.scores().items())


def _training(teacher, widths: Widths, batch, resumed: hdlib.Run | None = None) -> Training:
    config = DistillConfig.paper(steps=8, batch_size=len(batch[0]), target=widths, warmup=0.0, precision="float32")
    return Training.begin(teacher, widths, None, config, resumed)


def _batch(batch, rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """The part of a process, as the loop reads it."""
    return TrainingBatches(batch[0], lambda *_: batch, len(batch[0]), seed=0, share=(rank, processes))[0]


def _step(training: Training, batch) -> None:
    training.start_step(training.step + 1)
    training.forward_backward(_batch(batch))
    training.importance.update(training.student)
    training.optimizer.step()
    training.learning_rate.step()
    training.optimizer.zero_grad()


class Reduction:
    """Accelerate's `reduce` for processes that run one after another: the last one gets what all of them would."""

    def __init__(self):
        self.given: list[list[torch.Tensor]] = []  # by process

    def __call__(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        place = len(self.given[-1])
        self.given[-1].append(tensor.clone())
        return getattr(torch.stack([each[place] for each in self.given]), how)(0)


class Engine(torch.nn.Module):
    """DistributedDataParallel for processes that run one after another; `processes` averages their gradients."""

    _set_params_and_buffers_to_ignore_for_model, no_sync = staticmethod(lambda *_: None), staticmethod(nullcontext)

    def __init__(self, module, **_):
        super().__init__()
        self.forward = module.forward


def processes(teacher: PreTrainedModel, widths: Widths, batch, count: int = 2) -> None:
    """8. Several processes have one process's losses, scores and kept neurons, also with unequal labels (float64)."""
    batch = batch[0], batch[1].clone()
    batch[1][0, 2:] = -100
    start, found = copy.deepcopy(teacher), []
    with torch.no_grad():  # else every distillation term and its gradient would be 0
        for parameter in start.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    for total in (1, count):
        reduction, gradients = Reduction(), []
        state = SimpleNamespace(num_processes=total)
        engine = {"PartialState": lambda state=state: state, "reduce": reduction, "DistributedDataParallel": Engine}
        with patch.multiple("hdlib.training", **engine):
            for rank in range(total):
                reduction.given.append([])
                training = _training(teacher, widths, batch)
                training.loss.double(), training.student.load_state_dict(start.state_dict())
                terms = training.forward_backward(_batch(batch, rank, total))
                gradients.append([parameter.grad for parameter in training.parameters])
        for parameter, *each in zip(training.parameters, *gradients, strict=True):
            parameter.grad = None if any(gradient is None for gradient in each) else torch.stack(each).mean(0)
        training.importance.update(training.student)
        scores = training.importance.scores()
        training.prune(widths)
        found.append((terms, scores, training.kept))
    (terms, scores, kept), several = found
    for expected, got in ((terms, several[0]), (scores, several[1])):
        assert got.keys() - {"stop_requested"} == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(several[2][name], indices) for name, indices in kept.items())


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest expected value (at least 1)."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)
