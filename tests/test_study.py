"""Studies: random starts, kept neurons, measures around prunes, runs that are shared and compared."""

import threading
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import torch

import hdlib
from hdlib import DistillConfig, Widths, lab
from hdlib.lab import Study
from hdlib.losses import TERMS
from hdlib.runs import Run

from conftest import ARGUMENTS, random_bert

MLM_ONLY = dict.fromkeys(TERMS[1:], 0.0)
STILL = {"learning_rate": 1e-30}  # nothing is learned: only prunes change the student


@pytest.fixture
def study(teacher, tokenizer, blocks, tmp_path):
    return Study(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS | {"steps": 8, "eval_every": 4}), tmp_path)


def distilled(teacher, tokenizer, blocks, folder, **changes) -> Run:
    return hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**ARGUMENTS | changes), folder)


def test_a_run_with_too_few_tokens_for_a_fit_has_its_other_numbers(teacher, tokenizer, blocks, tmp_path):
    run = distilled(teacher, tokenizer, blocks, tmp_path, steps=2, eval_blocks=2)
    (row,) = hdlib.lab.final_table({"arm": [run]}).to_dict("records")
    assert np.isnan(row["hidden"]) and row["kl"] > 0
    hdlib.lab.plot_run(run)


def test_a_random_student_has_the_target_shape_and_no_weights_of_the_teacher(teacher, tokenizer, blocks, tmp_path):
    run = distilled(teacher, tokenizer, blocks, tmp_path / "a", steps=6, initial="random", **STILL)
    again = distilled(teacher, tokenizer, blocks, tmp_path / "b", steps=6, initial="random", **STILL)
    other = distilled(teacher, tokenizer, blocks, tmp_path / "c", steps=6, initial="random", seed=1, **STILL)
    target = Widths.at(teacher, 0.5)
    assert (run.metrics["hidden_size"] == target.hidden).all() and Widths.of(run.student()[0]) == target
    assert run.metrics.loc[0, "held_out_kl"] > 0.01 and run.metrics.loc[1, "hidden"] > 0
    weights = [each.student()[0].bert.encoder.layer[0].output.dense.weight for each in (run, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], teacher.bert.encoder.layer[0].output.dense.weight[:12, :28])
    with pytest.raises(FileNotFoundError, match="random weights"):
        _ = run.kept


def test_a_random_student_resumes_exactly(teacher, tokenizer, blocks, tmp_path):
    changes = {"steps": 8, "initial": "random", "checkpoint_every": 3}
    whole = distilled(teacher, tokenizer, blocks, tmp_path / "whole", **changes)

    def kill(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    config = DistillConfig(**ARGUMENTS | changes)
    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", on_step=kill)
    resumed = hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", resume=True)
    for one, other in zip(resumed.student()[0].parameters(), whole.student()[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_random_weights_under_masks_are_refused():
    with pytest.raises(ValueError, match="initial='random'"):
        DistillConfig(initial="random", masked=True)


def test_the_teacher_is_not_run_without_distillation(teacher, tokenizer, blocks, tmp_path, monkeypatch):
    seen = []
    loop = import_module("hdlib.training")
    forward = loop.forward
    monkeypatch.setattr(loop, "forward", lambda model, **read: seen.append(model) or forward(model, **read))
    run = distilled(teacher, tokenizer, blocks, tmp_path / "mlm", steps=4, **MLM_ONLY)
    assert len(seen) == 4
    assert run.metrics["mlm"].iloc[1:].equals(run.metrics["total"].iloc[1:])
    distilled(teacher, tokenizer, blocks, tmp_path / "all", steps=4)
    assert len(seen) == 4 + 2 * 4


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_records_which_neurons_it_kept(teacher, tokenizer, blocks, tmp_path, masked):
    """A student that learned nothing has exactly these rows and columns of its teacher."""
    run = distilled(teacher, tokenizer, blocks, tmp_path, masked=masked, checkpoint_every=7, **STILL)
    kept, student = run.kept, run.student()[0]
    assert {len(kept["hidden"]), len(set(kept["hidden"]))} == {12}
    wide_bert, narrow_bert = teacher.bert, student.bert
    embedding = wide_bert.embeddings.word_embeddings.weight[:, kept["hidden"]]
    assert torch.equal(narrow_bert.embeddings.word_embeddings.weight, embedding)
    for layer in range(len(wide_bert.encoder.layer)):
        wide = wide_bert.encoder.layer[layer].intermediate.dense.weight
        rows = wide[kept[f"layer.{layer}.ffn"]][:, kept["hidden"]]
        assert torch.equal(narrow_bert.encoder.layer[layer].intermediate.dense.weight, rows)
        value = wide_bert.encoder.layer[layer].attention.self.value.weight
        rows = value[kept[f"layer.{layer}.value_output"]][:, kept["hidden"]]
        assert torch.equal(narrow_bert.encoder.layer[layer].attention.self.value.weight, rows)


def test_kept_neurons_survive_a_resume(teacher, tokenizer, blocks, tmp_path, whole_run):

    def kill(record):
        if record["step"] == 13:
            raise KeyboardInterrupt

    config = DistillConfig(**ARGUMENTS)
    with pytest.raises(KeyboardInterrupt):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", on_step=kill)
    with pytest.raises(FileNotFoundError, match="not finished"):
        _ = Run.load(tmp_path / "killed").kept
    assert hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "killed", resume=True).kept == whole_run.kept


def test_measures_around_prunes(teacher, tokenizer, blocks, tmp_path):
    """If nothing is learned, the discrepancy before a prune equals that after the last one."""
    metrics = distilled(teacher, tokenizer, blocks, tmp_path, eval_prunes=True, eval_every=100, **STILL).metrics
    pruned = metrics.index[metrics["hidden_size"].diff().lt(0) | metrics["intermediate_size"].diff().lt(0)]
    before, after = metrics["before_prune_kl"].dropna(), metrics["held_out_kl"].dropna()
    assert len(pruned) > 4 and list(before.index) == list(pruned)
    assert list(after.index) == [0, *pruned, 24]
    assert before.tolist() == pytest.approx([0.0, *after.loc[pruned].iloc[:-1]], rel=1e-5, abs=1e-9)
    assert after.loc[pruned].iloc[-1] > 0


def test_layers_against_numpy(tokenizer, blocks):
    """By layer: the error of the best linear map of the states, and the KL of the attention of paired heads."""
    teacher = random_bert(vocabulary=len(tokenizer))
    student = random_bert(vocabulary=len(tokenizer), heads=2, ffn=9, seed=3)
    heads = torch.tensor([[0, 2], [3, 1]])
    held_out = blocks[1].take(21)
    measured = hdlib.discrepancy(student, teacher, held_out, batch_size=4, heads=heads)
    without = hdlib.discrepancy(student, teacher, held_out, batch_size=4)
    assert "attention_1" not in without and without["hidden_2"] == measured["hidden_2"]
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    input_ids = torch.tensor(held_out["input_ids"])
    with torch.no_grad():
        student_outputs, teacher_outputs = (
            model(input_ids, output_hidden_states=True, output_attentions=True) for model in (student, teacher)
        )
    for layer in range(2):
        x, y = (o.hidden_states[layer + 1].double().numpy() for o in (student_outputs, teacher_outputs))
        fitted, (x, y) = [each[::2].reshape(-1, each.shape[-1]) for each in (x, y)], (x[1::2], y[1::2])
        left = ((x @ np.linalg.lstsq(*fitted, rcond=None)[0] - y) ** 2).mean() / (y**2).mean()
        assert measured[f"hidden_{layer + 1}"] == pytest.approx(left, rel=1e-4)
        q = student_outputs.attentions[layer].double().numpy()
        p = teacher_outputs.attentions[layer][:, heads[layer]].double().numpy()
        assert measured[f"attention_{layer + 1}"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-3)


def test_identical_layers_do_not_differ(teacher, blocks):
    measured = hdlib.discrepancy(hdlib.models.student_of(teacher), teacher, blocks[1].take(16))
    assert measured["attention_1"] == measured["attention_2"] == 0.0 and measured["hidden_2"] < 1e-9


def test_arms_are_trained_once_and_moved_when_complete(study, tmp_path):
    arms = {"cubic": {}, "one_shot": {"schedule": "one_shot"}}
    trained = study.distill(arms, [1, 2])
    assert {arm: [run.arguments["config"]["seed"] for run in runs] for arm, runs in trained.items()} == {
        "cubic": [1, 2],
        "one_shot": [1, 2],
    }
    assert trained["one_shot"][0].arguments["config"]["schedule"] == "one_shot"
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["cubic-seed-1", "cubic-seed-2", "one_shot-seed-1", "one_shot-seed-2", "unfinished"]
    assert not [path for path in (tmp_path / "unfinished").iterdir() if path.is_dir()]
    before = (tmp_path / "cubic-seed-1" / "metrics.jsonl").stat().st_mtime_ns
    again = study.distill(arms, [1, 2])
    assert (tmp_path / "cubic-seed-1" / "metrics.jsonl").stat().st_mtime_ns == before
    assert again["cubic"][0].metrics.equals(trained["cubic"][0].metrics)


def test_an_interrupted_arm_resumes(study, monkeypatch, tmp_path):
    whole = Study(**vars(study) | {"folder": tmp_path / "whole"}).distill({"cubic": {}}, [1])["cubic"][0]
    log = Run.log

    def killed(self, record, *file):
        log(self, record, *file)
        if record["step"] == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Run, "log", killed)
        study.distill({"cubic": {}}, [1])
    assert not (tmp_path / "cubic-seed-1").exists()
    (resumed,) = study.distill({"cubic": {}}, [1])["cubic"]
    clocks = ["seconds", "elapsed"]
    assert resumed.metrics.drop(columns=clocks).equals(whole.metrics.drop(columns=clocks))


def test_draw_only_trains_nothing(study):
    study.distill({"cubic": {}}, [1])
    drawing = Study(**vars(study) | {"draw_only": True})
    trained = drawing.distill({"cubic": {}, "one_shot": {"schedule": "one_shot"}}, [1, 2])
    assert list(trained) == ["cubic"] and len(trained["cubic"]) == 1


def test_a_run_with_other_arguments_is_refused(study):
    study.distill({"cubic": {}}, [1])
    with pytest.raises(ValueError, match=r"cubic-seed-1 holds a run with other arguments: schedule was cubic"):
        study.distill({"cubic": {"schedule": "linear"}}, [1])


def test_two_requests_for_the_same_run_train_it_once(study, monkeypatch):
    started, distill = [], hdlib.lab.study.distill

    def counted(*arguments, **options):
        started.append(arguments[5])
        return distill(*arguments, **options)

    monkeypatch.setattr(hdlib.lab.study, "distill", counted)
    threads = [threading.Thread(target=study.distill, args=({"cubic": {}}, [1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1 and study.distill({"cubic": {}}, [1])["cubic"][0].finished


def test_every_arm_gets_its_best_learning_rate_on_the_tuning_seed(study):
    rates = [1e-30, 3e-3]
    tuned = study.tune({"cubic": {}, "one_shot": {"schedule": "one_shot"}}, rates, seed=0)
    for arm, changes in tuned.items():
        ends = [
            Run.load(study.folder / f"{arm}-rate-{rate:g}-seed-0").metrics["held_out_kl"].iloc[-1] for rate in rates
        ]
        assert ends[0] != ends[1] and changes["learning_rate"] == rates[int(np.argmin(ends))]
    assert tuned["one_shot"]["schedule"] == "one_shot"
    assert study.tune({"cubic": {}}, [5e-4], seed=0) == {"cubic": {"learning_rate": 5e-4}}
    assert not (study.folder / "cubic-rate-0.0005-seed-0").exists(), "one rate needs no trial"


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match="there is no arm 'cubi'; there are: cubic, one_shot"):
        hdlib.lab.pick({"cubic": {}, "one_shot": {}}, ["cubi"])


def test_the_table_holds_final_numbers(study):
    trained = study.distill({"cubic": {}, "wide": {"scope": "global"}}, [1])
    table = hdlib.lab.final_table(trained).set_index("arm")
    metrics = trained["cubic"][0].metrics
    row = table.loc["cubic"]
    assert row["kl"] == metrics["held_out_kl"].iloc[-1] and row["highest_kl"] == metrics["held_out_kl"].max()
    assert row["seconds"] == pytest.approx(metrics["seconds"].iloc[1:].sum())
    assert (row["seed"], row["steps"], row["hidden_size"], row["intermediate_size"]) == (1, 8, 12, 28)
    student = trained["cubic"][0].student()[0]
    assert row["encoder_parameters"] == hdlib.lab.cost.parameters(student)["encoder"]
    assert np.isnan(table.loc["wide", "encoder_parameters"]), "no stock student"


def arms_table(**arms: dict[int, float]) -> pd.DataFrame:
    rows = [(arm, seed, kl) for arm, values in arms.items() for seed, kl in values.items()]
    return pd.DataFrame(rows, columns=["arm", "seed", "kl"])


def test_the_interval_by_hand():
    """Mean 3, standard error sqrt(2.5 / 5), and 2.776445, the 0.975 quantile of Student's t with 4 degrees."""
    table = arms_table(a=dict.fromkeys(range(5), 1.0), b={seed: 2.0 + seed for seed in range(5)})
    found = lab.verdict(table, "b", "a")
    half = 2.776445 * 0.5**0.5
    assert found["pairs"] == 5 and found["verdict"] == "higher"
    assert [found[name] for name in ("difference", "low", "high")] == pytest.approx([3, 3 - half, 3 + half])
    assert lab.verdict(table, "a", "b")["verdict"] == "lower"


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.1, 0.2, 1.0], "exploratory"),
        ([0.25, 0.25, 0.25], "exploratory"),
        ([0.1, 0.1, 0.1, 0.1, 1.0], "no difference shown"),
        ([0.0] * 5, "no difference shown"),
        ([0.1], "one seed"),
        ([], "not measured"),
    ],
)
def test_seeds_of_one_sign_are_no_verdict(differences, word):
    table = arms_table(a=dict.fromkeys(range(9), 1.0), b={seed: 1 + each for seed, each in enumerate(differences)})
    found = lab.verdict(table, "b", "a")
    assert found["verdict"] == word and found["pairs"] == len(differences)
    if len(differences) > 1:
        assert found["low"] <= np.mean(differences) <= found["high"]
    else:
        assert np.isnan(found["low"])


def test_arms_are_paired_by_seed_not_by_order():
    table = arms_table(a={1: 1.0, 2: 2.0, 3: 9.0}, b={4: 7.0, 2: 2.5, 1: 1.5})
    found = lab.verdict(table, "b", "a")
    assert (found["pairs"], found["difference"]) == (2, 0.5) and found["low"] == found["high"] == 0.5
    with pytest.raises(ValueError, match="duplicate keys"):
        lab.verdict(pd.concat([table, table]), "b", "a")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_run_is_named(value):
    table = arms_table(a=dict.fromkeys(range(6), 1.0), b=dict.fromkeys(range(5), 2.0) | {5: value})
    found = lab.verdict(table, "b", "a")
    assert found["verdict"] == "not finite on seed 5" and np.isnan(found["difference"])
    compared = lab.paired_differences(table, "a")
    assert not np.isfinite(compared.loc["b", "mean"]), "not averaged away"


def test_comparison_by_hand():
    table = arms_table(a={1: 2.0, 2: 3.0}, b={1: 2.5, 2: 2.9, 3: 9.0})
    compared = lab.paired_differences(table, "a")
    b = compared.loc["b"]
    assert (b["seeds"], b["pairs"]) == (3, 2) and b["mean"] == pytest.approx(4.8)
    assert b["difference"] == pytest.approx(0.2), "over the common seeds"
    assert b["verdict"] == "exploratory" and compared.loc["a", ["difference", "verdict"]].isna().all()
    assert lab.paired_differences(table[table["arm"] == "b"], "a").loc["b", "verdict"] == "not measured"


def test_overlap_by_hand(tmp_path):
    runs = {"a": [[0, 1], [1, 2]], "b": [[0, 3]]}
    trained = {}
    for arm, each in runs.items():
        for number, neurons in enumerate(each):
            run = Run(tmp_path / f"{arm}{number}")
            run.folder.mkdir()
            run.save_kept({"hidden": torch.tensor(neurons), "layer.0.ffn": torch.tensor([number])})
            trained.setdefault(arm, []).append(run)
    shares = hdlib.lab.overlap(trained, "hidden")
    assert shares.loc["a", "a"] == 0.5 and shares.loc["a", "b"] == shares.loc["b", "a"] == 0.25
    assert np.isnan(shares.loc["b", "b"])
    assert hdlib.lab.overlap(trained, "ffn").loc["a", "b"] == 0.5
    with pytest.raises(ValueError, match="no neurons of a group 'fnn'"):
        hdlib.lab.overlap(trained, "fnn")


def test_random_scores_depend_on_the_seed(study):
    runs = study.distill({"chance": {"scorer": "random"}}, [1, 2])["chance"]
    assert runs[0].kept["hidden"] != runs[1].kept["hidden"]


def test_figures_show_the_measured_numbers(study):
    trained = study.distill({"cubic": {}, "one_shot": {"schedule": "one_shot"}}, [1, 2])
    table = hdlib.lab.final_table(trained)
    axes = hdlib.lab.plot_arms(trained).axes[0]
    curves = [run.metrics["held_out_kl"].dropna() for run in trained["cubic"]]
    assert axes.lines[0].get_ydata() == pytest.approx((curves[0] + curves[1]).to_numpy() / 2)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cubic (2)", "one shot (2)"]
    seconds = hdlib.lab.plot_arms(trained, x="seconds").axes[0]
    assert seconds.lines[0].get_xdata()[-1] == pytest.approx(table.loc[table["arm"] == "cubic", "seconds"].mean())
    ends = hdlib.lab.plot_ends(table, "kl", "cubic").axes[0]
    assert [label.get_text() for label in ends.get_yticklabels()] == ["cubic", "one shot"]
    layers = hdlib.lab.plot_layers(trained["cubic"][0], "attention").axes[0]
    assert layers.collections[0].get_array().shape == (2, 3)


def test_the_folders_of_studies_and_results_are_below_the_home_folder(
    teacher, tokenizer, blocks, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DistillConfig(steps=2, batch_size=4, target=0.5, eval_blocks=2)
    study = Study(teacher, tokenizer, *blocks, config, "~/study")
    ((run,),) = study.distill({"plain": {}}, [1]).values()
    assert run.folder == tmp_path / "study" / "plain-seed-1"
    assert hdlib.lab.save_result("~/result", {"kl": 1.0}) == tmp_path / "result" / "result.json"


def test_a_power_law_of_the_steps():
    steps = pd.Index([100, 300, 1000])
    start, exponent = lab.power_law(pd.Series(5.0 * steps.to_numpy(float) ** -0.4, index=steps))
    assert (start, exponent) == pytest.approx((5.0, -0.4))
    assert np.isnan(lab.power_law(pd.Series([1.0], index=[100]))).all()
