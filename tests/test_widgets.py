"""Widgets over recorded runs: content, reaction time, and messages about missing files."""

import asyncio
import base64
import json
import shutil
from statistics import median
from time import perf_counter

import numpy as np
import pytest
from transformers import pipeline

import hdlib
from hdlib import DistillConfig, Run
from hdlib.lab.guesses import guesses
from hdlib.lab.plots import COLOURS

from conftest import ARGUMENTS, random_bert
from recorded import recorded_run


@pytest.fixture(scope="module")
def teacher_of_runs(tokenizer):
    return random_bert(vocabulary=len(tokenizer)), tokenizer


@pytest.fixture(scope="module")
def runs(teacher_of_runs, blocks, tmp_path_factory):
    """Three finished runs: two seeds of one setting, and one of another."""
    folder = tmp_path_factory.mktemp("widgets")
    made = {}
    for name, changes in {"slow-seed-1": {"seed": 1}, "slow-seed-2": {"seed": 2}, "fast": {"steps": 12}}.items():
        config = DistillConfig(**ARGUMENTS | {"keep_last": 10} | changes)
        made[name] = hdlib.distill(*teacher_of_runs, *blocks, config, folder / name)
    return made


@pytest.fixture
def broken(runs, tmp_path):
    """A copy of a run folder, to damage."""
    return shutil.copytree(runs["fast"].folder, tmp_path / "broken")


def png_size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20]), int.from_bytes(png[20:24])


def html_of(widget) -> str:
    """All HTML texts in a widget and its children."""
    return "".join(
        each.value if type(each).__name__ == "HTML" else html_of(each) for each in getattr(widget, "children", ())
    )


def test_a_move_of_the_slider_shows_that_step(runs):
    run = runs["slow-seed-1"]
    explorer = hdlib.lab.explore(run)
    assert explorer.slider.value == 24 and explorer.slider.min == 0
    metrics, pictures = run.metrics, set()
    for step in (0, 6, 12, 24):
        explorer.slider.value = step
        alt = explorer.picture.alt
        assert f"Step {step} of 24" in alt and f"KL to the teacher {metrics.loc[step, 'held_out_kl']:.3f}" in alt
        assert f"hidden {metrics.loc[step, 'hidden_size']} of {metrics.loc[0, 'hidden_size']}" in alt
        assert f"{metrics.loc[step, 'held_out_kl']:.4g}" in explorer.numbers.value
        pictures.add(explorer.picture.png)
    assert len(pictures) == 4 and all(png_size(each)[0] > 1000 for each in pictures)


def test_the_maps_are_those_of_the_last_prune(runs):
    run = runs["slow-seed-1"]
    explorer = hdlib.lab.explore(run)
    for step in (run.pruned_at[1], run.pruned_at[1] + 1):
        explorer.slider.value = step
        stays = run.prune(run.pruned_at[1]).kept["hidden"].numpy()
        drawn = explorer.drawn.maps.images["hidden"].get_array()[0]  # (N, 4), one dot a neuron
        assert np.array_equal(np.all(drawn == 1, axis=1), ~stays), "removed neurons are white, and only those"
    explorer.slider.value = 0
    assert not np.all(explorer.drawn.maps.images["hidden"].get_array() == 1, axis=-1).any(), "none removed at step 0"


def test_darker_is_more_important(runs):
    run = runs["slow-seed-1"]
    explorer = hdlib.lab.explore(run)
    prune = run.prune(run.pruned_at[-1])
    stays, importance = prune.kept["hidden"].numpy(), prune.importance["hidden"].numpy()
    brightness = np.asarray(explorer.drawn.maps.images["hidden"].get_array())[0, stays, :3] @ [0.2126, 0.7152, 0.0722]
    order = np.argsort(importance[stays], kind="stable")
    assert (np.diff(brightness[order]) <= 1e-6).all()


def test_guesses_are_those_of_the_stock_pipeline(runs, teacher_of_runs):
    teacher, tokenizer = teacher_of_runs
    explorer = hdlib.lab.explore(runs["slow-seed-1"], teacher_of_runs)
    explorer.guesser.sentence.value = "the student ___ a layer ."
    student, _ = runs["slow-seed-1"].student()
    for model in (teacher, student):
        pipe = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)
        expected = pipe("the student [MASK] a layer .")
        (found,) = guesses(model, tokenizer, "the student ___ a layer .")
        assert list(found["guess"]) == [each["token_str"] for each in expected]
        assert list(found["probability"]) == pytest.approx([each["score"] for each in expected], rel=1e-4)
        assert f"{found['guess'][0]} {found['probability'][0]:.0%}" in explorer.guesser.answer.value
    assert "student of step 24" in explorer.guesser.answer.value
    explorer.slider.value = 11
    assert "student of step 10" in explorer.guesser.answer.value, "the nearest saved student"


def test_a_causal_model_continues_the_sentence(tokenizer):
    from models import random_model

    model = random_model("gpt2", vocabulary=len(tokenizer))
    (found,) = guesses(model, tokenizer, "the student", count=3)
    ids = tokenizer("the student", return_tensors="pt").input_ids
    best = model(ids).logits[0, -1].softmax(-1).topk(3)
    assert list(found["probability"]) == pytest.approx(best.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("sentence, message", [("no gap", "write ___"), ("", "write"), ("___ " * 99, "positions")])
def test_a_sentence_without_guesses_gives_a_message(sentence, message, runs, teacher_of_runs):
    explorer = hdlib.lab.explore(runs["fast"], teacher_of_runs)
    explorer.guesser.sentence.value = sentence
    explorer.guesser.button.click()
    assert message in explorer.guesser.answer.value


def test_a_run_without_its_teacher_can_be_explored(runs):
    explorer = hdlib.lab.explore(runs["fast"])  # its teacher was never saved, so it cannot be loaded
    explorer.guesser.button.click()
    assert 'role="alert"' in explorer.guesser.answer.value


def _no_metrics(folder):
    (folder / "metrics.jsonl").unlink()


def _damaged_metrics(folder):
    (folder / "metrics.jsonl").write_text("{not json\n")


def _damaged_description(folder):
    (folder / "run.json").write_text("{not json")


def _no_neurons(folder):
    shutil.rmtree(folder / "neurons")


def _damaged_neurons(folder):
    for path in (folder / "neurons").iterdir():
        path.write_bytes(b"x")


def _unfinished(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]))
    for part in ("student", "checkpoints"):
        shutil.rmtree(folder / part)


def _only_begun(folder):
    _no_metrics(folder)
    for part in ("student", "checkpoints", "neurons"):
        shutil.rmtree(folder / part)


def _nothing(folder):
    shutil.rmtree(folder)


BROKEN = {
    _no_metrics: "Nothing has been recorded",
    _damaged_metrics: "damaged",
    _damaged_description: "run.json",
    _no_neurons: "No prune was recorded",
    _damaged_neurons: "neurons",
    _unfinished: "Last recorded step: 4 of 12",
    _only_begun: "Nothing has been recorded",
    _nothing: "no run.json",
}


@pytest.mark.parametrize("harm", BROKEN, ids=lambda harm: harm.__name__)
def test_a_message_names_what_is_missing(harm, broken, runs):
    harm(broken)
    explorer = hdlib.lab.explore(broken)
    assert BROKEN[harm] in html_of(explorer)
    assert "text/plain" in explorer._repr_mimebundle_()
    compared = hdlib.lab.compare(runs["fast"], broken)
    assert set(compared.runs) >= {"fast"}
    watching = hdlib.lab.watch(broken)
    assert watching.alt


def test_the_settings_that_differ_are_shown(runs):
    compared = hdlib.lab.compare(*runs.values())
    settings = compared.children[0].value
    assert "steps" in settings and "1, 2" in settings and "temperature" not in settings
    assert {arm: list(each) for arm, each in compared.arms.items()} == {
        "slow": ["slow-seed-1", "slow-seed-2"],
        "fast": ["fast"],
    }
    ends = {name: run.metrics["held_out_kl"].iloc[-1] for name, run in runs.items()}
    mean = (ends["slow-seed-1"] + ends["slow-seed-2"]) / 2
    assert f"slow {mean:.4g}, fast {ends['fast']:.4g}" in compared.picture.alt
    compared.seeds.value = False
    assert list(compared.arms) == list(runs)


@pytest.mark.parametrize("along", ["step", "seconds", "parameters"])
@pytest.mark.parametrize("measure", ["held_out_kl", "total", "hidden_size", "seconds"])
def test_every_measure_along_every_axis(measure, along, runs):
    compared = hdlib.lab.compare(*runs.values())
    compared.measure.value, compared.along.value = measure, along
    (axes,) = compared._canvas.figure.axes
    column = "elapsed" if along == "seconds" else along
    for arm, line in zip(compared.arms, axes.lines, strict=True):
        metrics = [run.metrics for run in compared.arms[arm].values()]
        last = np.mean([each[column].iloc[-1] if column != "step" else each.index[-1] for each in metrics])
        assert line.get_xdata()[-1] == pytest.approx(last)
        if measure in ("held_out_kl", "hidden_size"):
            assert line.get_ydata()[-1] == pytest.approx(np.mean([each[measure].iloc[-1] for each in metrics]))


def test_a_click_on_a_curve_opens_its_run(runs):
    compared = hdlib.lab.compare(*runs.values())
    for arm, line in compared._lines.items():
        x, y = line.axes.transData.transform(line.get_xydata()[-1])  # the curves end at different steps
        width, height = png_size(compared.picture.png)
        place = {"x": x / width, "y": 1 - y / height}
        compared.picture._handle_custom_msg(place, [])  # as the browser sends it
        (opened,) = compared.explored.children
        assert opened.run.folder.name == compared.chosen.value and compared.chosen.value.startswith(arm)
    compared.chosen.value = None
    assert compared.explored.children == ()
    compared.picture._handle_custom_msg({"x": 0.999, "y": 0.001}, [])
    assert compared.chosen.value is None, "a click beside the curves"


def test_a_message_names_the_runs_without_a_measure(runs, broken):
    """A run without parameters in its record, beside one with them."""
    records = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("parameters")
    (broken / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    compared = hdlib.lab.compare(runs["slow-seed-1"], broken)
    compared.along.value = "parameters"
    assert "broken" in compared.message.value and list(compared.arms) == ["slow"]
    compared.along.value = "step"
    assert compared.message.value == "" and len(compared.arms) == 2
    shutil.copytree(broken, broken.parent / "slow-seed-9")
    arguments = json.loads((runs["slow-seed-1"].folder / "run.json").read_text())
    (broken.parent / "slow-seed-9" / "run.json").write_text(json.dumps(arguments))
    compared = hdlib.lab.compare(runs["slow-seed-1"], broken.parent / "slow-seed-9")
    compared.along.value = "parameters"
    assert list(compared.arms["slow"]) == ["slow-seed-1"], "the other seed is still shown"


def test_no_run_is_lost_when_names_are_equal(runs, tmp_path):
    """Two settings whose names differ in the seed only, and one folder name twice."""
    alike = [tmp_path / "here" / "slow-seed-3", tmp_path / "there" / "slow-seed-3"]
    for folder in alike:
        shutil.copytree(runs["fast"].folder, folder)
    compared = hdlib.lab.compare(runs["slow-seed-1"], runs["slow-seed-2"], alike[0])
    assert [list(each) for each in compared.arms.values()] == [["slow-seed-1", "slow-seed-2"], ["slow-seed-3"]]
    compared = hdlib.lab.compare(*alike)
    assert list(compared.runs) == [str(folder) for folder in alike] and len(compared.arms) == 1


def test_nothing_to_compare():
    assert "no runs to compare" in hdlib.lab.compare().alt


def test_a_run_is_watched_from_before_it_begins_to_its_end(runs, tmp_path):
    """The folder grows in stages, as another process would write it."""
    source, folder = runs["fast"].folder, tmp_path / "growing"
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)

    async def grow():
        watching = hdlib.lab.watch(folder, every=0.01)
        assert "No run has started" in watching.alt
        folder.mkdir()
        shutil.copy(source / "run.json", folder)
        pictures = []
        for count, text in {0: "none of its 12 steps", 4: "Step 3 of 12", 10: "Step 9 of 12", 13: "Finished"}.items():
            (folder / "metrics.jsonl").write_text("".join(lines[:count]))
            if count == 13:
                shutil.copytree(source / "neurons", folder / "neurons")
                shutil.copytree(source / "student", folder / "student")
            for _ in range(12_000):
                if text in watching.alt:
                    break
                await asyncio.sleep(0.05)
            assert text in watching.alt and ("steps per second" in watching.alt) == (count in (4, 10))
            pictures.append(watching.picture.png)
        await asyncio.wait_for(watching._task, 600)
        return watching, pictures

    watching, pictures = asyncio.run(grow())
    assert watching.progress.value == 12 and pictures[1] != pictures[2]
    assert watching.explorer.slider.value == 12, "the finished run is explored in the same place"


def test_a_cell_that_runs_again_pauses_the_earlier_view(runs, tmp_path):
    first = hdlib.lab.watch(tmp_path / "later")
    second = hdlib.lab.watch(tmp_path / "later")
    assert first.pause.value and not second.pause.value


def test_a_run_without_new_records_may_have_stopped(broken):
    import os

    _unfinished(broken)
    old = (broken / "metrics.jsonl").stat().st_mtime - 3600
    os.utime(broken / "metrics.jsonl", (old, old))
    assert "may have stopped" in hdlib.lab.watch(broken).alt and "60 minutes" in hdlib.lab.watch(broken).alt


def test_every_widget_has_a_static_fallback(runs, tmp_path):
    views = (hdlib.lab.explore(runs["fast"]), hdlib.lab.compare(*runs.values()), hdlib.lab.watch(runs["fast"].folder))
    for widget in (*views, hdlib.lab.chooser(tmp_path)):
        bundle = widget._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in bundle
        assert png_size(base64.b64decode(bundle["image/png"]))[0] >= 500
        assert bundle["text/plain"] == widget.alt and len(widget.alt) > 20


@pytest.mark.bench
def test_the_slider_is_quick_on_a_large_run(tmp_path):
    """2,000 steps of a BERT-base: 12 layers of 3,072 neurons, a hundred prunes."""
    explorer = hdlib.lab.explore(recorded_run(tmp_path / "large", steps=2000))
    seconds = []
    for step in range(0, 2000, 130):
        started = perf_counter()
        explorer.slider.value = step
        seconds.append(perf_counter() - started)
    assert median(seconds) < 0.3


@pytest.mark.bench
def test_a_very_long_run_opens_quickly(tmp_path):
    """100,000 logged steps; the best of three, because the machine may be busy."""
    run, seconds = recorded_run(tmp_path / "long", steps=100_000), []
    for _ in range(3):
        started = perf_counter()
        explorer = hdlib.lab.explore(run.folder)
        seconds.append(perf_counter() - started)
    assert explorer.slider.max == 100_000 and min(seconds) < 2.0


# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB without red, green or blue cones.
COLOUR_BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", COLOUR_BLIND)
def test_colours_of_curves_differ_for_colour_blind_readers(kind):
    """Any two colours of the palette differ for such a reader; every arm also has its own line style."""
    hexes = list(COLOURS.values())
    rgb = np.array([[int(each[i : i + 2], 16) / 255 for i in (1, 3, 5)] for each in hexes])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(COLOUR_BLIND[kind]).T, 0, 1)
    distances = [np.linalg.norm(seen[i] - seen[j]) for i in range(len(seen)) for j in range(i)]
    assert min(distances) > 0.08


def test_the_schedule_shows_the_widths_of_the_run(runs):
    run = runs["slow-seed-1"]
    teacher = random_bert()
    (axes,) = hdlib.lab.plot_schedule(run.config, teacher).axes
    drawn = dict(zip(axes.lines[0].get_xdata(), axes.lines[0].get_ydata(), strict=True))
    widths = run.metrics["hidden_size"] / run.metrics.loc[0, "hidden_size"]
    assert drawn == pytest.approx(widths.to_dict())


def test_a_figure_at_a_step_without_a_prune(runs):
    figure = hdlib.lab.plot_run(runs["fast"], 0)
    assert any("not ranked yet" in axes.get_title("left") for axes in figure.axes)
    assert isinstance(Run.load(runs["fast"].folder).config, DistillConfig)
    figure = hdlib.lab.plot_run(runs["fast"], 6)
    assert any("as of step" in axes.get_title("left") for axes in figure.axes)
