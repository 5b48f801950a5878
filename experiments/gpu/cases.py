"""Device tests: small runs of the loop on the accelerator, whose numbers are compared with the CPU's.

Every case is computed twice, by a process on the accelerator and by one without it, from the same random weights and
tokens. A case returns `exact` values, which must be equal, and `near` ones, which must agree within TOLERANCE.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import hdlib
from hdlib.config import PAPER
from hdlib.data import Blocks, Masking, NextToken, labelled_once
from hdlib.lab.cost import placeholder_tokenizer
from hdlib.losses import TERMS
from hdlib.models import student_of
from hdlib.scorers import SCORERS
from hdlib.widths import family

from .part import Part

# |device - CPU| <= relative * |CPU| + absolute. In bfloat16 attention is in bfloat16 on a GPU and in float32 on a CPU.
TOLERANCE = {"float32": (2e-4, 1e-5), "bfloat16": (1e-2, 5e-3)}
KEPT_ALIKE = {"float32": 0.95, "bfloat16": 0.9}  # share of the kept neurons that both kept, at least
VOCABULARY, LENGTH, BLOCKS = 96, 16, 64
CONFIG = PAPER | {
    "batch_size": 8,
    "target": 0.5,
    "prune_every": 2,
    "eval_blocks": 8,
    "learning_rate": 1e-3,
}
GROUPED = {
    "use_cache": False,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "bert": (BertForMaskedLM, BertConfig, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GROUPED),
}
RUNS = {  # what differs from CONFIG
    **{f"narrowed, {name}": {"scorer": name, "compensate": name == "reconstruction"} for name in SCORERS},
    "masked": {"masked": True},
    "masked, neurons return": {"recover": True},
    "masked, global": {"scope": "global"},
    "micro-batches": {"micro_batch_size": 3},
    "random start": {"initial": "random"},
    "one-shot": {"schedule": "one_shot"},
    "attention probabilities, all positions": {"attention_target": "probs", "positions": "all"},
    "held-out measures around prunes": {"eval_prunes": True},
    "rotated and compensated": {"rotate": True, "compensate": True},
    "fewer layers": {"target": {"layers": 1, "ffn": 32}, "compensate": True, "prune_end": 1.0},
}
RESUMED = ("narrowed, platon", "narrowed, random", "masked, neurons return", "fewer layers")
WIDTHS = ("hidden_size", "intermediate_size", "num_layers")  # of the student, in the record of a step
OPTIMISERS = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
    "AdamW, fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "SGD with momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
}


def run(part: Part) -> None:
    every = cases(6 if part.plan.dry else 16)
    for name in list(every)[:: 5 if part.plan.dry else 1]:
        part.item(name, partial(every[name], part.device))


def cases(steps: int) -> dict[str, Callable[[torch.device], dict]]:
    """Name to a function of the device; the name begins with the precision."""
    every = {}
    for precision in TOLERANCE:
        base = {"steps": steps, "precision": precision, "eval_every": steps // 2, "checkpoint_every": steps}
        for name, options in RUNS.items():
            every[f"{precision}: {name}"] = partial(_distilled, "bert", base | options)
        for model, masked in product(("llama", "qwen3"), (False, True)):
            how = "masked" if masked else "narrowed"
            every[f"{precision}: grouped heads, {model}, {how}"] = partial(_distilled, model, base | {"masked": masked})
        for name in RESUMED:
            every[f"{precision}: resumed, {name}"] = partial(_resumed, base | RUNS[name])
    for model in MODELS:
        every[f"float32: discrepancy, {model}"] = partial(_discrepancy, model)
        for name in OPTIMISERS:
            every[f"float32: narrow with {name}, {model}"] = partial(_narrowed, model, name)
    return every


def _model(name: str) -> PreTrainedModel:
    """A small model on the CPU with random weights; no two neurons are equal."""
    model_class, config_class, options = MODELS[name]
    widths = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = model_class(config_class(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **widths, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _text(teacher: PreTrainedModel) -> tuple:
    """A tokenizer that never reads, and random tokens for training and held out."""
    tokenizer = placeholder_tokenizer(VOCABULARY)
    tokens = torch.randint(5, VOCABULARY, (BLOCKS, LENGTH), generator=torch.Generator().manual_seed(1))
    task = NextToken() if family(teacher).causal else Masking.of(tokenizer)
    return tokenizer, Blocks(tokens), labelled_once(tokens[:16], task, seed=0)


def _distilled(model: str, options: dict, device: torch.device) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return _run(model, options, Path(folder), device)


def _run(model: str, options: dict, folder: Path, device: torch.device, **how) -> dict:
    teacher = _model(model)
    config = hdlib.DistillConfig(**CONFIG | options)
    run = hdlib.distill(teacher, *_text(teacher), config, folder, **how)
    if teacher.device.type != "cpu":
        raise AssertionError(f"distill moved the caller's teacher to {teacher.device}")
    records = run.records()
    kept = run.kept if config.initial == "teacher" else {}
    return {
        "exact": {name: [record[name] for record in records] for name in WIDTHS},
        "near": {name: [record[name] for record in records if name in record] for name in (*TERMS, "held_out_kl")},
        "kept": kept,
    }


class _Killed(Exception):
    pass


def _resumed(options: dict, device: torch.device) -> dict:
    """A run that is interrupted after a checkpoint and resumed, which must agree with the uninterrupted run."""
    steps = options["steps"]
    options = options | {"checkpoint_every": steps // 3}

    def kill(record: dict) -> None:
        if record["step"] == steps // 2 + 1:
            raise _Killed

    with tempfile.TemporaryDirectory() as folder:
        whole = _run("bert", options, Path(folder) / "whole", device)
        try:
            _run("bert", options, Path(folder) / "resumed", device, on_step=kill)
        except _Killed:
            resumed = _run("bert", options, Path(folder) / "resumed", device, resume=True)
    agree = compared({"value": resumed}, {"value": whole}, options["precision"])
    if not agree["passed"]:
        raise AssertionError(f"the resumed run differs from the uninterrupted one: {agree}")
    return resumed


def _discrepancy(model: str, device: torch.device) -> dict:
    teacher = _model(model)
    _, _, held_out = _text(teacher)
    student = student_of(teacher.to(device))
    hdlib.narrow(student, hdlib.Widths.at(student, 0.5))
    heads = torch.arange(student.config.num_attention_heads, device=device).repeat(2, 1)
    measured = hdlib.discrepancy(student, teacher, held_out, batch_size=3, heads=heads)
    same = hdlib.discrepancy(teacher, deepcopy(teacher), Blocks(**held_out[:5]))
    return {"exact": {"kl of identical models": same["kl"]}, "near": measured}


def _narrowed(model: str, name: str, device: torch.device) -> dict:
    """Train a step, narrow model and optimiser, train another; scores come from the device as in the loop."""
    student = _model(model).to(device)
    tokens = _text(student)[1][:8]["input_ids"].to(device)
    optimizer = OPTIMISERS[name](student.parameters())
    scorer, losses = hdlib.scorer("sensitivity"), []
    widths = hdlib.Widths.of(student)
    for ratio in (1.0, 0.75, 0.5):
        losses.append(_trained(student, tokens, optimizer, scorer))
        target = hdlib.Widths(hidden=int(widths.hidden * ratio), ffn=int(widths.ffn * ratio))
        scorer.narrow(hdlib.narrow(student, target, scorer.scores(), optimizer))
    before = [parameter.clone() for parameter in student.parameters()]
    losses.append(_trained(student, tokens, optimizer, scorer))
    moved = all(not torch.equal(*pair) for pair in zip(before, student.parameters(), strict=True))
    norms = [parameter.norm().item() for parameter in student.parameters()]
    return {"exact": {"every parameter moved": moved}, "near": {"loss": losses, "norm": norms}}


def _trained(model: PreTrainedModel, tokens: torch.Tensor, optimizer, scorer) -> float:
    optimizer.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    scorer.update(model)
    optimizer.step()
    return loss.item()


def compared(found: dict, reference: dict, precision: str) -> dict:
    """The verdict on one case: `passed`, the largest difference as a share of the tolerance, and the value it is of.

    Args:
        found, reference: items of the two processes, each with a `value` or an `error`.
        precision: which tolerance applies.
    """
    if "value" not in found or "value" not in reference:
        missing = found.get("error") or f"no reference: {reference.get('error', 'not reached')}"
        return {"passed": False, "because": missing}
    found, reference = found["value"], reference["value"]
    relative, absolute = TOLERANCE[precision]
    worst, where = 0.0, ""
    for name, expected in reference["near"].items():
        for number, target in zip(_list(found["near"][name]), _list(expected), strict=True):
            share = abs(number - target) / (relative * abs(target) + absolute)
            worst, where = max((worst, where), (share, name))
    unequal = [name for name in reference["exact"] if found["exact"][name] != reference["exact"][name]]
    alike = _alike(found.get("kept", {}), reference.get("kept", {}))
    passed = worst <= 1 and not unequal and alike >= KEPT_ALIKE[precision]
    return {"passed": passed, "share of tolerance": worst, "of": where, "unequal": unequal, "kept alike": alike}


def _list(value) -> list:
    return value if isinstance(value, list) else [value]


def _alike(kept: dict[str, list[int]], reference: dict[str, list[int]]) -> float:
    """The share of kept neurons that are the same, in [0, 1]; 1.0 where none are recorded."""
    common = sum(len(set(kept[name]) & set(neurons)) for name, neurons in reference.items())
    return common / max(1, sum(map(len, reference.values()))) if reference else 1.0
