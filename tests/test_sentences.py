"""Sentence encoders: invariants without a head and with padding, folders of sentence-transformers, text, measures."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import AutoModel

import hdlib
import hdlib.__main__
from hdlib import DistillationLoss, DistillConfig, Pooling, Widths
from hdlib.config import ENCODER_TERMS, PAPER
from hdlib.data import Sentences, TrainingBatches, micro_batches, sample
from hdlib.discrepancy import embedding_measures
from hdlib.downstream import load_pairs, retrieval, sts
from hdlib.lab import baselines
from hdlib.lab.export import save_sentence_encoder, to_onnx
from hdlib.losses import embedding_loss, similarity_loss
from hdlib.models import forward, student_of
from hdlib.precision import cast_once, recompute_casts
from hdlib.reconstruction import Compensation
from hdlib.rotation import rotate_heads
from hdlib.sentences import Dense, token_ids

import invariants
from conftest import full, sentences
from models import KINDS, narrower, random_encoder
from reference import Doubles, without_layers, zeroed

ENCODERS = [name for name, kind in KINDS.items() if not kind.causal] + ["qwen3", "gpt2"]
FEW = ("bert", "mpnet", "distilbert", "modernbert", "deberta-v3", "qwen3")
ARGUMENTS = {"steps": 12, "batch_size": 4, "target": 0.5, "prune_every": 2, "eval_every": 6, "eval_blocks": 12}
ARGUMENTS |= PAPER | {"checkpoint_every": 5, "learning_rate": 3e-3, "precision": "float32"}


def padded(vocabulary=60, lengths=(9, 4, 12, 7)) -> dict[str, torch.Tensor]:
    """Sentences of different lengths, (B, S) with padding."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, vocabulary, (length,), generator=generator).numpy() for length in lengths]
    return Sentences.of(rows)[:]


def loss_of(teacher, **options) -> DistillationLoss:
    return invariants.loss_for(teacher, similarity=1.0, temperature=0.1, **options)


def losses(student, teacher, batch, loss, **part):
    """All terms; the student projects into the space of its teacher by the last projection of the loss."""
    pooling = replace(teacher.sentence_pooling, projection=loss.hidden_projections[-1])
    student.sentence_pooling = pooling
    with torch.no_grad():
        expected = forward(teacher, **batch)
    return loss(forward(student, **batch), expected, None, batch["attention_mask"], **part)


def scores_of(teacher, batch, seed=0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    student, scorer = student_of(teacher), hdlib.scorer()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    losses(student, teacher, batch, loss_of(teacher).to(teacher.dtype)).total.backward()
    scorer.update(student)
    return scorer.scores()


@pytest.fixture(scope="module")
def text(text_file):
    return [line for line in text_file.read_text().splitlines() if line]


@pytest.fixture(scope="module")
def data(text, tokenizer):
    ids = token_ids(tokenizer, sorted(set(text))[:80], length=24)
    return Sentences.of(ids[:64], tokenizer.pad_token_id), Sentences.of(ids[64:], tokenizer.pad_token_id)


@pytest.fixture
def encoder(tokenizer):
    return random_encoder("bert", vocabulary=len(tokenizer))


# --- invariants


@pytest.mark.parametrize("name", [*FEW, *full(*(name for name in ENCODERS if name not in FEW))])
def test_invariants_without_a_head(name, tmp_path):
    """Identity, narrow equals mask, stock, asked is got, one teacher for all; with padding."""
    modes = ("lasttoken",) if KINDS[name].causal else ("mean", "max", "cls")
    head = Dense(torch.randn(5, 24 * len(modes) if KINDS[name].linked else 28), torch.randn(5), "Tanh")
    teacher, batch = random_encoder(name, Pooling(modes=modes, dense=(head,))), padded()
    for precision in ("float32", "bfloat16"):
        student, loss = student_of(teacher), loss_of(teacher)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"), recompute_casts(student):
            terms = losses(student, cast_once(teacher, precision), batch, loss)
        assert {*map(float, terms.named().values())} == {0.0} and len(terms.named()) == 6, (precision, terms)
        terms.total.backward()
        assert not any(p.grad is not None and p.grad.any() for p in [*student.parameters(), *loss.parameters()])

    shape = narrower(name, teacher, 0.5)["layers" if KINDS[name].deep else "all"]
    student = student_of(teacher)
    kept = hdlib.narrow(student, shape, scores_of(teacher, batch))
    assert Widths.of(student) == shape
    with torch.no_grad(), zeroed(student_of(teacher), kept) as wide:
        expected = without_layers(wide, kept["layers"].tolist())(**batch).last_hidden_state
        states = student(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    invariants.close(states[real], expected[..., kept["hidden"]][real] if "hidden" in kept else expected[real])
    student.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        invariants.close(loaded.eval()(**batch).last_hidden_state[real], states[real])
    assert "pooling" not in (tmp_path / "config.json").read_text().replace("classifier_pooling", "")


@pytest.mark.parametrize("name", ["bert", *full("mpnet", "modernbert", "qwen3")])
def test_parts_of_a_padded_batch_add_up(name):
    """The terms of single sentences are those of the batch, and their gradients too: same scores (float64)."""
    with Doubles():
        teacher = random_encoder(name).double()
        batch, results = padded(), []
        student = student_of(teacher).double()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
        whole = TrainingBatches(
            Sentences.of([row[mask.bool()].numpy() for row, mask in zip(*batch.values(), strict=True)]), None, 4, 0
        )
        for size in (0, 1, 3):
            student.zero_grad()
            loss, sums = invariants.loss_for(teacher).double(), {}
            for part, share in micro_batches(whole[0], size):
                terms = losses(student, teacher, part, loss, share=share)
                terms.total.backward()
                sums = {name: sums.get(name, 0.0) + float(value) for name, value in terms.named().items()}
            gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
            results.append((sums, gradient))
        for sums, gradient in results[1:]:
            fewer_pairs = name in ("modernbert", "qwen3")  # attend in a local layer and in a causal model
            exact = sums.keys() - ({"attention", "total"} if fewer_pairs else set())
            assert {each: sums[each] for each in exact} == pytest.approx(
                {each: results[0][0][each] for each in exact}, rel=1e-9
            )
            if not fewer_pairs:
                torch.testing.assert_close(gradient, results[0][1], rtol=1e-8, atol=1e-10)


def test_padding_changes_nothing():
    """One batch gives the terms of its sentences without padding; pooling does not read padding."""
    teacher = random_encoder("mpnet", Pooling(modes=("mean", "max", "cls", "lasttoken")))
    batch = padded()
    with torch.no_grad():
        together = forward(teacher, **batch).embeddings
        for row, mask in enumerate(batch["attention_mask"].bool()):
            alone = forward(teacher, batch["input_ids"][row : row + 1, mask]).embeddings
            invariants.close(together[row], alone[0])


def test_the_taylor_score_of_a_pooled_model():
    teacher, batch = random_encoder("bert"), padded()
    with Doubles():
        teacher = teacher.double()
        torch.manual_seed(0)
        model, loss = student_of(teacher).double(), loss_of(teacher).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
        losses(model, teacher, batch, loss).total.backward()
        scorer = hdlib.scorer()
        scorer.update(model)
        name, weight = "encoder.layer.0.intermediate.dense.weight", model.encoder.layer[0].intermediate.dense.weight
        signs = (weight * weight.grad).sign()
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight.mul_(1 + step * signs)
                values.append(losses(model, teacher, batch, loss).total.item())
                weight.div_(1 + step * signs)
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((weight * weight.grad).abs().sum().item(), rel=1e-4), name


def test_embedding_terms_by_hand():
    student, teacher = torch.eye(3)[[0, 1]], torch.eye(3)[[0, 2]]
    assert embedding_loss(student, teacher).item() == 1.0  # the second pair is orthogonal: squared distance 2
    few = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    other = torch.nn.functional.normalize(
        few + 0.3 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    expected = 0.0
    for row in range(4):
        others = [column for column in range(4) if column != row]
        p, q = ((each @ each.T)[row, others].div(0.5).softmax(0) for each in (other, few))
        expected += (p * (p / q).log()).sum().item() / 4
    assert similarity_loss(few, other, 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert similarity_loss(few, few, 0.05).item() == 0.0 == similarity_loss(few[:1], other[:1], 0.05).item()


@pytest.mark.parametrize("name", ["bert", *full("mpnet", "deberta-v3", "modernbert")])
def test_moments_and_rotation_of_real_tokens_only(name):
    """Padding changes neither the moments of what layers read nor the rotation of heads."""
    teacher, batch = random_encoder(name), padded(lengths=(9, 4))
    rows = [{"input_ids": row[mask.bool()][None]} for row, mask in zip(*batch.values(), strict=True)]
    sums = []
    for parts in ([batch], rows):
        compensation = Compensation()
        for part in parts:
            with torch.no_grad(), compensation.recording(teacher, part.get("attention_mask")):
                forward(teacher, part["input_ids"], None, part.get("attention_mask"))
        sums.append(compensation)
    states = {name: total for name, total in sums[0]._moments.items() if "hidden" in name or "dense" in name}
    assert states and "hidden_states.last" in {*sums[0]._source}
    for group, moments in states.items():
        for padded_sum, alone in zip(moments, sums[1]._moments[group], strict=True):
            invariants.close(padded_sum, alone, 1e-4)
    rotated = [student_of(teacher), student_of(teacher)]
    for model, parts in zip(rotated, ([batch], rows), strict=True):
        rotate_heads(model, parts)
    with torch.no_grad():
        states = [model(**batch).last_hidden_state[batch["attention_mask"].bool()] for model in (teacher, *rotated)]
    invariants.close(states[1], states[0], 1e-4)
    invariants.close(states[2], states[0], 1e-4)


# --- a run


@pytest.fixture(scope="module")
def run(tokenizer, data, tmp_path_factory):
    teacher = random_encoder("bert", vocabulary=len(tokenizer))
    config = DistillConfig(**ARGUMENTS | {"similarity": 1.0, "temperature": 0.1, "rotate": True, "compensate": True})
    return teacher, hdlib.distill(teacher, tokenizer, *data, config, tmp_path_factory.mktemp("run"))


def test_a_run_from_start_to_end(run, tokenizer, text):
    teacher, run = run
    metrics = run.metrics
    assert [metrics.loc[0, f"held_out_{name}"] for name in ("cosine_distance", "rank_correlation", "recall")] == [
        0,
        1,
        1,
    ]
    assert metrics.loc[1, [*ENCODER_TERMS]].eq(0.0).all() and metrics.loc[12, [*ENCODER_TERMS]].gt(0.0).all()
    assert "mlm" not in metrics and "held_out_kl" not in metrics and run.measure == "held_out_cosine_distance"
    assert 0 < metrics["held_out_cosine_distance"].iloc[-1] < 1
    student, its_tokenizer = run.student()
    assert Widths.of(student) == Widths.at(teacher, 0.5) and its_tokenizer.model_max_length == 32
    with torch.no_grad():
        embeddings = hdlib.encode(student, its_tokenizer, text[:5])
        expected = hdlib.encode(teacher, tokenizer, text[:5])
    assert embeddings.shape == expected.shape == (5, 24)
    assert "sentence-similarity" in (run.student_folder / "README.md").read_text()
    assert (run.student_folder / "2_Dense/model.safetensors").exists()
    assert "cosine distance to the teacher" in hdlib.lab.run_figure.RunFigure(run).describe(12)
    assert hdlib.lab.plot_discrepancy(run).axes[0].get_ylabel().startswith("cosine distance")
    assert hdlib.lab.final_table({"a": [run]}).loc[0, "recall"] == metrics["held_out_recall"].iloc[-1]


def test_measures_of_embeddings_against_numpy_and_scipy():
    draw = np.random.default_rng(3)
    teacher, student = (draw.normal(size=(15, 4)) for _ in range(2))
    student += teacher
    teacher, student = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (teacher, student))
    found = embedding_measures(torch.tensor(student), torch.tensor(teacher))
    assert found["cosine_distance"] == pytest.approx(1 - (student * teacher).sum(1).mean())
    pairs = np.triu_indices(15, 1)
    correlation = spearmanr((student @ student.T)[pairs], (teacher @ teacher.T)[pairs]).statistic
    assert found["rank_correlation"] == pytest.approx(correlation)
    hits = 0
    for row in range(15):
        others = np.delete(np.arange(15), row)
        nearest = [set(others[np.argsort(-(each[row] @ teacher[others].T))[:10]]) for each in (student, teacher)]
        hits += len(nearest[0] & nearest[1])
    assert found["recall"] == pytest.approx(hits / 150)


def test_the_saved_student_has_the_measured_distance(run, data, tokenizer):
    teacher, run = run
    measured = hdlib.discrepancy(run.student()[0], teacher, sample(data[1], 12))
    assert measured["cosine_distance"] == pytest.approx(run.metrics["held_out_cosine_distance"].iloc[-1], rel=1e-4)
    narrow = run.student()[0]
    narrow.sentence_pooling = replace(narrow.sentence_pooling, dense=())
    assert {"rank_correlation"} == {"rank_correlation", "recall", "cosine_distance"} & {
        *hdlib.discrepancy(narrow, teacher, data[1])
    }


def test_a_resumed_run_is_the_same(run, data, tokenizer, tmp_path):
    teacher, whole = run

    def interrupt(record):
        if record["step"] == 8:
            raise KeyboardInterrupt

    arguments = teacher, tokenizer, *data, whole.config, tmp_path
    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(*arguments, on_step=interrupt)
    resumed = hdlib.distill(*arguments, resume=True)
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        one, other = (load_file(each.student_folder / file) for each in (whole, resumed))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert whole.metrics["total"].equals(resumed.metrics["total"])


def test_a_copy_is_scored_and_not_trained(encoder, data, tokenizer, tmp_path):
    """Before its first prune the student stays its teacher; the feed-forward neurons that nothing reads leave first."""
    with torch.no_grad():
        for layer in encoder.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0.0
    size = Widths.of(encoder).ffn
    once = {"target": Widths(ffn=size // 2), "schedule": "one_shot", "prune_start": 0.3, "prune_every": 1}
    config = DistillConfig(**ARGUMENTS | once | {"eval_every": 1, "prediction": 0.0, "micro_batch_size": 2})
    run = hdlib.distill(encoder, tokenizer, *data, config, tmp_path)
    before = run.metrics.loc[: run.pruned_at[0] - 1]
    assert len(before) == 4 and before["held_out_cosine_distance"].eq(0.0).all()
    assert before["total"].dropna().eq(0.0).all() and run.metrics["total"].iloc[-1] > 0
    assert all(run.kept[f"layer.{layer}.ffn"] == [*range(1, size, 2)] for layer in range(2))


def test_the_scores_of_a_copy_do_not_depend_on_how_a_batch_is_divided(encoder, data, tokenizer, tmp_path):
    once = {"schedule": "one_shot", "prune_start": 0.3, "prune_every": 1, "steps": 6}
    configs = [DistillConfig(**ARGUMENTS | once | {"micro_batch_size": size}) for size in (0, 2)]
    runs = [hdlib.distill(encoder, tokenizer, *data, each, tmp_path / str(i)) for i, each in enumerate(configs)]
    assert runs[0].kept == runs[1].kept


@pytest.mark.parametrize("change", [{"masked": True}, {"initial": "random", "micro_batch_size": 3}])
def test_other_settings(change, encoder, data, tokenizer, tmp_path):
    config = DistillConfig(**ARGUMENTS | {"steps": 4} | change)
    student, _ = hdlib.distill(encoder, tokenizer, *data, config, tmp_path).student()
    assert Widths.of(student) == Widths.at(encoder, 0.5)
    assert hdlib.encode(student, tokenizer, ["the student learns"]).shape == (1, 24)


def test_the_command_distils_an_encoder(encoder, tokenizer, tmp_path, monkeypatch):
    save_sentence_encoder(encoder, tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(sentences(80)))
    places = {"teacher": "model", "corpus": "text.txt", "length": 24, "prompt": "a ", "run_dir": "run"}
    values = ARGUMENTS | places | {"steps": 2, "prune_every": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values, "target": 0.9}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hdlib", "config.yaml"])
    hdlib.__main__.main()
    assert hdlib.Run.load("run").has_student


@pytest.mark.full
def test_two_processes_equal_one_on_padded_batches(encoder, tokenizer, tmp_path):
    save_sentence_encoder(encoder, tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(sentences(120)))
    runs = []
    for count in (1, 2):
        places = {"teacher": "model", "corpus": "text.txt", "length": 24, "run_dir": f"run_{count}"}
        options = {"micro_batch_size": 1, "compensate": True, "steps": 6}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(ARGUMENTS | places | options))
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [sys.executable, "-m", *launch, "-m", "hdlib", "config.yaml"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(hdlib.Run.load(tmp_path / places["run_dir"]))
    one, two = runs
    assert one.kept == two.kept and two.description["processes"] == 2
    for term in ("total", "prediction", "hidden", "attention", "embedding", "held_out_cosine_distance"):
        assert two.metrics[term].dropna().tolist() == pytest.approx(one.metrics[term].dropna().tolist(), rel=1e-3)


# --- folders


def test_what_is_saved_is_read_again(tokenizer, tmp_path, capsys):
    dense = (Dense(torch.randn(6, 48), torch.randn(6), "Tanh"), Dense(torch.randn(3, 6)))
    prompts = {"query": "the quick ", "passage": ""}
    pooling = Pooling(("max", "mean"), dense, False, prompts, "query")
    model = random_encoder("bert", pooling, vocabulary=len(tokenizer))
    tokenizer.model_max_length = 20
    save_sentence_encoder(model, tokenizer, tmp_path / "model")
    tokenizer.model_max_length = 32
    loaded, its_tokenizer = hdlib.load_teacher(tmp_path / "model")
    assert its_tokenizer.model_max_length == 20
    said = capsys.readouterr().out
    assert "BertModel, max + mean pooling, dense 48 to 6, dense 6 to 3, not normalised, prompts: query, 20" in said
    texts = ["the student learns", "a step. " * 30]
    expected = hdlib.encode(model, its_tokenizer, texts)
    assert torch.equal(hdlib.encode(loaded, its_tokenizer, texts), expected) and expected.shape == (2, 3)
    assert not torch.equal(hdlib.encode(loaded, its_tokenizer, texts, prompt=""), expected)
    save_sentence_encoder(model, tokenizer, tmp_path / "narrow", teacher_space=False)
    assert hdlib.encode(*hdlib.load_teacher(tmp_path / "narrow"), texts).shape == (2, 48)


def test_an_encoder_without_settings_gets_mean_pooling_and_says_so(encoder, tokenizer, tmp_path, capsys):
    del encoder.sentence_pooling
    encoder.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: each for name, each in load_file(path).items() if not name.startswith("pooler")}
    save_file(weights, path, metadata={"format": "pt"})
    loaded, _ = hdlib.load_teacher(tmp_path)
    assert loaded.sentence_pooling.modes == ("mean",) and not loaded.pooler.dense.weight.any()
    assert "BertModel, mean pooling, normalised, no prompts, 32 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"is no teacher: .* or a sentence encoder by load_teacher"):
        hdlib.models.check_teacher(encoder)


CHANGES = {
    "unknown module": ("modules.json", lambda m: [*m[:2], m[1] | {"type": "x.models.LSTM"}], "module x.models.LSTM"),
    "order": ("modules.json", lambda m: [m[0], m[2], m[1]], "must be Transformer, Pooling"),
    "unknown mode": ("1_Pooling/config.json", lambda c: c | {"pooling_mode": "weightedmean"}, "mode weightedmean"),
    "old unknown mode": (
        "1_Pooling/config.json",
        lambda c: {"pooling_mode_mean_sqrt_len_tokens": True},
        "mode pooling_mode_mean_sqrt_len_tokens",
    ),
    "no mode": ("1_Pooling/config.json", lambda c: {"word_embedding_dimension": 24}, "mode none"),
    "prompt left out": ("1_Pooling/config.json", lambda c: c | {"include_prompt": False}, "include_prompt is false"),
    "activation": (
        "2_Dense/config.json",
        lambda c: c | {"activation_function": "evil.Module"},
        "activation evil.Module",
    ),
    "residual": ("2_Dense/config.json", lambda c: c | {"use_residual": True}, "use_residual of a dense layer"),
    "lower case": ("sentence_bert_config.json", lambda c: c | {"do_lower_case": True}, "do_lower_case is true"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_are_not_supported(change, encoder, tokenizer, tmp_path):
    file, edit, words = CHANGES[change]
    encoder.sentence_pooling = Pooling(dense=(Dense(torch.randn(3, 24)),))
    save_sentence_encoder(encoder, tokenizer, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        hdlib.load_teacher(tmp_path / "model")
    assert "\n" not in str(refusal.value)


def test_old_names_and_a_folder_of_its_own(encoder, tokenizer, tmp_path):
    save_sentence_encoder(encoder, tokenizer, tmp_path / "model")
    modules = json.loads((tmp_path / "model/modules.json").read_text())
    (tmp_path / "old/1_Pooling").mkdir(parents=True)
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    (tmp_path / "old/1_Pooling/config.json").write_text(json.dumps(flags))
    (tmp_path / "model").rename(tmp_path / "old/0_Transformer")
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "old/modules.json").write_text(json.dumps(modules))
    loaded, _ = hdlib.load_teacher(tmp_path / "old")
    assert loaded.sentence_pooling.modes == ("cls", "max")


def test_pickled_dense_weights_are_refused(encoder, tokenizer, tmp_path):
    encoder.sentence_pooling = Pooling(dense=(Dense(torch.randn(3, 24)),))
    save_sentence_encoder(encoder, tokenizer, tmp_path / "model")
    (tmp_path / "model/2_Dense/model.safetensors").rename(tmp_path / "model/2_Dense/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"2_Dense has no model\.safetensors"):
        hdlib.load_teacher(tmp_path / "model")


def test_sentence_transformers_gives_the_same_embeddings(run, tokenizer, text, tmp_path):
    """In a process that cannot import hdlib; with prompts and a narrow dimension too; mixed index."""
    pytest.importorskip("sentence_transformers")
    student, its_tokenizer = run[1].student()
    texts = [*text[:6], "the student " * 40, "[MASK] a step"]
    expected = {str(run[1].student_folder): hdlib.encode(student, its_tokenizer, texts)}
    pooling = Pooling(("mean", "cls"), (Dense(torch.randn(5, 48), torch.randn(5), "Tanh"),), False, {"q": "a "}, "q")
    model = random_encoder("mpnet", pooling, vocabulary=len(tokenizer))
    save_sentence_encoder(model, its_tokenizer, tmp_path / "model")
    expected[str(tmp_path / "model")] = hdlib.encode(*hdlib.load_teacher(tmp_path / "model"), texts)
    code = """
import json, sys
sys.modules["hdlib"] = None
from sentence_transformers import SentenceTransformer
texts, folders = json.load(sys.stdin)
print(json.dumps([SentenceTransformer(folder, device="cpu").encode(texts).tolist() for folder in folders]))
"""
    read = json.dumps([texts, list(expected)])
    found = subprocess.run([sys.executable, "-c", code], input=read, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for embeddings, own in zip(json.loads(found.stdout.splitlines()[-1]), expected.values(), strict=True):
        torch.testing.assert_close(torch.tensor(embeddings), own, rtol=0, atol=1e-5)


@pytest.mark.full  # the export takes seconds
def test_onnx_gives_embeddings(run, tmp_path):
    student, its_tokenizer = run[1].student()
    assert to_onnx(student, tmp_path / "model.onnx") <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    batch = its_tokenizer(["the student learns", "a step"], padding=True, return_tensors="np")
    fed = {each.name: batch[each.name] for each in session.get_inputs()}
    (embeddings,) = session.run(["sentence_embedding"], fed)
    expected = hdlib.encode(student, its_tokenizer, ["the student learns", "a step"])
    torch.testing.assert_close(torch.tensor(embeddings), expected, rtol=0, atol=1e-5)


# --- text


def test_sentences_are_padded_to_the_longest_of_a_batch():
    few = Sentences.of([[7, 8], [9], [5, 6, 7]], pad_token_id=1)
    assert few[[0, 1]]["input_ids"].tolist() == [[7, 8], [9, 1]]
    assert few[1:]["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert few[2]["input_ids"].tolist() == [5, 6, 7] and len(few) == 3
    assert few.select([2, 1])[:]["input_ids"].tolist() == [[5, 6, 7], [9, 1, 1]]


def test_batches_have_similar_lengths_and_depend_on_the_step_only():
    lengths = np.random.default_rng(0).integers(2, 30, 403)
    many = Sentences.of([np.arange(length) + 5 for length in lengths])
    one, other = (TrainingBatches(many, None, 8, seed=3) for _ in range(2))
    backwards = {step: other[step] for step in reversed(range(100))}
    seen = []
    for step in range(100):
        batch = one[step]
        assert all(torch.equal(batch[name], backwards[step][name]) for name in batch)
        seen.append(batch["attention_mask"].sum().item() / batch["attention_mask"].numel())
        halves = [TrainingBatches(many, None, 8, 3, (rank, 2))[step]["attention_mask"].sum() for rank in (0, 1)]
        assert sum(halves) == batch["attention_mask"].sum() == batch["size"][1]
    assert np.mean(seen) > 0.9, "little padding"
    epoch = torch.cat([one.blocks.order(8, torch.Generator().manual_seed(0))])
    assert len(epoch) == 400 == len(epoch.unique())


def test_load_sentences(tokenizer, tmp_path):
    lines = [
        *sentences(60),
        "",
        " ",
        "...",
        sentences(60)[0],
        "a step. The teacher learns! A. Student keeps 2. slow layer",
    ]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=r"[1-9]\d% of the training sentences have 32 tokens.*raise length"):
        train, validation = hdlib.load_sentences(tmp_path, tokenizer, 32)
    texts = [tokenizer.decode(part[row]["input_ids"]) for part in (train, validation) for row in range(len(part))]
    assert len(texts) == len({*texts}) == len({*lines}) - 3 + 2 and len(validation) >= 1, "each once, none empty"
    assert all(text.startswith("[CLS]") and text.endswith("[SEP]") for text in texts)
    assert any("student keeps" in text and text.endswith("slow layer [SEP]") for text in texts)
    with pytest.warns(UserWarning, match="have 8 tokens"):
        passages, _ = hdlib.load_sentences(tmp_path, tokenizer, 8, passages=True)
    assert passages.lengths.max() == 8


def test_one_sentence_a_file(tokenizer, tmp_path):
    for number, sentence in enumerate(sentences(6)):
        (tmp_path / f"{number}.txt").write_text(sentence)
    train, validation = hdlib.load_sentences(tmp_path, tokenizer, 32)
    assert (len(train), len(validation)) == (5, 1)


def test_text_without_sentences(tokenizer, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": ""}\n{"text": "!!"}\n{"text": "a step"}\n')
    with pytest.raises(ValueError, match="no sentence is left for the training part: pass more text"):
        hdlib.load_sentences(tmp_path, tokenizer, 16)
    with pytest.raises(ValueError, match="length must be from 3 to the teacher's 32 tokens; got 64"):
        hdlib.load_sentences(tmp_path, tokenizer, 64)
    with pytest.raises(ValueError, match="needs the teacher's tokenizer"):
        hdlib.load_sentences(tmp_path)


def test_a_teacher_with_prompts_needs_one(encoder, data, tokenizer, tmp_path):
    encoder.sentence_pooling = Pooling(prompts={"query": "query: ", "passage": "passage: ", "none": ""})
    words = "trained with prompts before its texts .query 'query: ', passage 'passage: '.: pass one as prompt"
    with pytest.raises(ValueError, match=words):
        hdlib.distill(encoder, tokenizer, *data, DistillConfig(**ARGUMENTS), tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        hdlib.encode(encoder, tokenizer, ["a step"])
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences(30)))
    with_prompt, _ = hdlib.load_sentences(path, tokenizer, 32, prompt="slow: ")
    assert tokenizer.decode(with_prompt[0]["input_ids"]).startswith("[CLS] slow") and with_prompt.prompt == "slow: "
    encoder.sentence_pooling.prompt(with_prompt.prompt)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"similarity": 1.0, "micro_batch_size": 2}, "similarity needs the whole batch"),
        ({"prediction": 0.0, "hidden": 0.0, "attention": 0.0, "embedding": 0.0}, "a sentence encoder has no mlm term"),
        ({"batch_size": 65}, "fewer than one batch"),
    ],
)
def test_settings_that_do_not_suit_an_encoder(change, words, encoder, data, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=words):
        hdlib.distill(encoder, tokenizer, *data, DistillConfig(**ARGUMENTS | change), tmp_path / "run")


def test_text_of_the_other_kind(encoder, teacher, data, blocks, tokenizer, tmp_path):
    config = DistillConfig(**ARGUMENTS)
    with pytest.raises(ValueError, match="is a sentence encoder: pass the text that load_sentences returns"):
        hdlib.distill(encoder, tokenizer, *blocks, config, tmp_path / "run")
    with pytest.raises(ValueError, match="is a language model: pass the text that load_corpus returns"):
        hdlib.distill(teacher, tokenizer, *data, config, tmp_path / "run")
    with pytest.raises(ValueError, match="similarity compares embeddings"):
        hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS, similarity=1.0), tmp_path / "run")
    longer = Sentences.of([np.full(40, 7)] * 8)
    with pytest.raises(ValueError, match="40 tokens, the teacher only 3"):
        hdlib.distill(encoder, tokenizer, longer, longer, config, tmp_path / "run")


def test_texts_that_cannot_be_encoded(encoder, tokenizer):
    with pytest.raises(ValueError, match="must be a list of at least one text"):
        hdlib.encode(encoder, tokenizer, "a step")
    assert hdlib.encode(encoder, tokenizer, ["", "a step", "a step"]).isfinite().all()
    assert hdlib.encode(encoder, tokenizer, ["a step " * 50]).isfinite().all()


# --- measures without training


def test_sts_and_retrieval_by_hand(tmp_path):
    vectors = {"east": [1.0, 0.0], "north east": [1.0, 1.0], "north": [0.0, 1.0], "west": [-1.0, 0.0]}

    def encode(texts):
        return torch.tensor([vectors[text] for text in texts])

    rows = {"a": ["east"] * 3, "b": ["north east", "north", "west"], "score": [5, 3, 1]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "test.parquet")
    pairs = load_pairs(tmp_path, ("a", "b"))
    assert sts(encode, pairs) == {"spearman": 1.0, "pearson": pytest.approx(0.9951, abs=1e-4)}
    relevant = Dataset.from_dict({"text": ["east", "west"], "pair": ["north east", "north"], "label": [1.0, 1.0]})
    found = retrieval(encode, encode, relevant, distractors=["east"])
    # east finds itself, then its document; west finds north first
    assert found["recall_1"] == 0.5 and found["recall_10"] == 1.0
    assert found["ndcg_10"] == pytest.approx((1 / np.log2(3) + 1) / 2)
    with pytest.raises(ValueError, match="queries have 2 dimensions, documents 3"):
        retrieval(encode, lambda texts: torch.ones(len(texts), 3), relevant)
    with pytest.raises(ValueError, match="there is no relevant document"):
        retrieval(encode, encode, pairs.map(lambda row: {"label": 0.0}))
    with pytest.raises(ValueError, match="a correlation needs different ones"):
        sts(encode, load_pairs(tmp_path, ("a", "b"), score=None))
    with pytest.raises(ValueError, match="has no column 'sentence1'"):
        load_pairs(tmp_path)
    model = partial(encode)
    assert retrieval(model, model, pairs)["recall_10"] == 1.0


# --- what a small encoder is compared with


def test_an_encoder_of_fewer_layers_is_trained_again(tokenizer, data):
    teacher = random_encoder("bert", vocabulary=len(tokenizer), layers=3)
    student = baselines.keep_layers(teacher, 2)
    for new, old in enumerate((0, 2)):
        pairs = zip(student.encoder.layer[new].parameters(), teacher.encoder.layer[old].parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    wanted, before = baselines.embed(teacher, data[1]), baselines.embed(student, data[1])
    baselines.distil_embeddings(student, teacher, data[0], steps=20, batch_size=8, learning_rate=1e-3)
    assert (baselines.embed(student, data[1]) - wanted).norm() < 0.8 * (before - wanted).norm()


def test_fewer_dimensions_against_numpy(encoder, data):
    train, held_out = (baselines.embed(encoder, part).double().numpy() for part in data)
    smaller = baselines.embed(baselines.fewer_dimensions(encoder, data[0], 0.25), data[1]).double().numpy()
    axes = np.linalg.svd(train - train.mean(0), full_matrices=False)[2][:6]
    expected = held_out @ axes.T / np.linalg.norm(held_out @ axes.T, axis=1, keepdims=True)
    np.testing.assert_allclose(smaller @ smaller.T, expected @ expected.T, atol=1e-4)  # up to the signs of the axes


def test_search_and_latency_of_two_encoders(encoder, data):
    embeddings, texts = baselines.embed(encoder, data[1]), [f"text {number}" for number in range(len(data[1]))]
    table = baselines.search({"first": embeddings[3], "other": -embeddings[3]}, embeddings, texts)
    assert table["first"][1] == "1.00 text 3" and "1.00 text 3" not in table["other"].tolist()
    times = baselines.latency({"one": encoder, "two": student_of(encoder)}, data[1], batch_size=4, repeats=2)
    assert times.keys() == {"one", "two"} and all(0 < each < 1e4 for each in times.values())
