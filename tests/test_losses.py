"""Loss terms against NumPy and automatic differentiation, and the errors of impossible arguments."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

import hdlib
from hdlib import losses
from hdlib.lab.cost import peak_memory
from hdlib.losses import QueryKey, attention_loss, mlm_loss, pairs_that_count, prediction_loss, state_loss
from hdlib.models import forward

from conftest import full, random_batch, random_bert
from invariants import close, loss_for
from models import PLAIN, VARIANTS, random_model


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_prediction_loss_is_the_mean_kl_of_teacher_from_student(temperature):
    student, teacher = torch.randn(7, 11), torch.randn(7, 11)
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    expected = (p * np.log(p / q)).sum(-1).mean() * temperature**2
    assert prediction_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert prediction_loss(teacher, teacher, temperature).item() == 0.0
    assert prediction_loss(student, teacher).item() != pytest.approx(prediction_loss(teacher, student).item(), rel=1e-3)


def test_mlm_loss_is_the_mean_negative_log_probability():
    logits, labels = torch.randn(5, 9), torch.tensor([0, 8, 3, 3, 1])
    expected = -np.log(softmax(logits.numpy())[np.arange(5), labels.numpy()]).mean()
    assert mlm_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 40, 2**19])  # one row, pieces that do not divide the rows, all rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_terms_and_their_gradients_are_those_of_automatic_differentiation(chunk, dtype, monkeypatch):
    monkeypatch.setitem(losses.PIECE, "cpu", chunk)
    teacher, labels = 3 * torch.randn(7, 11, dtype=dtype), torch.tensor([0, 10, -100, 3, 3, -100, 7])
    logits = [(3 * teacher.flip(0)).requires_grad_() for _ in range(2)]
    found = 0.3 * mlm_loss(logits[0], labels) + 0.7 * prediction_loss(logits[0], teacher, 2.0)
    log_probabilities = [torch.log_softmax(each / 2.0, -1) for each in (logits[1], teacher)]
    plain = 0.3 * functional.cross_entropy(logits[1], labels)
    plain = plain + 0.7 * 4 * functional.kl_div(*log_probabilities, reduction="batchmean", log_target=True)
    for loss in (found, plain):
        loss.backward()
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 1e-6 if dtype == torch.float32 else 1e-13}
    torch.testing.assert_close(found, plain, **tolerance)
    torch.testing.assert_close(logits[0].grad, logits[1].grad, **tolerance)


@pytest.mark.parametrize("piece", [1, 2 * 3 * 25, 2**19])
@pytest.mark.parametrize("masked", ["nothing", "the future", "padding"])
@pytest.mark.parametrize("width", [2, 4], ids=["a narrower student", "a student as wide"])
def test_score_differences_and_their_gradients_are_those_of_automatic_differentiation(
    piece, masked, width, monkeypatch
):
    monkeypatch.setitem(losses.PIECE, "cpu", piece)
    student, teacher = (
        [torch.randn(4, 5, 3, size, dtype=torch.float64).transpose(1, 2) for _ in range(2)] for size in (width, 4)
    )
    real = torch.tensor([5, 4, 5, 2])[:, None] > torch.arange(5)
    pairs = {
        "nothing": None,
        "the future": torch.ones(5, 5, dtype=torch.bool).tril()[None, None],
        "padding": pairs_that_count(None, real),
    }[masked]
    copies = [[each.clone().requires_grad_() for each in student] for _ in range(2)]
    found = losses.ScoreDifference.apply(*copies[0], *teacher, 0.5, 0.25, pairs)
    plain = attention_loss(0.5 * copies[1][0] @ copies[1][1].mT, 0.25 * teacher[0] @ teacher[1].mT, pairs)
    for loss in (0.3 * found, 0.3 * plain):
        loss.backward()
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
    for one, other in zip(*copies, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-13)
    assert losses.ScoreDifference.apply(*teacher, *teacher, 1.0, 1.0, pairs).item() == 0.0


@pytest.mark.parametrize(("width", "stored"), [(32, "gradients"), (64, "queries and keys")])
def test_score_differences_store_the_smaller_tensors_for_the_backward_pass(width, stored):
    """A narrower student's two gradients; for a student as wide, the queries and keys, which exist already."""
    student, teacher = ([torch.randn(4, 6, 64, size) for _ in range(2)] for size in (width, 64))
    found = losses.ScoreDifference.apply(*(each.requires_grad_() for each in student), *teacher, 1.0, 1.0, None)
    saved = [each for each in found.grad_fn.saved_tensors if each is not None]
    inputs = {each.data_ptr() for each in student + teacher}
    assert [each.shape[-1] for each in saved] == ([width] * 2 if stored == "gradients" else [64] * 4)
    assert {each.data_ptr() in inputs for each in saved} == {stored == "queries and keys"}


def test_a_student_that_equals_its_teacher_has_zero_gradients():
    """Exactly 0, without rounding: Adam would scale the smallest gradient up to a whole step."""
    teacher = random_bert()
    student = hdlib.models.student_of(teacher)
    input_ids, labels = random_batch()
    loss = loss_for(teacher, mlm=0.0)
    loss(forward(student, input_ids), forward(teacher, input_ids), labels).total.backward()
    for name, parameter in [*student.named_parameters(), *loss.named_parameters()]:
        assert parameter.grad is None or (parameter.grad == 0).all(), name


@pytest.mark.parametrize("piece", [1, 50, 2**19])
def test_state_differences_and_their_gradients_are_those_of_automatic_differentiation(piece, monkeypatch):
    monkeypatch.setitem(losses.PIECE, "cpu", piece)
    student, teacher = (torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(2))
    copies = [student.clone().requires_grad_() for _ in range(2)]
    found, plain = state_loss(copies[0], teacher), functional.mse_loss(copies[1], teacher)
    for loss in (0.3 * found, 0.3 * plain):
        loss.backward()
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(copies[0].grad, copies[1].grad, rtol=1e-12, atol=0)
    assert state_loss(teacher, teacher).item() == 0.0


def test_chunked_terms_store_only_the_gradient():
    """Float32 copies of all logits would need four times as much memory."""
    student, teacher = (torch.randn(64, 30522, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    labels = torch.arange(64)
    held = peak_memory(lambda: (mlm_loss(student, labels) + prediction_loss(student, teacher)).backward())
    assert held < 8 * student.nbytes, "three gradients of the logits' size, their sum, and a few chunks"


def test_padding_does_not_count():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    errors = (student - teacher).numpy() ** 2
    assert state_loss(student, teacher, mask).item() == pytest.approx(errors[mask.numpy() == 1].mean(), rel=1e-6)
    scores, targets = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    errors = (scores - targets).numpy() ** 2
    real = np.concatenate([errors[0, :, :3, :3].ravel(), errors[1, :, :2, :2].ravel()])
    assert attention_loss(scores, targets, pairs_that_count(None, mask)).item() == pytest.approx(real.mean(), rel=1e-6)


def test_the_sum_of_the_terms_by_hand():
    """Two random models; every term is recomputed from plain tensors."""
    teacher, student = random_bert(seed=0), random_bert(seed=1)
    input_ids, labels = random_batch()
    loss = loss_for(teacher, mlm=0.5, prediction=2.0, hidden=3.0, attention=0.25, embedding=4.0)
    with torch.no_grad():
        for projection in loss.parameters():
            projection.add_(0.1 * torch.randn_like(projection))
    teacher_outputs, student_outputs = forward(teacher, input_ids), forward(student, input_ids)
    terms = loss(student_outputs, teacher_outputs, labels)
    masked = labels != -100
    states = zip(student_outputs.hidden_states, teacher_outputs.hidden_states, strict=True)
    projections = [loss.embedding_projection, *loss.hidden_projections]
    errors = [((s @ w - t) ** 2).mean() for (s, t), w in zip(states, projections, strict=True)]
    attention = [
        ((s.query @ s.key.mT * s.scaling - t.query @ t.key.mT * t.scaling) ** 2).mean()
        for s, t in zip(student_outputs.attentions, teacher_outputs.attentions, strict=True)
    ]
    expected = {
        "mlm": mlm_loss(student_outputs.logits[masked], labels[masked]),
        "prediction": prediction_loss(student_outputs.logits[masked], teacher_outputs.logits[masked]),
        "hidden": sum(errors[1:]),
        "attention": sum(attention),
        "embedding": errors[0],
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(terms, name), value, rtol=1e-5, atol=1e-6)
    total = sum(loss.weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(terms.total, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])  # the second has fewer key heads than query heads
def test_recorded_scores_are_those_of_eager_attention(kind):
    """The softmax of the recorded scores equals the probabilities of eager attention."""
    model = random_model(kind)
    input_ids, _ = random_batch()
    recorded = forward(model, input_ids).attentions
    model.set_attn_implementation("eager")
    eager = model(input_ids, output_attentions=True).attentions
    for pair, probabilities in zip(recorded, eager, strict=True):
        scores = pair.scores() if pair.attended is None else pair.scores().masked_fill(~pair.attended, -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), probabilities, rtol=1e-4, atol=1e-6)


def test_the_recording_forward_handles_padding():
    model = random_bert()
    input_ids, _ = random_batch()
    mask = torch.ones_like(input_ids)
    mask[0, 10:] = 0
    expected = model(input_ids, attention_mask=mask).logits
    assert torch.equal(forward(model, input_ids, attention_mask=mask).logits, expected)
    assert not torch.allclose(forward(model, input_ids).logits[0], expected[0])


def test_logits_at_the_labels_only():
    model = random_bert()
    input_ids, labels = random_batch()
    outputs = forward(model, input_ids, labels != -100)
    assert outputs.logits.shape == (int((labels != -100).sum()), 60)
    torch.testing.assert_close(outputs.logits, model(input_ids).logits[labels != -100])
    indices = loss_for(model).loss_positions(labels)  # (N,)
    assert torch.equal(forward(model, input_ids, indices).logits, outputs.logits)
    teacher_outputs = forward(random_bert(seed=5), input_ids)
    expected = loss_for(model)(forward(model, input_ids), teacher_outputs, labels)
    for options in ({}, {"loss_positions": indices}):
        terms = loss_for(model)(outputs, teacher_outputs, labels, **options)
        torch.testing.assert_close(terms.total, expected.total)


def test_prediction_at_all_positions():
    model, teacher = random_bert(), random_bert(seed=5)
    input_ids, labels = random_batch()
    loss = loss_for(model, positions="all")
    student_outputs, teacher_outputs = forward(model, input_ids), forward(teacher, input_ids)
    expected = prediction_loss(student_outputs.logits.flatten(0, 1), teacher_outputs.logits.flatten(0, 1))
    terms = loss(student_outputs, teacher_outputs, labels)
    torch.testing.assert_close(terms.prediction, expected)
    torch.testing.assert_close(terms.mlm, mlm_loss(student_outputs.logits[labels != -100], labels[labels != -100]))


@pytest.mark.parametrize("kind", [*PLAIN, *full(*VARIANTS)])
@pytest.mark.parametrize("positions", ["masked", "all"])
def test_logits_in_pieces_change_no_number(kind, positions, monkeypatch):
    """Four positions at a time, in every family, with the backward pass; one piece has no label."""
    model, teacher = random_model(kind).double(), random_model(kind, seed=5).double()
    input_ids, labels = random_batch()
    labels[0] = -100
    found = []
    for max_logits in (losses.MAX_LOGITS, 4 * model.config.vocab_size):
        monkeypatch.setattr(losses, "MAX_LOGITS", max_logits)
        loss = loss_for(model, positions=positions, temperature=2.0).double()
        loss_positions = loss.loss_positions(labels)
        with torch.no_grad():
            teacher_outputs = forward(teacher, input_ids, loss_positions, in_pieces=True)
        student_outputs = forward(model, input_ids, loss_positions, in_pieces=True)
        assert isinstance(student_outputs.logits, torch.Tensor) == (max_logits == 2**25)
        if isinstance(student_outputs.logits, torch.Tensor):
            close(student_outputs.logits, model(input_ids).logits.flatten(0, 1)[loss_positions], 1e-12)
        model.zero_grad()
        terms = loss(student_outputs, teacher_outputs, labels)
        terms.total.backward()
        found.append(terms.named() | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, whole in found[0].items():
        close(found[1][name], whole, 1e-9)


@pytest.mark.parametrize("max_logits", [losses.MAX_LOGITS, 60])
@pytest.mark.parametrize("positions", ["masked", "all"])
def test_the_losses_of_parts_add_up_to_that_of_the_batch(positions, max_logits, monkeypatch):
    """With unequal numbers of labels, one block without any, and logits in pieces or whole."""
    monkeypatch.setattr(losses, "MAX_LOGITS", max_logits)
    teacher, input_ids, labels = random_bert(seed=1).double(), *random_batch()
    labels[0], labels[1, :8] = -100, -100
    loss, found = loss_for(teacher, positions=positions).double(), []
    for rows in ([slice(0, 3)], [slice(0, 1), slice(1, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):
        student, sums = random_bert().double(), Counter()
        for own in rows:
            read = {"positions": loss.loss_positions(labels[own]), "in_pieces": True}
            with torch.no_grad():
                expected = forward(teacher, input_ids[own], **read)
            part = {"labels_in_batch": int((labels >= 0).sum()), "share": len(labels[own]) / len(labels)}
            terms = loss(forward(student, input_ids[own], **read), expected, labels[own], **part)
            terms.total.backward()
            sums.update(terms.named())
        found.append(dict(sums) | {name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    for parts in found[1:]:
        assert parts.keys() == found[0].keys() >= {"total", "mlm", "prediction"}
        for name, whole in found[0].items():
            close(parts[name], whole, 1e-9)


def test_logits_in_pieces_are_not_stored(monkeypatch):
    """Four positions of a vocabulary of 2,048 at a time; whole logits of teacher, student and gradients are larger."""
    model = random_bert(vocabulary=2048)
    input_ids, labels = random_batch()
    loss = loss_for(model, positions="all", hidden=0, attention=0, embedding=0)

    def peak(in_pieces):
        def step():
            outputs = (forward(model, input_ids, loss.loss_positions(labels), in_pieces=in_pieces) for _ in range(2))
            loss(*outputs, labels).total.backward()

        step()  # allocates the gradients of the weights
        return peak_memory(step)

    whole = peak(False)
    monkeypatch.setattr(losses, "MAX_LOGITS", 4 * 2048)
    saved = whole - peak(True)
    assert saved > 3 * labels.numel() * 2048 * 4


def test_a_term_of_weight_zero_is_left_out():
    model, teacher = random_bert(), random_bert(seed=5)
    input_ids, labels = random_batch()
    terms = loss_for(model, attention=0, hidden=0)(forward(model, input_ids), forward(teacher, input_ids), labels)
    assert terms.attention is None and terms.hidden is None
    assert set(terms.named()) == {"total", "mlm", "prediction", "embedding"}


def test_attention_probabilities_as_the_target():
    model, teacher = random_bert(), random_bert(seed=5)
    input_ids, labels = random_batch()
    loss = loss_for(model, attention_target="probs")
    recorded = loss(forward(model, input_ids), forward(teacher, input_ids), labels).attention
    for each in (model, teacher):
        each.set_attn_implementation("eager")
    outputs = [each(input_ids, output_attentions=True, output_hidden_states=True) for each in (model, teacher)]
    torch.testing.assert_close(loss(*outputs, labels).attention, recorded, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="before the softmax"):
        loss_for(model)(*outputs, labels)


def test_empty_attentions_are_an_error_not_a_zero():
    """SDPA returns no attentions, and a zip over them would make the term 0.0 unnoticed."""
    model = random_bert()
    input_ids, labels = random_batch()
    plain = SimpleNamespace(**(dict(forward(model, input_ids)) | {"attentions": ()}))
    with pytest.raises(ValueError, match="the student gave 0"):
        loss_for(model)(plain, forward(model, input_ids), labels)


def test_no_label_is_an_error():
    model = random_bert()
    input_ids, labels = random_batch()
    output = forward(model, input_ids)
    with pytest.raises(ValueError, match="nothing was masked"):
        loss_for(model)(output, output, torch.full_like(labels, -100))


def test_projections_and_head_pairing_follow_a_prune():
    model, teacher = random_bert(heads=4, head_dim=6), random_bert(heads=4, head_dim=6)
    loss = loss_for(teacher)
    input_ids, labels = random_batch()
    kept = hdlib.narrow(model, hdlib.Widths(heads=2, head_dim=6))
    kept["layer.0.heads"] = torch.tensor([1, 3])  # pretend that these were kept
    loss.narrow(kept)
    assert loss.embedding_projection.shape == (12, 24)
    assert torch.equal(loss.embedding_projection.data, torch.eye(24)[kept["hidden"]])
    student_outputs, teacher_outputs = forward(model, input_ids), forward(teacher, input_ids)
    pairs = zip(student_outputs.attentions, teacher_outputs.attentions, ([1, 3], [0, 1]), strict=True)
    expected = sum(((s.scores() - t.scores()[:, heads]) ** 2).mean() for s, t, heads in pairs)
    torch.testing.assert_close(loss(student_outputs, teacher_outputs, labels).attention, expected)


def test_after_several_prunes_heads_are_those_of_the_teacher():
    loss = losses.DistillationLoss(8, 2, 4)
    for heads in ([[1, 3], [0, 2]], [[1], [0]]):
        named = {f"layer.{layer}.heads": torch.tensor(each) for layer, each in enumerate(heads)}
        loss.narrow(named | {"hidden": torch.arange(8), "layers": torch.arange(2)})
    assert loss.heads.tolist() == [[3], [0]]


def test_query_key_scores_are_scaled_products():
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    expected = torch.einsum("bhid,bhjd->bhij", query, key)
    torch.testing.assert_close(QueryKey(query, key).scores(), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mlm": -1.0}, "at least 0"),
        ({"mlm": 0, "prediction": 0, "hidden": 0, "attention": 0, "embedding": 0}, "not all 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"attention_target": "logits"}, "'scores' or 'probs'"),
        ({"positions": "some"}, "'masked' or 'all'"),
    ],
)
def test_impossible_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        hdlib.DistillationLoss(4, 1, 1, **options)
