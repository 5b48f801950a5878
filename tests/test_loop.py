"""The whole loop on a small task: widths, records, resume, divergence, processes, the command."""

import itertools
import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import hdlib
import hdlib.__main__
import hdlib.training
from hdlib import DistillConfig, Widths
from hdlib.data import Blocks
from hdlib.losses import TERMS

from conftest import ARGUMENTS, full
from models import random_model

STATES = ("hidden", "attention", "embedding")


@pytest.fixture
def config():
    return DistillConfig(**ARGUMENTS)


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.student_folder / "model.safetensors")


def test_a_run_from_start_to_end(teacher, tokenizer, blocks, config, tmp_path):
    seen = []
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    run = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path, on_step=seen.append)
    metrics = hdlib.Run.load(tmp_path).metrics

    assert list(metrics.index) == list(range(25)) and seen == run.records()
    # The student starts as the teacher: no discrepancy, and all distillation terms are 0 at the first step.
    assert metrics.loc[0, "held_out_kl"] == 0.0 and metrics.loc[0, "held_out_agreement"] == 1.0
    assert all(metrics.loc[1, term] == 0.0 for term in TERMS[1:])
    assert all(metrics.loc[24, term] > 0.0 for term in TERMS)
    # Widths never rise, each is that of the schedule, and the last is the target.
    target = Widths.at(teacher, 0.5)
    for step, row in metrics.iterrows():
        expected = config.widths_at(step, teacher, target)
        assert (row["hidden_size"], row["intermediate_size"]) == (expected.hidden, expected.ffn)
    assert metrics["hidden_size"].is_monotonic_decreasing and set(metrics["hidden_size"]) == {24, 18, 12}
    assert metrics["hidden_size"].iloc[-1] == 12 and metrics["intermediate_size"].iloc[-1] == 28
    assert metrics.loc[:1, "hidden_size"].eq(24).all(), "no prune before the start"
    # The student has the target widths, and the teacher has not changed.
    student, its_tokenizer = run.student()
    assert Widths.of(student) == target and its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert all(torch.equal(before[name], parameter) for name, parameter in teacher.named_parameters())
    assert teacher.config._attn_implementation == "sdpa"
    assert [path.name for path in run.checkpoints()] == ["step_00000015", "step_00000020"]
    assert run.arguments["config"] == json.loads(json.dumps(config.to_dict()))
    assert DistillConfig(**run.arguments["config"]) == config


@pytest.mark.parametrize(("weights", "share"), [({}, 1.0), *full((dict.fromkeys(("mlm", *STATES), 0.0), 0.5))])
def test_distillation_learns(weights, share, teacher, tokenizer, blocks, tmp_path):
    """A trained student is closer to the teacher than a narrowed one, much closer if KL is the only term."""
    config = DistillConfig(**ARGUMENTS | {"steps": 120, "eval_every": 120, "checkpoint_every": 120} | weights)
    run = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)
    bare = hdlib.models.student_of(teacher)
    hdlib.narrow(bare, Widths.at(teacher, 0.5))
    untrained = hdlib.discrepancy(bare, teacher, blocks[1].take(8))["kl"]
    assert run.metrics["held_out_kl"].iloc[-1] < share * untrained


def test_arrays_and_paths_in_the_home_directory(teacher, tokenizer, blocks, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    train, validation = (np.array(part["input_ids"]) for part in blocks)  # (N, S)
    validation = Blocks(validation, np.array(blocks[1]["labels"]))
    config = DistillConfig(**ARGUMENTS | {"steps": 4})
    run = hdlib.distill(*hdlib.load_teacher("~/teacher"), train, validation, config, "~/run")
    assert run.folder == tmp_path / "run"
    expected = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "expected")
    assert run.metrics["total"].equals(expected.metrics["total"])


def test_ratio_one_prunes_nothing(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"steps": 4, "target": 1.0})
    run = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)
    assert Widths.of(run.student()[0]) == Widths.of(teacher)


def test_intermediate_widths_are_multiples_too(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"multiple_of": 8, "steps": 12})
    widths = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path).metrics["intermediate_size"]
    assert widths.nunique() > 2 and all(width % 8 == 0 for width in widths.iloc[1:])


def test_one_shot_prunes_once(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"schedule": "one_shot", "prune_start": 0.25})
    metrics = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path).metrics
    assert metrics["hidden_size"].tolist() == [24] * 6 + [12] * 19


def test_heads_instead_of_head_dimensions(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"target": {"hidden": 12, "ffn": 28, "heads": 2, "head_dim": 6}})
    student, _ = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path).student()
    assert Widths.of(student) == Widths(12, 28, 6, 2, 2)


def test_a_finished_run_is_not_repeated(teacher, tokenizer, blocks, config, whole_run):
    expected = weights(whole_run)
    again = hdlib.distill(teacher, tokenizer, *blocks, config, whole_run.folder, resume=True, on_step=pytest.fail)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(again).items())


def test_the_student_has_a_model_card(teacher, whole_run):
    run = whole_run
    card = ModelCard.load(run.student_folder / "README.md")
    assert card.data.pipeline_tag == "fill-mask" and card.data.library_name == "transformers"
    last = run.metrics.iloc[-1]
    student, _ = run.student()
    parameters = f"| parameters | {student.num_parameters():,} | {teacher.num_parameters():,} |"
    measured = (f"{last['held_out_kl']:.3f} nats", f"| accuracy | {last['held_out_accuracy']:.3f} |")
    for fact in (parameters, "hidden=12, ffn=28", "24 steps of 8 blocks, 3,072 tokens", *measured):
        assert fact in card.text
    assert "None" not in card.content and "nan" not in card.content


@pytest.mark.parametrize("killed_at", [1, 5, 13, *full(7, 10, 23)])
def test_a_resumed_run_equals_an_uninterrupted_one(teacher, tokenizer, blocks, config, tmp_path, killed_at, whole_run):
    def kill(record):
        if record["step"] == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", on_step=kill)
    resumed = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", resume=True)
    expected, got = weights(whole_run), weights(resumed)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in got)
    clocks = ["seconds", "elapsed"]
    assert resumed.metrics.drop(columns=clocks).equals(whole_run.metrics.drop(columns=clocks))


def test_a_broken_checkpoint_is_skipped(teacher, tokenizer, blocks, config, tmp_path, whole_run):
    def kill(record):
        if record["step"] == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", on_step=kill)
    newest = hdlib.Run.load(tmp_path / "killed").checkpoints()[-1] / "training.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    resumed = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", resume=True)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole_run).items())


def test_a_loss_that_turns_nan_stops_the_run(teacher, tokenizer, blocks, config, tmp_path, monkeypatch):
    attention, calls = hdlib.losses.ScoreDifference.apply, []

    def poisoned(*arguments):
        calls.append(None)
        # Two layers per step: the attention term is nan from step 12 on.
        return attention(*arguments) * (math.nan if len(calls) > 22 else 1.0)

    monkeypatch.setattr(hdlib.losses.ScoreDifference, "apply", poisoned)
    with pytest.raises(hdlib.Diverged, match=r"step 12: attention is nan.*step_00000010"):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)
    run = hdlib.Run.load(tmp_path)
    assert run.records()[-1]["step"] == 11 and not run.finished
    checkpoint = load_file(run.checkpoints()[-1] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.values())
    monkeypatch.undo()
    assert hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path, resume=True).finished


def test_a_gradient_that_turns_nan_stops_the_run(teacher, tokenizer, blocks, config, tmp_path, monkeypatch):
    state_loss = hdlib.losses.state_loss

    def poisoned(student, target, mask=None):
        return state_loss(student, target, mask) + torch.sqrt((student.sum() - student.sum()).abs())

    monkeypatch.setattr(hdlib.losses, "state_loss", poisoned)
    with pytest.raises(hdlib.Diverged, match=r"step 1: gradient norm is nan.*no checkpoint yet"):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)


def test_a_learning_rate_that_is_too_high_stops_the_run(teacher, tokenizer, blocks, tmp_path):
    """The message names the step, and the record holds finite numbers only."""
    config = DistillConfig(**ARGUMENTS | {"learning_rate": 1e30, "warmup": 0.0, "eval_every": 1})
    with pytest.raises(hdlib.Diverged, match=r"step \d+: .* is (nan|inf|-inf).*learning_rate"):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)
    assert all(math.isfinite(value) for record in hdlib.Run.load(tmp_path).records() for value in record.values())


def test_bfloat16_trains_float32_weights(teacher, tokenizer, blocks, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"precision": "bfloat16", "steps": 6})
    run = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    assert run.metrics["total"].iloc[-1] > 0


def with_unequal_labels(tokenizer, blocks) -> Blocks:
    """Training blocks of which every other one is mostly unknown tokens, and so has fewer labels, or none."""
    input_ids = blocks[0].take(64).with_format("torch")[:]["input_ids"].clone()
    input_ids[::2, 3:-1] = tokenizer.unk_token_id
    input_ids[::4, 1:-1] = tokenizer.unk_token_id
    return Blocks(input_ids)


def test_micro_batches_with_unequal_numbers_of_labels(teacher, tokenizer, blocks, tmp_path):
    """Their losses and gradients are those of the whole batch."""
    train, runs = with_unequal_labels(tokenizer, blocks), {}
    for size in (0, 1, 3):
        config = DistillConfig(**ARGUMENTS | {"steps": 4, "micro_batch_size": size})
        runs[size] = hdlib.distill(teacher, tokenizer, train, blocks[1], config, tmp_path / str(size))
    assert runs[0].kept == runs[1].kept == runs[3].kept
    for column in ("total", *TERMS, "gradient_norm", "held_out_kl"):
        whole = runs[0].metrics[column].dropna().tolist()
        for size in (1, 3):
            assert runs[size].metrics[column].dropna().tolist() == pytest.approx(whole, rel=1e-3, abs=1e-6), column


@pytest.mark.parametrize("terms", [{}, {"hidden": 0.0, "attention": 0.0, "embedding": 0.0}])
def test_a_batch_without_a_label_does_not_end_the_run(teacher, tokenizer, blocks, tmp_path, terms):
    """Its terms over labels are not logged: they have no value."""
    train = with_unequal_labels(tokenizer, blocks)
    unknown = Blocks(train[::4]["input_ids"])
    config = DistillConfig(**ARGUMENTS | {"steps": 4, "batch_size": 4} | terms)
    run = hdlib.distill(teacher, tokenizer, unknown, blocks[1], config, tmp_path)
    assert run.finished and not {"mlm", "prediction"} & set(run.metrics) and {"total"} <= set(run.metrics)


@pytest.mark.full  # test_processes compares the runs of one process and of several, without the launcher
@pytest.mark.parametrize(
    "name, options, processes",
    [
        ("bert", {"micro_batch_size": 3}, (1, 2)),
        ("qwen3", {"causal": True, "recover": True}, (1, 2)),
    ],
)
def test_the_command_in_one_process_and_in_several(tmp_path, tokenizer, text_file, name, options, processes):
    """Several processes keep the same neurons as one at every prune, log its losses and end with its weights.

    A part of the text is in a script that the tokenizer does not know, so that blocks have unequal numbers of labels.
    """
    unknown = "\n\n".join(["мир труд май " * 40] * 30)
    (tmp_path / "corpus.txt").write_text(f"{text_file.read_text()}\n\n{unknown}")
    random_model(name, vocabulary=len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    results = []
    for count in processes:
        places = {"teacher": str(tmp_path / "teacher"), "corpus": str(tmp_path / "corpus.txt"), "length": 16}
        places["run_dir"] = str(tmp_path / f"run_{count}")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(ARGUMENTS | places | options))
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [sys.executable, "-m", *launch, "-m", "hdlib", str(tmp_path / "config.yaml")]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(hdlib.Run.load(places["run_dir"]))
    assert [run.description["processes"] for run in results] == [*processes]
    one, *others = results
    for several in others:
        assert one.metrics["intermediate_size"].equals(several.metrics["intermediate_size"])
        assert one.kept == several.kept
        for term in ("total", "mlm", "prediction", "hidden", "attention", "embedding"):
            assert several.metrics[term].dropna().tolist() == pytest.approx(
                one.metrics[term].dropna().tolist(), rel=1e-3
            )
        for weight, tensor in weights(one).items():
            torch.testing.assert_close(weights(several)[weight], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: 3e-4\nrun_dir: r\n", "steps must be of type int"),
        ("step: 3\nrun_dir: r\n", "unknown arguments step"),
        ("steps: 3\n", "run_dir is missing"),
        ("corpus: nowhere/at/all\nrun_dir: r\n", "no file or folder nowhere/at/all"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, monkeypatch, text, message):
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["hdlib", str(tmp_path / "config.yaml")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        hdlib.__main__.main()
    assert not (tmp_path / "r").exists()


def test_a_prune_of_a_student_that_has_not_moved_warns(teacher, tokenizer, blocks, tmp_path):
    """Without labels and weight decay no gradient moves it before the first prune: nothing ranks its neurons."""
    still = ARGUMENTS | {"steps": 4, "mlm": 0.0, "weight_decay": 0.0, "eval_every": 4}
    with pytest.warns(UserWarning, match="step 2: all scores are 0.*scorer='magnitude'"):
        hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**still), tmp_path / "still")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**still | {"mlm": 1.0}), tmp_path / "moved")


@pytest.mark.parametrize("norm, moves", [(1e-10, False), (1e9, True)])
def test_gradients_are_clipped_to_the_norm(norm, moves, teacher, tokenizer, blocks, tmp_path):
    """A gradient far below the epsilon of Adam moves nothing."""
    settings = {"steps": 3, "target": 1.0, "weight_decay": 0.0, "max_grad_norm": norm, "eval_every": 3}
    student, _ = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS | settings), tmp_path).student()
    before, after = teacher.get_input_embeddings().weight, student.get_input_embeddings().weight
    assert bool((after - before).abs().max() > 1e-5) == moves


def test_measures_at_a_prune_cost_a_step_no_seconds(teacher, tokenizer, blocks, tmp_path, monkeypatch):
    clock, measure = itertools.count(), hdlib.training.discrepancy

    def slow(*arguments, **options):
        list(itertools.islice(clock, 1000))  # seconds
        return measure(*arguments, **options)

    monkeypatch.setattr("hdlib.training.perf_counter", lambda: next(clock))
    monkeypatch.setattr("hdlib.training.discrepancy", slow)
    config = DistillConfig(**ARGUMENTS | {"steps": 6, "eval_prunes": True, "eval_every": 6})
    run = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path)
    assert run.pruned_at and run.metrics["seconds"].max() < 100


def test_kept_neurons_are_those_of_the_teacher_after_several_prunes(teacher, tokenizer, blocks, tmp_path):
    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "steps": 8, "prune_every": 1, "eval_every": 8}
    run = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS | still), tmp_path)
    assert len(run.pruned_at) > 2
    wide, narrow = (model.get_input_embeddings().weight for model in (teacher, run.student()[0]))
    assert torch.allclose(narrow, wide[:, run.kept["hidden"]], atol=1e-6)
