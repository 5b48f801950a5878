"""Held-out measures against NumPy; figures of recorded runs."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import concatenate_datasets

import hdlib
from hdlib import Widths
from hdlib.data import Blocks
from hdlib.discrepancy import TOKENS_PER_NEURON, _LinearFit

from conftest import random_bert


def test_identical_models_have_no_discrepancy(teacher, blocks):
    measured = hdlib.discrepancy(hdlib.models.student_of(teacher), teacher, blocks[1].take(20))
    assert measured["kl"] == measured["kl_standard_error"] == 0.0 and not measured.kl_of_blocks.any()
    assert measured["agreement"] == 1.0 and measured["hidden"] < 1e-9
    assert measured["mlm"] == measured["teacher_mlm"] > 0


def test_measures_agree_with_numpy(tokenizer, blocks):
    teacher = random_bert(vocabulary=len(tokenizer))
    student = random_bert(vocabulary=len(tokenizer), heads=2, ffn=9, seed=3)
    held_out = blocks[1].take(21)
    measured = hdlib.discrepancy(student, teacher, held_out, batch_size=4)
    input_ids, labels = torch.tensor(held_out["input_ids"]), np.array(held_out["labels"])
    labelled = labels != -100
    with torch.no_grad():
        outputs = [model(input_ids, output_hidden_states=True) for model in (student, teacher)]
    log_q, log_p = (output.logits.log_softmax(-1).double().numpy()[labelled] for output in outputs)
    rows = np.arange(len(log_p))
    assert measured["kl"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-4)
    assert measured["agreement"] == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert measured["accuracy"] == pytest.approx((log_q.argmax(-1) == labels[labelled]).mean())
    assert measured["teacher_accuracy"] == pytest.approx((log_p.argmax(-1) == labels[labelled]).mean())
    assert measured["mlm"] == pytest.approx(-log_q[rows, labels[labelled]].mean(), rel=1e-4)
    assert measured["teacher_mlm"] == pytest.approx(-log_p[rows, labels[labelled]].mean(), rel=1e-4)
    errors, shares = [], []
    for x, y in zip(*(output.hidden_states[1:] for output in outputs), strict=True):
        x, y = x.double().numpy(), y.double().numpy()
        fitted, (x, y) = [each[::2].reshape(-1, each.shape[-1]) for each in (x, y)], (x[1::2], y[1::2])
        errors.append(((x @ np.linalg.lstsq(*fitted, rcond=None)[0] - y) ** 2).mean())
        shares.append(errors[-1] / (y**2).mean())
    assert measured["hidden"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert [measured["hidden_1"], measured["hidden_2"]] == pytest.approx(shares, rel=1e-4)
    of_tokens = np.zeros(labelled.shape)
    of_tokens[labelled] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    of_blocks = of_tokens.sum(1) / labelled.sum(1)
    np.testing.assert_allclose(measured.kl_of_blocks, of_blocks, rtol=1e-4)
    standard_error = of_blocks.std(ddof=1) / len(of_blocks) ** 0.5  # all blocks have equally many labels
    assert measured["kl_standard_error"] == pytest.approx(standard_error, rel=1e-3)


def test_the_fit_of_hidden_states_is_measured_on_other_tokens():
    states, targets = torch.randn(2, 40, 50, 36, generator=torch.Generator().manual_seed(0)).unbind()
    for width in (4, 36):
        fit, real = _LinearFit(), torch.ones(40, 50, dtype=torch.bool)
        for read in range(0, 40, 5):  # an odd batch: which blocks are fitted does not depend on it
            fit.add(states[read : read + 5, :, :width], targets[read : read + 5], real[read : read + 5], read)
        whole = _LinearFit()
        whole.add(states[..., :width], targets, real, 0)
        assert fit.errors()[1] > 1.0, "unrelated states predict nothing, at any width"
        assert fit.errors() == pytest.approx(whole.errors(), rel=1e-12)


def test_hidden_states_of_too_few_tokens_are_not_measured(tokenizer, blocks):
    teacher = random_bert(vocabulary=len(tokenizer))
    student = random_bert(vocabulary=len(tokenizer), seed=3)
    enough = TOKENS_PER_NEURON * student.config.hidden_size // 16 * 2  # blocks of 16 tokens, half of them fitted
    for count, there in ((1, False), (enough - 2, False), (enough, True)):
        measured = hdlib.discrepancy(student, teacher, blocks[1].take(count))
        assert ("hidden" in measured, "hidden_1" in measured) == (there, there)
        assert ("kl_standard_error" in measured) == (count > 1) and len(measured.kl_of_blocks) == count


def test_blocks_with_unequal_numbers_of_labels_count_by_their_tokens(teacher, blocks):
    held_out = blocks[1].take(6).with_format("torch")[:]
    labels = held_out["labels"].clone()
    labels[0] = -100
    labels[1, :8] = -100
    student = random_bert(vocabulary=teacher.config.vocab_size, seed=1)
    measured = hdlib.discrepancy(student, teacher, Blocks(held_out["input_ids"], labels), batch_size=4)
    counts = (labels != -100).sum(1)
    assert counts.unique().numel() > 2 and measured.kl_of_blocks.isnan().tolist() == [True] + 5 * [False]
    weighted = (measured.kl_of_blocks.nan_to_num() * counts).sum() / counts.sum()
    assert measured["kl"] == pytest.approx(float(weighted), rel=1e-9)


def test_models_keep_their_mode(teacher, blocks):
    student = hdlib.models.student_of(teacher).train()
    measured = hdlib.discrepancy(student, teacher, blocks[1].take(4))
    assert student.training and not teacher.training and measured["kl"] == 0.0


def test_states_that_are_not_finite_give_nan(teacher, blocks):
    student = hdlib.models.student_of(teacher)
    student.bert.encoder.layer[1].output.dense.bias.data[0] = float("inf")
    measured = hdlib.discrepancy(student, teacher, blocks[1].take(20))
    assert np.isnan(measured["hidden"]) and np.isnan(measured["kl"])


def test_blocks_without_labels_are_refused(teacher, blocks):
    none = blocks[1].take(2).map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="no labelled position"):
        hdlib.discrepancy(teacher, teacher, none)


def test_a_batch_without_labels_among_others_does_not_count(teacher, blocks):
    labelled = blocks[1].take(2)
    none = labelled.map(lambda row: {"labels": [-100] * len(row["labels"])})
    student = random_bert(vocabulary=teacher.config.vocab_size, seed=1)
    expected = hdlib.discrepancy(student, teacher, labelled, batch_size=2)
    found = hdlib.discrepancy(student, teacher, concatenate_datasets([labelled, none]), batch_size=2)
    for name in ("kl", "agreement", "mlm", "teacher_mlm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tokenizer, blocks):
    teacher, folder = random_bert(vocabulary=len(tokenizer)), tmp_path_factory.mktemp("run")
    config = hdlib.DistillConfig(
        steps=12, batch_size=4, target=0.5, prune_every=2, eval_every=3, eval_blocks=4, precision="float32"
    )
    return hdlib.distill(teacher, tokenizer, *blocks, config, folder)


def test_figures_show_what_was_recorded(recorded):
    metrics = recorded.metrics
    upper, lower = hdlib.lab.plot_discrepancy(recorded).axes
    measured = metrics["held_out_kl"].dropna()
    assert upper.lines[0].get_xdata().tolist() == [0, 3, 6, 9, 12]
    np.testing.assert_array_equal(upper.lines[0].get_ydata(), measured)
    steps, widths = lower.lines[0].get_data()  # where the width changes, and the end
    np.testing.assert_array_equal(pd.Series(widths, steps).reindex(metrics.index).ffill(), metrics["hidden_size"])
    assert lower.get_xlim() == (0, 12)
    (axes,) = hdlib.lab.plot_losses(recorded).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == 5 and axes.get_yscale() == "log"
    assert upper.get_legend() is None


def test_figures_of_a_run_without_records(tmp_path):
    run = hdlib.Run.start(tmp_path, {"config": {"steps": 10}})
    for figure in (hdlib.lab.plot_discrepancy(run), hdlib.lab.plot_losses(run)):
        assert "nothing recorded yet" in [text.get_text() for text in figure.axes[0].texts]


def test_the_live_figure_is_updated_during_the_run(recorded, monkeypatch):
    drawn = []

    class Handle:
        def update(self, figure):
            drawn.append(figure)

    def display(figure, display_id):
        drawn.append(figure)
        return Handle()

    monkeypatch.setitem(hdlib.lab.LiveFigure.draw.__globals__, "display", display)
    live = hdlib.lab.LiveFigure(recorded.folder, every=0.0)
    for record in recorded.records():
        live(record)
    assert len(drawn) == 5, "once for every held-out measure"
    patient = hdlib.lab.LiveFigure(recorded.folder, every=1000.0)
    for record in recorded.records():
        patient(record)
    assert len(drawn) == 6, "not before `every` seconds"


def test_cost_counts_and_times(teacher):
    student = hdlib.models.student_of(teacher)
    hdlib.narrow(student, Widths(hidden=12, ffn=28))
    assert hdlib.lab.cost.parameters(teacher)["total"] == teacher.num_parameters()
    layer = teacher.bert.encoder.layer
    assert hdlib.lab.cost.parameters(teacher)["encoder"] == sum(p.numel() for p in layer.parameters())
    times = hdlib.lab.cost.latency({"teacher": teacher, "student": student}, length=16, repeats=3)
    assert set(times) == {"teacher", "student"} and min(times.values()) > 0
