"""Fine-tuning: reading and checking tables, measures by hand, SQuAD's answer rules, whole trainings."""

from __future__ import annotations

import ast
import itertools
import json
import random
from copy import copy
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from scipy import stats
from sklearn import metrics
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hdlib import downstream
from hdlib.downstream import FineTuneConfig, SquadConfig, Task, exact_match, load_task, squad_f1
from hdlib.downstream.finetune import MEASURES, measure, sample
from hdlib.downstream.finetune import _tokenised as tokenised
from hdlib.downstream.squad import _targets, _windows, best_spans, score_answers
from hdlib.downstream.tasks import _swap

from conftest import WORDS, full, random_bert, sentences
from models import random_model

DATA = Path(__file__).parents[2] / "shared" / "data"  # real tasks, if the folder exists
FOLDER = Path(downstream.__file__).parent
FINETUNE, SCORE = (import_module(f"hdlib.downstream.{name}") for name in ("finetune", "score"))


# ------------------------------------------------------------------------------------------------------ measures


def test_measures_by_hand():
    labels, predictions = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1]
    # True positives 3, false positives 1, false negatives 1, true negatives 3.
    found = measure(("accuracy", "f1", "macro_f1", "matthews"), labels, predictions)
    assert found == pytest.approx({"accuracy": 6 / 8, "f1": 6 / 8, "macro_f1": 6 / 8, "matthews": (9 - 1) / 16})
    found = measure(("pearson", "spearman"), [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 9.0])
    assert found["pearson"] == pytest.approx(11.5 / np.sqrt(5 * 38.75))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_measures_of_random_rows_against_numpy():
    draw = np.random.default_rng(0)
    labels, predictions = draw.integers(0, 3, 200), draw.integers(0, 3, 200)
    of_class = []
    for each in range(3):
        common = np.sum((labels == each) & (predictions == each))
        of_class.append(2 * common / (np.sum(labels == each) + np.sum(predictions == each)))
    found = measure(("accuracy", "macro_f1"), labels, predictions)
    assert found == pytest.approx({"accuracy": np.mean(labels == predictions), "macro_f1": np.mean(of_class)})
    two = labels > 0, predictions > 1
    assert measure(("matthews",), *two) == pytest.approx({"matthews": np.corrcoef(*two)[0, 1]})
    numbers = draw.normal(size=200), draw.normal(size=200)
    ranks = [each.argsort().argsort() for each in numbers]
    expected = {"pearson": np.corrcoef(*numbers)[0, 1], "spearman": np.corrcoef(*ranks)[0, 1]}
    assert measure(("pearson", "spearman"), *numbers) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman", "f1"])
def test_a_constant_prediction_scores_zero(name):
    assert MEASURES[name]([0, 1, 1, 0], [0, 0, 0, 0]) == 0.0


@pytest.mark.parametrize("name", MEASURES)
def test_invalid_measurements_raise(name):
    with pytest.raises(ValueError, match="unknown measure bleu: use one of accuracy"):
        measure((name, "bleu"), [0], [0])
    with pytest.raises(ValueError):
        measure((name,), [], [])


# --------------------------------------------------------------------------------------------------------- tables


def rows(count: int = 8, **columns) -> dict:
    return {"sentence": sentences(count), "label": [i % 2 for i in range(count)]} | columns


def write(folder: Path, train: dict, validation: dict | None, kind: str = "parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, table in (("train", train), ("validation", validation)):
        frame = pd.DataFrame(table)
        path = folder / f"{stem}.{kind}"
        if table is None:
            continue
        if kind == "parquet":
            frame.to_parquet(path)
        elif kind == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",", quoting=3 if kind == "tsv" else 0)
    return folder.parent


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl"])
def test_every_file_format_gives_the_same_table(tmp_path, kind):
    table = rows(sentence=["None", "NA", '"begun and not ended', *(f'he said "{text}"' for text in sentences(5))])
    found = load_task("cola", write(tmp_path / "cola", table, rows(4), kind))
    assert found["train"].to_dict() == {"text": table["sentence"], "label": table["label"]}
    assert found["validation"].num_rows == 4 and found["train"].features["label"].names == ["0", "1"]


def test_two_texts_named_classes_and_another_held_out_part(tmp_path):
    table = {"first": ["one", "two", "three"], "second": ["eins", "zwei", "drei"], "kind": ["odd", "even", "odd"]}
    pd.DataFrame(table).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame(table).to_csv(tmp_path / "test.csv", index=False)
    task = Task(name="numbers", texts=("first", "second"), label="kind", held_out="test")
    found = load_task(task, tmp_path)
    assert found["validation"].to_dict() == {"text": table["first"], "pair": table["second"], "label": [1, 0, 1]}
    assert found["train"].features["label"].names == ["even", "odd"]


def test_class_names_of_a_table_are_kept(tmp_path):
    kinds = Features({"sentence": Value("string"), "label": ClassLabel(names=["unacceptable", "acceptable"])})
    (tmp_path / "cola").mkdir()
    for part in ("train", "validation"):
        Dataset.from_dict(rows(4), kinds).to_parquet(tmp_path / "cola" / f"{part}.parquet")
    assert load_task("cola", tmp_path)["train"].features["label"].names == ["unacceptable", "acceptable"]


def test_a_regression_reads_numbers(tmp_path):
    table = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 4.5]}
    found = load_task("stsb", write(tmp_path / "stsb", table, table))
    assert list(found["train"]["label"]) == [0.0, 4.5]


@pytest.mark.parametrize(
    ("task", "train", "validation", "message"),
    [
        ("colla", rows(), rows(), "unknown task 'colla': use one of cola, sst2"),
        ("cola", rows(), None, "holds train.parquet, but no validation part"),
        ("cola", {"text": ["a"], "label": [0]}, rows(), "no column 'sentence'; its columns are text, label"),
        ("cola", rows(), {"sentence": ["a"]}, r"\(validation\) has no column 'label'"),
        ("cola", rows(), {"sentence": [], "label": []}, "the validation part is empty"),
        ("cola", rows(), rows(label=[0, 1, 2, 0] * 2), r"\(validation\): row 2 has 2 in column 'label'.*classes 0, 1"),
        ("cola", rows(), rows(label=[-1] * 8), "row 0 has -1 in column 'label', which is not one of the classes 0, 1"),
        ("cola", rows(label=[0, None] * 4), rows(), r"\(train\): row 1 has no value in column 'label'"),
        ("cola", rows(sentence=["a", None] * 4), rows(), r"\(train\): row 1 has no value in column 'sentence'"),
        ("cola", rows(sentence=[1, 2] * 4), rows(), "column 'sentence' must hold texts; it holds Value.'int64'"),
        (Task(name="cola"), rows(label=["x"] * 8), rows(), "the training part has one class only, 'x'"),
        (Task(name="cola"), rows(label=["x", None] * 4), rows(), r"\(train\): row 1 has no value in column"),
        (Task(name="cola"), rows(label=["x", "y"] * 4), rows(label=["x", "z"] * 4), "row 1 has 'z'.*classes 'x', 'y'"),
        (
            Task(name="cola"),
            rows(label=[0.5, 1.5] * 4),
            rows(),
            "fractional numbers such as 0.5, .* Set regression=True",
        ),
        (
            Task(name="cola", regression=True),
            rows(label=["good", "bad"] * 4),
            rows(),
            "'good' in column 'label', but a",
        ),
        (Task(name="cola", regression=True), rows(label=[0.5, np.inf] * 4), rows(), "row 1 has inf in column 'label'"),
    ],
)
def test_invalid_tables_are_refused_before_training(tmp_path, task, train, validation, message):
    source = write(tmp_path / "cola", train, validation)
    with pytest.raises(ValueError, match=message):
        load_task(task, source)


def test_glue_uses_its_authors_measures():
    """Wang et al., 2019: the measure of each task, and the part of the published dev scores."""
    first = {name: task.measures[0] for name, task in downstream.GLUE.items()}
    assert first == {
        **dict.fromkeys(["sst2", "mnli", "qnli", "rte", "wnli"], "accuracy"),
        **dict.fromkeys(["mrpc", "qqp"], "f1"),
        "cola": "matthews",
        "stsb": "spearman",
    }
    held_out = {name: task.held_out for name, task in downstream.GLUE.items()}
    assert held_out == dict.fromkeys(first, "validation") | {"mnli": "validation_matched"}


def test_a_missing_folder_and_an_unreachable_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*/nowhere does not exist"):
        load_task("cola", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"Pass a folder that holds cola/train\.parquet"):
        load_task("cola")
    with pytest.raises(FileNotFoundError, match="the folder ~/nowhere does not exist"):
        load_task("cola", "~/nowhere")
    with pytest.raises(ValueError, match="texts must name one or two columns"):
        Task(name="three", texts=("a", "b", "c"))


@pytest.mark.skipif(not DATA.exists(), reason="needs the folder of real tasks")
@pytest.mark.parametrize(("name", "counts"), [("cola", (8551, 1043)), ("mrpc", (3668, 408)), ("rte", (2490, 277))])
def test_real_tasks(name, counts):
    found = load_task(name, DATA / "glue")
    assert (len(found["train"]), len(found["validation"])) == counts


# --------------------------------------------------------------------------------------------------------- probes


@pytest.fixture(scope="module")
def documentation(tmp_path_factory):
    """Documents of ten packages, five modules each; no paragraph occurs twice."""
    folder, draw = tmp_path_factory.mktemp("documentation"), random.Random(3)
    for part in ("train", "validation"):
        made = []
        for i in range(400):
            package = f"package{'abcdefghij'[i % 10]}"
            paragraphs = [f"{part} {i}-{j} " + " ".join(draw.sample(WORDS, 12)) + "." for j in range(3)]
            if i % 7 == 0:
                paragraphs[0] = f"{package} " + paragraphs[0]
            source = f"{package}.{part}{i // 10 % 5}"
            made.append({"text": "\n\n".join(paragraphs), "package": package, "source": source})
        pd.DataFrame(made).to_parquet(folder / f"{part}.parquet")
    return folder


@pytest.mark.parametrize("name", downstream.PROBES)
def test_probes_are_fixed_balanced_and_disjoint(documentation, name):
    _, found = downstream.load_probe(name, documentation)
    _, again = downstream.load_probe(name, documentation)
    assert {part: rows.to_dict() for part, rows in found.items()} == {
        part: rows.to_dict() for part, rows in again.items()
    }
    bags = {}
    for part, part_rows in found.items():
        counts = np.bincount(part_rows["label"])
        assert len(counts) == part_rows.features["label"].num_classes and counts.min() == counts.max() >= 20
        texts = [text for column in ("text", "pair") if column in part_rows.column_names for text in part_rows[column]]
        bags[part] = {" ".join(sorted(text.split())) for text in texts}  # independent of the word order
        assert len(bags[part]) == len(texts), "a paragraph is used once"
    assert bags["train"].isdisjoint(bags["validation"])
    assert list(found["train"]["label"]) != sorted(found["train"]["label"]), "shuffled"


def test_texts_of_the_package_probe_name_no_package(documentation):
    _, found = downstream.load_probe("package", documentation)
    names = found["train"].features["label"].names
    assert len(names) == 8 and not any(
        name in text for part in found.values() for text in part["text"] for name in names
    )


def test_pairs_of_the_docstring_probe_match_their_labels(documentation):
    _, found = downstream.load_probe("docstring", documentation)
    for row in found["train"]:
        (one, i), (other, j) = (row[column].split()[-13].split("-") for column in ("text", "pair"))
        if row["label"] == 1:
            assert one == other and int(j) == int(i) + 1
        else:
            assert int(one) % 10 == int(other) % 10, "the same package"
            assert int(one) // 10 % 5 != int(other) // 10 % 5, "different modules"


def test_the_order_probe_swaps_two_words_and_nothing_else(documentation):
    _, found = downstream.load_probe("order", documentation)
    whole = {
        " ".join(text.split())
        for text in pd.read_parquet(documentation / "train.parquet")["text"].str.split("\n\n").explode()
    }
    bags = {" ".join(sorted(text.split())): text.split() for text in whole}
    for row in found["train"]:
        words = row["text"].split()
        intact = bags[" ".join(sorted(words))]
        changed = [i for i, (a, b) in enumerate(zip(words, intact, strict=True)) if a != b]
        assert len(changed) == (0 if row["label"] else 2)
        assert words[0] == intact[0] and words[-1] == intact[-1]


def test_swapped_words_differ():
    text = "first same Same same other same last"
    swapped = {_swap(text, random.Random(seed)) for seed in range(50)}
    assert len(swapped) == 4, "other, swapped with each of the four"
    assert text.lower() not in {each.lower() for each in swapped}


def test_an_unknown_probe(documentation):
    with pytest.raises(ValueError, match="unknown probe 'oder': use one of package, docstring, order"):
        downstream.load_probe("oder", documentation)


# ----------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    random_bert(vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learnable(count: int, seed: int) -> dict:
    """Texts labelled by whether they contain "neuron". Lengths vary, so batches by length reorder the rows."""
    draw = random.Random(seed)
    table = {"text": [], "label": []}
    for i in range(count):
        words = draw.choices([word for word in WORDS if word != "neuron"], k=draw.randint(3, 6))
        if i % 4 == 0:
            words[draw.randrange(len(words))] = "neuron"
        table["text"].append(" ".join(words))
        table["label"].append(int(i % 4 == 0))
    return table


@pytest.fixture(scope="module")
def easy():
    task = Task(name="easy", texts=("text",), classes=2, measures=("f1", "accuracy"), epochs=8)
    data = {"train": learnable(400, 1), "validation": learnable(100, 2)}
    made = DatasetDict({part: Dataset.from_dict(table) for part, table in data.items()})
    return task, made.cast_column("label", ClassLabel(names=["without", "with"]))


QUICK = {"learning_rate": 3e-3, "batch_size": 16}


def test_a_checkpoint_learns_and_the_saved_model_has_the_reported_measures(checkpoint, easy, tmp_path):
    task, data = easy
    found = downstream.finetune(checkpoint, task, data, FineTuneConfig(**QUICK), save_to=tmp_path / "tuned")
    assert found["accuracy"] > 0.9 and found["f1"] > 0.8 and found["seconds"] > 0
    # Stock code, one text at a time, in row order.
    classify = pipeline("text-classification", model=str(tmp_path / "tuned"), device="cpu")
    answers = [classify(text)[0]["label"] for text in data["validation"]["text"]]
    labels = data["validation"].features["label"].int2str(data["validation"]["label"])
    assert found["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(answers, labels, strict=True)]))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, answers, pos_label="with"))


def test_weights_depend_on_the_seed_alone(checkpoint, easy, tmp_path):
    weights = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        downstream.finetune(checkpoint, *easy, FineTuneConfig(seed=seed, epochs=1, **QUICK), save_to=tmp_path / name)
        weights.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict())
    one, same, other = weights
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("dense.weight"))


@pytest.mark.full
def test_a_regression_is_learned(checkpoint, easy, tmp_path):
    _, data = easy
    count = {
        part: {
            "text": rows["text"],
            "label": [1.0 * text.count("neuron") + text.count("a") / 20 for text in rows["text"]],
        }
        for part, rows in data.items()
    }
    data = DatasetDict(
        {
            part: Dataset.from_dict({"text": list(table["text"]), "label": table["label"]})
            for part, table in count.items()
        }
    )
    task = Task(name="length", texts=("text",), regression=True, measures=("spearman", "pearson"), epochs=8)
    found = downstream.finetune(checkpoint, task, data, FineTuneConfig(**QUICK), save_to=tmp_path)
    assert found["spearman"] > 0.6 and found["pearson"] > 0.9
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    with torch.no_grad():
        answers = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in data["validation"]["text"]]
    assert found["pearson"] == pytest.approx(stats.pearsonr(data["validation"]["label"], answers).statistic, rel=1e-4)
    assert downstream.baselines(task, data).set_index("model").loc["majority", "score"] == 0.0


def test_the_second_text_is_read(checkpoint, easy):
    """Only the second text determines the label."""
    task, data = easy
    pairs = {
        part: {"text": ["a step"] * len(rows), "pair": list(rows["text"]), "label": list(rows["label"])}
        for part, rows in data.items()
    }
    features = Features({"text": Value("string"), "pair": Value("string"), "label": data["train"].features["label"]})
    data = DatasetDict({part: Dataset.from_dict(table, features) for part, table in pairs.items()})
    found = downstream.finetune(checkpoint, replace(task, texts=("text", "pair")), data, FineTuneConfig(**QUICK))
    assert found["accuracy"] > 0.9
    bags = downstream.baselines(task, data).set_index("model")
    assert bags.loc["bag_of_words", "accuracy"] > 0.85 > bags.loc["majority", "accuracy"]


def test_rows_are_sampled_from_the_whole_table():
    """Tables are often sorted by class."""
    rows = Dataset.from_dict({"text": [str(i) for i in range(100)], "label": [i // 50 for i in range(100)]})
    few = sample(rows, 20)
    assert len(set(few["text"])) == 20 and 4 < sum(few["label"]) < 16
    assert list(few["text"]) == list(sample(rows, 20)["text"])


def test_baselines_by_hand(easy):
    found = downstream.baselines(*easy).set_index("model")
    assert found.loc["majority", "accuracy"] == 0.75 and found.loc["majority", "score"] == 0.0, "f1 comes first"
    assert found.loc["bag_of_words", "accuracy"] > 0.85, "one word determines the label"


def test_fewer_rows_are_the_same_for_models_and_baselines(easy, checkpoint, monkeypatch):
    task, data = easy
    seen = []
    monkeypatch.setattr(FINETUNE, "_tokenised", lambda rows, *rest: seen.append(rows) or tokenised(rows, *rest))
    downstream.finetune(checkpoint, task, data, FineTuneConfig(train_rows=20, epochs=1, **QUICK))
    assert list(seen[0]["text"]) == list(sample(data["train"], 20)["text"]) and len(seen[0]) == 20
    assert len(seen[1]) == 100, "the held-out part is not sampled"
    few, every = (downstream.baselines(task, data, rows)["accuracy"][1] for rows in (20, None))
    assert few < every == downstream.baselines(task, data, 10_000)["accuracy"][1]


def test_only_the_head_may_be_new(checkpoint, easy, tokenizer, tmp_path):
    model = random_bert(vocabulary=len(tokenizer))
    weights = {name: value for name, value in model.state_dict().items() if "layer.1.output.dense" not in name}
    model.save_pretrained(tmp_path, state_dict={name: value.clone() for name, value in weights.items()})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights outside the head are missing.*: bert.encoder.layer.1.output.dense"):
        downstream.finetune(tmp_path, *easy, FineTuneConfig())
    with pytest.raises(ValueError, match="cannot be opened for fine-tuning"):
        downstream.finetune(tmp_path / "nowhere", *easy, FineTuneConfig())


def saved(folder, name: str, tokenizer, head: type | None = None, **options):
    """A checkpoint of a family with random weights, with another head if it is given."""
    model = random_model(name, vocabulary=len(tokenizer), **options)
    (head(model.config) if head else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ONE_STEP = FineTuneConfig(train_rows=8, batch_size=8, epochs=1)


def test_a_head_of_another_shape_is_replaced_and_a_backbone_is_not(checkpoint, easy, tokenizer, tmp_path):
    task, data = easy
    three = data["train"].cast_column("label", ClassLabel(names=["without", "with", "perhaps"]))
    three = DatasetDict(train=three, validation=three.take(4))
    downstream.finetune(
        checkpoint, replace(task, classes=3, measures=("accuracy",)), three, ONE_STEP, save_to=tmp_path / "three"
    )
    with pytest.warns(UserWarning, match="three: a new head replaces one of another shape: classifier.bias, class"):
        downstream.finetune(tmp_path / "three", task, data, ONE_STEP, save_to=tmp_path / "two")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "two").num_labels == 2
    numbers = DatasetDict({part: rows.cast_column("label", Value("double")) for part, rows in data.items()})
    score = replace(task, regression=True, classes=None, measures=("spearman",))
    with pytest.warns(UserWarning, match="a new head"):
        downstream.finetune(tmp_path / "two", score, numbers, ONE_STEP, save_to=tmp_path / "number")
    assert AutoConfig.from_pretrained(tmp_path / "number").problem_type == "regression"
    answers = DatasetDict(dict.fromkeys(("train", "validation"), find_the_neuron(4, 1, False)))
    config = SquadConfig(epochs=1, length=28)
    assert "f1" in downstream.finetune_squad(tmp_path / "three", downstream.SQUAD["squad"], answers, config)
    path = tmp_path / "two" / "config.json"
    for changes, words in (({"vocab_size": 90}, "word_embeddings"), ({"num_hidden_layers": 1}, "encoder.layer.1")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 60, "num_hidden_layers": 2} | changes))
        with pytest.raises(ValueError, match=f"weights outside the head are missing, or do not fit .*{words}"):
            downstream.finetune(tmp_path / "two", task, data, ONE_STEP)


@pytest.mark.parametrize("name", ["roberta", "gpt2", *full("bert", "distilbert", "llama", "opt")])
def test_texts_are_cut_to_the_positions_of_the_model(name, tokenizer, tmp_path):
    """A tokenizer without model_max_length, and texts longer than the 24 positions."""
    positions = 26 if name == "roberta" else 24  # the first ones are of the padding token
    endless = copy(tokenizer)
    endless.model_max_length = int(1e30)
    folder = saved(tmp_path / "model", name, endless, max_position_embeddings=positions, pad_token_id=1)
    rows = {"text": ["the student learns a slow step " * 9] * 8, "label": [0, 1] * 4}
    rows = Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["no", "yes"]))
    task = Task(name="long", texts=("text",), classes=2)
    data = DatasetDict(train=rows, validation=rows)
    assert downstream.finetune(folder, task, data, ONE_STEP, save_to=tmp_path / "tuned")["accuracy"] == 0.5
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").model_max_length == 24
    if name in ("bert", "roberta"):
        squad = Dataset.from_dict(find_the_neuron(4, 1, False).to_dict() | {"question": ["width? " * 20] * 4})
        data, config = DatasetDict(train=squad, validation=squad), SquadConfig(epochs=1)
        assert "f1" in downstream.finetune_squad(folder, downstream.SQUAD["squad"], data, config)


def test_a_question_leaves_room_for_its_passage(tokenizer):
    for length, words in itertools.product((12, 16, 28, 32), (1, 4, 10, 20, 40)):
        limited = copy(tokenizer)
        limited.model_max_length = length
        batch = questions(("a step " * 20, "width " * words, [])).to_dict()
        windows = _windows(batch, limited, SquadConfig())
        assert max(map(len, windows["input_ids"])) == length
        assert all(sum(begin >= 0 for begin, _ in each) for each in windows["offsets"])


def test_rows_are_padded_with_the_token_that_the_model_takes_for_padding(easy, tokenizer, tmp_path):
    """A causal head reads the last token that is not padding; the alone text and the padded one must agree."""
    for pad in (None, 2, 30):  # none, another special token, an ordinary one
        folder = saved(tmp_path / str(pad), "gpt2", tokenizer, pad_token_id=pad)
        model, its_tokenizer = FINETUNE.open_with_head(AutoModelForSequenceClassification, folder, num_labels=2)
        texts = ["the step", "the student learns a slow step"]
        together, alone = (its_tokenizer(each, padding=True, return_tensors="pt") for each in (texts, texts[:1]))
        model.eval()
        with torch.no_grad():
            assert torch.allclose(model(**together).logits[0], model(**alone).logits[0], atol=1e-5), pad


@pytest.mark.parametrize(
    "remove, add, message",
    [
        ("tokenizer.json", None, "holds no tokenizer"),
        ("model.safetensors", None, "cannot be opened for fine-tuning: .*no file named model.safetensors"),
        ("model.safetensors", "model.safetensors", "cannot be opened for fine-tuning: .*header"),
        ("config.json", None, "cannot be opened for fine-tuning"),
    ],
)
def test_a_checkpoint_that_is_not_whole(remove, add, message, easy, tokenizer, tmp_path):
    (saved(tmp_path, "bert", tokenizer) / remove).unlink()
    if add:
        (tmp_path / add).write_bytes(b"{")
    with pytest.raises(ValueError, match=message) as refusal:
        downstream.finetune(tmp_path, *easy, ONE_STEP)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_larger_than_the_embedding(easy, tokenizer, tmp_path):
    random_bert(vocabulary=len(tokenizer) - 1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 59 embeddings for 60 tokens"):
        downstream.finetune(tmp_path, *easy, ONE_STEP)


def test_the_home_folder_is_expanded(easy, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "model", "bert", tokenizer)
    downstream.finetune("~/model", *easy, ONE_STEP, save_to="~/tuned")
    assert (tmp_path / "tuned" / "tokenizer.json").exists()
    downstream.score({"a": "~/model"}, {"easy": easy}, [1e-3], [1], "~/scores", train_rows=8, epochs=1)
    assert list((tmp_path / "scores").glob("easy-a-*.json"))


@pytest.mark.parametrize("variable", ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"])
def test_a_slow_hub_is_waited_for(variable, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, variable, 77)
    waited = []
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between its attempts
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, timeout: waited.append(timeout))
    with pytest.raises(FileNotFoundError):
        load_task("rte", "some/data")
    assert waited == [77]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0; got 0.0"),
        ({"batch_size": -1}, "batch_size must be above 0"),
        ({"epochs": 0}, "epochs must be above 0; got 0"),
        ({"train_rows": 0}, "train_rows must be above 0; got 0"),
        ({"warmup": 1.0}, "warmup must be a fraction of the steps"),
        ({"precision": "float16"}, "precision must be float32 or bfloat16; got 'float16'"),
    ],
)
def test_invalid_arguments_raise(changes, message):
    for config in (FineTuneConfig, SquadConfig):
        with pytest.raises(ValueError, match=message):
            config(**changes)
    with pytest.raises(ValueError, match="stride must be above 0; got 0"):
        SquadConfig(stride=0)


def test_diverged_training_raises(checkpoint, easy):
    config = FineTuneConfig(learning_rate=1e30, epochs=1)
    with pytest.raises(ArithmeticError, match=r"diverged: weights are not finite. Lower learning_rate \(now 1e\+30"):
        downstream.finetune(checkpoint, *easy, config)


def test_a_trainer_uses_one_gpu_of_several(monkeypatch):
    """It would wrap the model in DataParallel, and use the batch size on each."""
    seen = []
    monkeypatch.setattr(FINETUNE.TrainingArguments, "n_gpu", 4)
    monkeypatch.setattr(FINETUNE, "Trainer", lambda model, arguments, **_: seen.append(arguments._n_gpu))
    with pytest.raises(AttributeError):  # there is no Trainer
        FINETUNE.train_with(None, None, FineTuneConfig(), 1.0, None)
    assert seen == [1]


def test_bfloat16_is_of_products_and_float32_of_weights(checkpoint, easy, tmp_path):
    trained = []
    for precision in ("bfloat16", "float32"):
        downstream.finetune(
            checkpoint, *easy, replace(ONE_STEP, train_rows=32, precision=precision), save_to=tmp_path / precision
        )
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / precision, dtype="auto")
        trained.append(saved.state_dict())
    half, whole = trained
    assert {weight.dtype for weight in half.values()} == {torch.float32}
    assert not all(torch.equal(half[name], whole[name]) for name in whole), "precision has an effect"


@pytest.mark.full
def test_bfloat16_learns_the_same_task(checkpoint, easy):
    found = downstream.finetune(checkpoint, *easy, FineTuneConfig(precision="bfloat16", epochs=5, **QUICK))
    assert found["accuracy"] > 0.9


def test_a_table_over_checkpoints_tasks_and_seeds(easy, tmp_path, monkeypatch):
    trained = []

    def pretend(checkpoint, task, data, config, save_to=None):
        trained.append((checkpoint, config.learning_rate, config.seed))
        good = {("a", 1e-3): 0.5, ("a", 1e-2): 0.7, ("b", 1e-3): 0.6, ("b", 1e-2): 0.4}[
            checkpoint, config.learning_rate
        ]
        return {"f1": good + config.seed**2 / 100, "accuracy": 1 - good, "seconds": 1.0}

    monkeypatch.setattr(SCORE, "finetune", pretend)
    arguments = {
        "checkpoints": {"A": "a", "B": "b"},
        "tasks": {"easy": easy},
        "learning_rates": [1e-3, 1e-2],
        "seeds": [1, 2, 3],
    }
    table = downstream.score(**arguments, folder=tmp_path)
    assert len(trained) == 2 * (2 + 3), "every rate on the tuning seed, the best on the others"
    by_model = table.set_index("model")
    assert set(by_model.loc["A", "learning_rate"]) == {1e-2} and set(by_model.loc["B", "learning_rate"]) == {1e-3}
    assert list(by_model.loc["A", "score"]) == pytest.approx([0.71, 0.74, 0.79])
    assert downstream.summary(table)["easy"].to_dict() == {
        "A": "74.0 [71.0, 79.0]",
        "B": "64.0 [61.0, 69.0]",
        "majority": "0.0",
        "bag_of_words": f"{100 * by_model.loc['bag_of_words', 'score']:.1f}",
    }
    renamed = downstream.score(**arguments | {"tasks": {"hard": easy}}, folder=tmp_path)
    assert set(renamed["task"]) == {"hard"}, "baselines have the given name too"
    again = downstream.score(**arguments, folder=tmp_path)
    assert len(trained) == 10 and again.equals(table), "finished trainings are not repeated"
    only = downstream.score(**arguments | {"seeds": [1, 4]}, folder=tmp_path, draw_only=True)
    assert len(trained) == 10 and only["seed"].dropna().tolist() == [1, 1]
    with pytest.raises(ValueError, match="a training with other settings: batch_size was 32, is 16"):
        downstream.score(**arguments, folder=tmp_path, batch_size=16)


def test_a_function_gives_the_checkpoint_of_each_seed(easy, tmp_path, monkeypatch):
    trained = []

    def pretend(checkpoint, task, data, config, save_to=None):
        trained.append((checkpoint, config.seed))
        return {"f1": 0.5, "accuracy": 0.5, "seconds": 1.0}

    monkeypatch.setattr(SCORE, "finetune", pretend)
    arguments = {"checkpoints": {"A": "a-{}".format}, "tasks": {"easy": easy}, "learning_rates": [1e-3, 1e-2]}
    downstream.score(**arguments, seeds=[1, 2], folder=tmp_path)
    assert trained == [("a-0", 0), ("a-0", 0), ("a-1", 1), ("a-2", 2)], "the tuning seed has its own"


def test_a_diverging_rate_is_not_selected(easy, tmp_path, monkeypatch):
    def pretend(checkpoint, task, data, config, save_to=None):
        if config.learning_rate == 1e-1:
            raise ArithmeticError("its logits are not finite")
        return {"f1": 0.0, "accuracy": 0.5, "seconds": 1.0}  # the lowest score, and still selected

    monkeypatch.setattr(SCORE, "finetune", pretend)
    arguments = {"checkpoints": {"A": "a"}, "tasks": {"easy": easy}, "seeds": [1]}
    table = downstream.score(**arguments, learning_rates=[1e-1, 1e-3], folder=tmp_path)
    assert table["learning_rate"].dropna().tolist() == [1e-3]
    with pytest.raises(ArithmeticError, match="not finite"):  # a reported training must not diverge
        downstream.score(**arguments, learning_rates=[1e-1], folder=tmp_path)


# ---------------------------------------------------------------------------------------------------------- SQuAD


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Broncos!", ["broncos"], 1, 1),  # articles, case and punctuation are ignored
        ("an apple a day", ["Apple day"], 1, 1),
        ("Theodore", ["The odore"], 0, 0),  # an article is a whole word
        ("U.S.", ["US"], 1, 1),  # punctuation is removed without leaving a space
        ("well-known", ["well known"], 0, 0),
        ("Denver Broncos", ["Broncos"], 0, 2 / 3),  # precision 1/2, recall 1
        ("Broncos", ["Denver Broncos", "the Broncos"], 1, 1),  # the maximum over the answers
        ("new new york", ["new york york"], 0, 2 / 3),  # repeated words count
        ("york new new", ["new new"], 0, 4 / 5),
        ("", [], 1, 1),  # no answer, none predicted
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("the", ["a"], 1, 1),  # both are empty after normalisation
        ("Denver", ["the", "Denver"], 1, 1),  # an answer that is empty after normalisation is ignored
        ("", ["the", "Denver"], 0, 0),
        ("  42   km ", ["42 km"], 1, 1),
    ],
)
def test_answers_are_scored_by_the_published_rules(prediction, answers, exact, f1):
    assert exact_match(prediction, answers) == exact
    assert squad_f1(prediction, answers) == pytest.approx(f1)


def questions(*each: tuple[str, str, list[tuple[str, int]]]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "id": f"q{i}",
                "context": context,
                "question": question,
                "answers": {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]},
            }
            for i, (context, question, answers) in enumerate(each)
        ]
    )


def test_means_over_questions_with_and_without_an_answer():
    some = questions(("x one", "?", [("one", 2)]), ("x two three", "?", [("two three", 2)]), ("x", "?", []))
    found = score_answers({"q0": "one", "q1": "two", "q2": "x"}, some)
    assert found == pytest.approx(
        {
            "exact": 1 / 3,
            "f1": (1 + 2 / 3) / 3,
            "answerable_exact": 1 / 2,
            "answerable_f1": 5 / 6,
            "unanswerable_exact": 0,
            "unanswerable_f1": 0,
        }
    )
    assert set(score_answers({"q0": "", "q1": ""}, some.select([0, 1]))) == {"exact", "f1"}


def test_the_best_span_over_windows_or_none():
    context = "alpha beta gamma delta"
    some = questions((context, "?", [("beta", 6)]), (context, "?", []))
    outside, words = (-1, -1), [(0, 5), (6, 10), (11, 16), (17, 22)]
    windows = Dataset.from_dict(
        {
            "row": ["q0", "q0", "q1"],
            "offsets": [
                [outside, outside, words[0], words[1]],
                [outside, outside, words[2], words[3]],
                [outside, outside, *words[:2]],
            ],
        }
    )
    starts = np.array([[0, 99, 1, 3], [0, 99, 4, 1], [6, 99, 1, 2]], dtype=float)  # 99: a token of the question
    ends = np.array([[0, 99, 2, 1], [0, 99, 0.5, 3], [6, 99, 1, 2]], dtype=float)
    assert best_spans(starts, ends, windows, some) == {"q0": "gamma delta", "q1": ""}
    assert best_spans(starts, ends, windows, some, longest_answer=1)["q0"] == "gamma"
    assert best_spans(starts[:2], ends[:2], windows.select([0, 1]), some.select([0])) == {"q0": "gamma delta"}
    ends[1, 3] = 0  # an end before its start would now be best
    starts[1], ends[1] = [0, 0, 0, 9], [0, 0, 9, 0]
    assert best_spans(starts, ends, windows, some)["q0"] == "delta"


def find_the_neuron(count: int, seed: int, empty: bool) -> Dataset:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        words = draw.choices(["a", "step", "loss", "keeps"], k=draw.randint(20, 40))
        answers = []
        if not (empty and i % 3 == 0):
            words[draw.randrange(len(words))] = "neuron"
            answers = [("neuron", " ".join(words).index("neuron"))]
        made.append((" ".join(words), "width?", answers))
    return questions(*made)


@pytest.mark.full
def test_squad_is_learned_in_windows_with_and_without_answers(checkpoint):
    data = DatasetDict(train=find_the_neuron(300, 1, True), validation=find_the_neuron(60, 2, True))
    config = SquadConfig(learning_rate=3e-3, epochs=4, batch_size=16, length=28, stride=8)
    found = downstream.finetune_squad(checkpoint, downstream.SQUAD["squad_v2"], data, config)
    assert found["exact"] > 0.9 and found["answerable_f1"] > 0.85 and found["unanswerable_f1"] > 0.85


def _tokenizer_and(checkpoint, settings: dict):
    return AutoTokenizer.from_pretrained(checkpoint), SquadConfig(**settings)


def test_a_window_with_part_of_the_answer_has_no_target(tokenizer):
    context, begun, ended = "a step " * 12, 0, 0
    for begin in range(9, 72, 7):
        batch = questions((context, "a", [("step a", begin)])).to_dict()
        windows = _targets(_windows(batch, tokenizer, SquadConfig(length=14, stride=3)), batch, tokenizer.cls_token_id)
        for ids, offsets, start, end in zip(
            *(windows[name] for name in ("input_ids", "offsets", "start_positions", "end_positions")), strict=True
        ):
            inside = [offset for offset in offsets if offset[0] >= 0]
            first, last = inside[0][0], inside[-1][1]
            if first <= begin and last >= begin + 6:
                assert context[offsets[start][0] : offsets[end][1]] == "step a"
            else:
                assert start == end == ids.index(tokenizer.cls_token_id)
                begun += first <= begin < last
                ended += first < begin + 6 <= last
    assert begun and ended, "some windows hold only the beginning, some only the end"


def test_squad_is_scored_like_any_task(checkpoint, tmp_path, monkeypatch):
    seen = []
    trained = downstream.squad.train_with
    monkeypatch.setattr(
        downstream.squad, "train_with", lambda model, rows, *rest: seen.append(len(rows)) or trained(model, rows, *rest)
    )
    for part, seed in (("train", 1), ("validation", 2)):
        (tmp_path / "squad_v2").mkdir(exist_ok=True)
        find_the_neuron(60, seed, True).to_parquet(tmp_path / "squad_v2" / f"{part}.parquet")
    tasks = {"squad_v2": downstream.load_squad("squad_v2", tmp_path)}
    settings = {"epochs": 1, "length": 28, "stride": 8, "train_rows": 30}
    table = downstream.score({"A": checkpoint}, tasks, [1e-3], [1], tmp_path / "trained", **settings)
    assert list(table["model"]) == ["A", "majority"]
    assert table["score"][1] == table["f1"][1] == pytest.approx(1 / 3), "a third of the questions have no answer"
    kept = json.loads(next((tmp_path / "trained").glob("*.json")).read_text())
    whole = len(_windows(find_the_neuron(60, 1, True).to_dict(), *_tokenizer_and(checkpoint, settings))["row"])
    assert 30 <= seen[0] < 0.7 * whole, "half of the questions"
    assert kept["settings"]["stride"] == 8 and kept["found"]["exact"] == table["exact"][0]


@pytest.mark.skipif(not DATA.exists(), reason="needs the folder of real tasks")
def test_targets_of_real_questions_are_their_answers(tokenizer):
    from transformers import AutoTokenizer

    from hdlib.downstream import squad

    real = AutoTokenizer.from_pretrained(DATA / "bert-base-uncased-tokenizer")
    rows = Dataset.from_parquet(str(DATA / "glue" / "squad_v2" / "validation.parquet")).select(range(0, 11873, 40))
    batch = rows.to_dict()
    windows = squad._targets(squad._windows(batch, real, SquadConfig(length=160, stride=64)), batch, real.cls_token_id)
    shape = (len(windows["input_ids"]), 160)
    starts, ends = np.zeros(shape), np.zeros(shape)
    starts[np.arange(shape[0]), windows["start_positions"]] = 1
    ends[np.arange(shape[0]), windows["end_positions"]] = 1
    for scores in (starts, ends):  # a window with the answer outweighs one without
        scores[np.array(windows["start_positions"]) == 0, 0] = 0.5
    kept = Dataset.from_dict({name: windows[name] for name in ("row", "offsets")})
    found = score_answers(best_spans(starts, ends, kept, rows), rows)
    assert found["exact"] > 0.99 and found["f1"] > 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": ["other text"]}, "question q0: the answer 'one' is not at character 2"),
        ({"answers": None}, "has no column 'answers'"),
        ({"id": []}, "the train part is empty"),
    ],
)
def test_invalid_questions_raise(tmp_path, change, message):
    (tmp_path / "squad").mkdir()
    good = questions(("x one", "?", [("one", 2)]))
    bad = good.to_dict() | change
    if change.get("id") == []:
        bad = {name: [] for name in bad}
    Dataset.from_dict({name: column for name, column in bad.items() if column is not None}).to_parquet(
        tmp_path / "squad" / "train.parquet"
    )
    good.to_parquet(tmp_path / "squad" / "validation.parquet")
    with pytest.raises(ValueError, match=message):
        downstream.load_squad("squad", tmp_path)


def test_only_two_versions_of_squad():
    with pytest.raises(ValueError, match=r"unknown version of SQuAD 'squad_v3': use squad \(1.1\) or squad_v2"):
        downstream.load_squad("squad_v3")


# ---------------------------------------------------------------------------------------------------------- stock


def test_downstream_imports_nothing_of_the_method_but_the_documentation():
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module == "text.documentation", f"{path.name} imports {node.module}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "hdlib" for name in names), path.name
