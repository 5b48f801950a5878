"""Benchmarks at BERT-base shapes in bfloat16: the step, its memory, a prune, the loop along the homotopy, the paper."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import yaml
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

import hdlib
from hdlib.config import PAPER as RECIPE
from hdlib.data import Blocks, Masking, labelled_once
from hdlib.lab.cost import operations, placeholder_tokenizer, project
from hdlib.models import language_model_class

from ..bench import memory, prune, step
from ..bench.turns import timed
from ..bench.work import Setting, Work
from .part import Part

PAPER = [Path(__file__).parents[1] / "paper" / f"homobert_{size}.yaml" for size in ("base", "tiny")]
RATIOS = (1.0, 0.5, 0.29)  # of the widths: at the start, in the middle and at the end of the homotopy
MULTIPLES = (1, 96)  # of the hidden and feed-forward widths; products of odd widths are slow
WAYS = {"": {}, ", masked": {"masked": True}, ", default recipe": None}  # how a paper's run is pruned
STEPS, WARM = 20, 5  # of the loop that is measured, and how many of them are not counted
LARGEST_ITEMS = 10  # of the profile


def run(part: Part) -> None:
    dry = part.plan.dry
    shape, length, turns, steps = ("tiny", 16, 1, WARM + 1) if dry else ("base", 128, 5, STEPS)
    settings = [
        Setting(shape, batch_size, length, "bfloat16", part.device, turns)
        for batch_size in ((2,) if dry else (64, 256))
    ]
    part.item("card", partial(_card, part.device, 256 if dry else 8192))
    card = part.items["card"].get("value", {})
    for setting in settings:
        of_batch = f"{setting.batch_size} x {setting.length}"
        for way, changes in WAYS.items():
            part.item(f"paper, {PAPER[0].stem}{way}, {of_batch}", partial(_paper, PAPER[0], setting, changes))
        part.item(f"step, {of_batch}", lambda setting=setting: {"table": rows(step.measure(setting))})
        part.item(f"memory, {of_batch}", lambda setting=setting: {"table": rows(memory.measure(setting))})
        part.item(f"profile, {of_batch}", partial(_profile, setting))
        for name, widths in _homotopy(setting).items():
            part.item(f"loop, {of_batch}, {name}", partial(_loop, setting, widths, steps, card))
        part.item(f"prune, {of_batch}", lambda setting=setting: {"table": rows(prune.measure(setting))})
        if not dry:
            part.item(f"paper, {PAPER[1].stem}, {of_batch}", partial(_paper, PAPER[1], setting, {}))


def rows(table: pd.DataFrame) -> list[dict]:
    return json.loads(table.reset_index().to_json(orient="records", double_precision=8))


def _card(device: torch.device, size: int) -> dict:
    """The two ceilings, measured: teraflops of a bfloat16 product of two random square matrices, and copied GB/s."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    large = torch.randn(size, 8 * size, device=device)
    target = torch.empty_like(large)
    multiply = _median_seconds(lambda: left @ right, device)
    copy = _median_seconds(lambda: target.copy_(large), device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else device.type,
        "gigabytes": torch.cuda.get_device_properties(device).total_memory / 1e9 if cuda else None,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "teraflops": 2 * size**3 / multiply / 1e12,
        "copied gigabytes a second": 2 * large.nbytes / copy / 1e9,
    }


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    return median([timed(call, device) for _ in range(13)][3:])


def _homotopy(setting: Setting) -> dict[str, hdlib.Widths]:
    """The shapes of the student whose steps are measured, by name; each once."""
    teacher = setting.teacher()
    named = {}
    for ratio in RATIOS:
        for multiple in MULTIPLES[: 1 if setting.shape == "tiny" else None]:
            widths = hdlib.Widths.at(teacher, ratio, multiple)
            if widths not in named.values():
                named[f"{ratio}, {widths.hidden}/{widths.ffn}"] = widths
    return named


def _loop(setting: Setting, widths: hdlib.Widths, steps: int, card: dict) -> dict:
    """`hdlib.distill` itself at one shape: seconds of a step, tokens a second, teraflops and the share of the card's.

    The student starts with random weights at this shape, so that every step has it; importance is updated, too. The
    operations are those of both forwards and the backward.
    """
    teacher = setting.teacher()
    config = hdlib.DistillConfig.paper(
        steps=steps,
        batch_size=setting.batch_size,
        target=widths,
        initial="random",
        precision=setting.precision,
        prune_end=1.0,
        eval_every=steps,
        eval_blocks=1,
        checkpoint_every=steps,
    )
    tokenizer = placeholder_tokenizer(teacher.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, teacher.config.vocab_size, (4 * setting.batch_size, setting.length), generator=generator)
    text = Blocks(tokens), labelled_once(tokens[:1], Masking.of(tokenizer), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        records = hdlib.distill(teacher, tokenizer, *text, config, Path(folder) / "run").records()
    seconds = [record["seconds"] for record in records[1 + WARM :]]
    count = setting.batch_size * operations(teacher, [widths], config, setting.length)[widths]
    teraflops = count / median(seconds) / 1e12
    return {
        "widths": vars(widths),
        "seconds": median(seconds),
        "lowest": min(seconds),
        "highest": max(seconds),
        "tokens a second": setting.batch_size * setting.length / median(seconds),
        "teraflops": teraflops,
        "share of measured peak": teraflops / card["teraflops"] if card else None,
    }


def _profile(setting: Setting) -> dict:
    """The ten kernels (on a CPU: operators) that take most time in one step at full width, the optimiser included."""
    work = Work(setting)
    loss = work.loss()

    def one_step() -> None:
        with work.recording():
            work.backward(loss)
        work.importance.update(work.student)
        torch.nn.utils.clip_grad_norm_(work.student.parameters(), 1.0)
        work.optimizer.step()

    cuda = setting.device.type == "cuda"
    device_type = DeviceType.CUDA if cuda else DeviceType.CPU
    for _ in range(3):
        seconds = timed(one_step, setting.device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
        timed(one_step, setting.device)
    column = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [event for event in seen.key_averages() if event.device_type == device_type]  # not their callers, too
    events.sort(key=lambda event: getattr(event, column), reverse=True)
    total = sum(getattr(event, column) for event in events)
    largest = [
        {
            "name": event.key[:160],
            "milliseconds": getattr(event, column) / 1e3,
            "share": getattr(event, column) / total,
            "calls": event.count,
        }
        for event in events[:LARGEST_ITEMS]
    ]
    count = sum(event.count for event in events)
    return {"seconds": seconds, "seconds of all items": total / 1e6, "items": count, "largest": largest}


def _paper(path: Path, setting: Setting, changes: dict | None) -> dict:
    """One of the paper's runs, whole, on one card like this one; None: by the default recipe."""
    values = yaml.safe_load(path.read_text())
    recipe = set(RECIPE) if changes is None else set()
    names = {field.name for field in fields(hdlib.DistillConfig)} - recipe
    config = {name: value for name, value in values.items() if name in names}
    changes = (changes or {}) | {"micro_batch_size": setting.batch_size}
    config = hdlib.DistillConfig(**config | changes)
    if setting.shape == "tiny":
        teacher, length = setting.teacher(), setting.length
        config = replace(config, target=0.29, batch_size=2 * setting.batch_size, steps=100)
    else:
        shape, length = AutoConfig.for_model("bert"), values["length"]
        teacher = language_model_class(shape).from_config(shape)
    found = project(teacher, config, length)
    return {"steps": config.steps, "tokens": config.steps * config.batch_size * length} | vars(found)
