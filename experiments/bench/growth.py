"""Growth of the cost: time of a step by its tokens, memory by the size of the text and by the steps of a run.

Memory is the anonymous memory of a process, as Linux counts it. It excludes the pages of memory-mapped files, which
the system can reclaim.
"""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import load_dataset
from matplotlib.figure import Figure

import hdlib
from hdlib.data import Masking, TrainingBatches
from hdlib.lab.plots import COLOURS, MARKERS, STYLES
from hdlib.text.documentation import gather

from .turns import in_turns
from .work import Setting, Work

BATCHES = (1, 2, 4, 8, 16)  # sequences a step
LENGTHS = (32, 64, 128, 256, 512)  # tokens a sequence
MEGABYTES = (1, 10, 100, 1000, 2000)  # of text
READ = 200  # batches read from each text
ALONG, PRECISIONS = "along a run", ("float32", "bfloat16")
STEPS = 600  # of the run whose memory is measured; the first half prune


def measure(setting: Setting) -> pd.DataFrame:
    """Long form: a row for each `question` and `x`, with `y` and, for times, `lowest` and `highest`."""
    parts = [_seconds(setting), _corpora(setting), _run()]
    return pd.concat(parts, ignore_index=True).set_index(["question", "x"])


def _seconds(setting: Setting) -> pd.DataFrame:
    """Seconds of a step by its tokens: more sequences of the setting's length, and longer sequences."""
    sizes = {f"sequences of {setting.length}": [(batch, setting.length) for batch in BATCHES]}
    sizes[f"{setting.batch_size} longer sequences"] = [(setting.batch_size, length) for length in LENGTHS]
    work = Work(setting)
    loss = work.loss()

    def step(batch_size: int, length: int) -> None:
        work.read(batch_size, length)
        with work.recording():
            work.backward(loss)
            work.importance.update(work.student)

    calls = {
        (question, batch_size * length): partial(step, batch_size, length)
        for question, settings in sizes.items()
        for batch_size, length in settings
    }
    seconds = in_turns(calls, setting.turns, setting.device)
    rows = [
        {"question": question, "x": tokens, "y": found.median(), "lowest": found.min(), "highest": found.max()}
        for (question, tokens), found in seconds.items()
    ]
    return pd.DataFrame(rows)


def _corpora(setting: Setting) -> pd.DataFrame:
    """Megabytes of a process that makes blocks of a text and reads batches, by the size of the text."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in MEGABYTES:
            text = _written(Path(folder) / f"{megabytes}.txt", megabytes)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                held = fresh.submit(_read, text, Path(folder) / "cache", setting).result()
            text.unlink()
            rows += [{"question": part, "x": megabytes, "y": held[part]} for part in held]
            print(rows[-len(held) :], flush=True)
    return pd.DataFrame(rows)


def _written(path: Path, megabytes: int) -> Path:
    """The embedded documentation, repeated; each paragraph has a different number."""
    paragraphs = list(load_dataset("parquet", data_files=f"{gather()}/train.parquet", split="train")["text"])
    size = number = 0
    with path.open("w") as file:
        while size < megabytes * 1e6:
            text = f"{number} {paragraphs[number % len(paragraphs)]}".replace("\n", " ") + "\n\n"
            size, number = size + file.write(text), number + 1
    return path


def _read(text: Path, cache: Path, setting: Setting) -> dict[str, float]:
    """Peak megabytes while making blocks and while reading batches; runs in a fresh process."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    _, tokenizer = hdlib.load_teacher()
    with _highest_memory() as made:
        train, _ = hdlib.load_corpus(text, tokenizer, setting.length)
    with _highest_memory() as read:
        batches = TrainingBatches(train, Masking.of(tokenizer), setting.batch_size, seed=0)
        for step in range(READ):
            batches[step]
    return {"making blocks": made[0], "reading batches": read[0]}


def _run() -> pd.DataFrame:
    """Megabytes by step of a run on a small model, where a leak is visible early; in fresh processes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        runs = {precision: fresh.submit(_followed, STEPS, precision).result() for precision in PRECISIONS}
    parts = [pd.DataFrame({"question": f"{ALONG}, {name}", "x": range(len(y)), "y": y}) for name, y in runs.items()]
    return pd.concat(parts)


def _followed(steps: int, precision: str) -> list[float]:
    teacher, tokenizer = hdlib.load_teacher()
    train, validation = hdlib.load_corpus("embedded", tokenizer, 32)
    narrowing = {"target": 0.3, "prune_every": 1, "prune_end": 0.5}
    config = hdlib.DistillConfig.paper(
        steps=steps, batch_size=8, checkpoint_every=steps, eval_every=steps, precision=precision, **narrowing
    )
    held = []
    with tempfile.TemporaryDirectory() as folder:
        hdlib.distill(teacher, tokenizer, train, validation, config, folder, on_step=lambda record: held.append(_own()))
    return held


@contextmanager
def _highest_memory():
    """A list with one entry: the peak memory of this process within the block, in megabytes."""
    highest, done = [_own()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], _own())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def _own() -> float:
    """Megabytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1e3


def plot(table: pd.DataFrame) -> Figure:
    """Three panels: seconds of a step by tokens, with a linear fit; memory by text; memory by step of a run."""
    figure, (times, texts, run) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    colours = list(COLOURS.values())
    questions = {question: part.droplevel(0) for question, part in table.groupby(level=0, sort=False)}
    along = {name: questions.pop(f"{ALONG}, {name}")["y"] for name in PRECISIONS}
    memory = {name: questions.pop(name)["y"] for name in ("making blocks", "reading batches")}
    for number, (question, part) in enumerate(questions.items()):
        spread = [part["y"] - part["lowest"], part["highest"] - part["y"]]
        style = {"color": colours[number], "marker": MARKERS[number], "capsize": 2, "label": question}
        times.errorbar(part.index, part["y"], yerr=spread, linestyle="none" if number else "", **style)
    tokens = np.array(sorted({x for part in questions.values() for x in part.index}))
    slope, start = _line(questions)
    times.plot(tokens, start + slope * tokens, color=COLOURS["grey"], label=f"{1000 * slope:.2f} ms a token")
    times.set(xlabel="tokens a step", ylabel="seconds a step", title="time of a step")
    for number, (name, held) in enumerate(memory.items()):
        texts.plot(held.index, held, color=colours[number], marker=MARKERS[number], label=name)
    texts.set(xscale="log", xlabel="megabytes of text", ylabel="peak memory, MB", title="memory, by corpus")
    for number, (name, held) in enumerate(along.items()):
        run.plot(held.index, held, color=colours[number], linestyle=STYLES[number], label=name)
    run.set(xlabel="step", ylabel="memory, MB", title="memory, along a run")
    for axes in (texts, run):
        axes.set_ylim(bottom=0)
    for axes in (times, texts, run):
        axes.legend(frameon=False)
    return figure


def _line(questions: dict[str, pd.DataFrame]) -> tuple[float, float]:
    """Slope and intercept of the linear fit over sequences of one length, where attention has a constant cost."""
    part = next(iter(questions.values()))
    return tuple(np.polyfit(part.index, part["y"], 1))
