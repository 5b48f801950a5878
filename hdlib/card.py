"""The model card of a student: what it is, where it comes from, and what was measured."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from .models import EMBEDDED_TEACHER
from .runs import Run
from .widths import Widths, family


def card(run: Run, student: PreTrainedModel, teacher: PreTrainedModel) -> str:
    """Markdown with the hub's front matter, from the record of a run whose last step is done."""
    config, blocks = run.arguments["config"], run.arguments["blocks"]
    last = run.metrics.iloc[-1]
    origin, task = run.arguments["teacher"], "text-generation" if family(teacher).causal else "fill-mask"
    name = "hdlib's embedded teacher" if Path(origin) == EMBEDDED_TEACHER else Path(origin).name
    from_hub = f"base_model: {origin}\n" if origin.count("/") == 1 and not Path(origin).exists() else ""
    tokens = config["steps"] * config["batch_size"] * blocks["length"]
    rows = {
        "parameters": [f"{model.num_parameters():,}" for model in (student, teacher)],
        "widths": [_shape(Widths.of(model)) for model in (student, teacher)],
        "language-model loss, nats a token": [f"{last[f'held_out_{who}mlm']:.3f}" for who in ("", "teacher_")],
        "accuracy": [f"{last[f'held_out_{who}accuracy']:.3f}" for who in ("", "teacher_")],
    }
    table = "\n".join(f"| {what} | {ours} | {theirs} |" for what, (ours, theirs) in rows.items())
    beginning = (
        f"It began as a copy of {name} and lost its least important neurons little by little while it was distilled"
        if config["initial"] == "teacher"
        else f"It began with random weights of its final shape and was distilled from {name}"
    )
    return f"""---
library_name: transformers
pipeline_tag: {task}
{from_hub}tags: [homodistil, distillation, pruning]
---

# A student of {name}

A pre-trained language model, to be fine-tuned.
{beginning}
(HomoDistil, Liang et al., ICLR 2023, [arXiv 2302.09632](https://arxiv.org/abs/2302.09632)).

| | this model | teacher |
|---|---|---|
{table}

Measured on {min(config["eval_blocks"], blocks["validation"])} held-out blocks of {blocks["length"]} tokens. Its
predictions are {last["held_out_kl"]:.3f} nats from the teacher's (KL divergence, mean over the tokens to predict), and
the first guesses agree on {last["held_out_agreement"]:.3f} of these tokens.

**Training.** {config["steps"]:,} steps of {config["batch_size"]:,} blocks, {tokens:,} tokens; schedule
{config["schedule"]}, scorer {config["scorer"]}, peak learning rate {config["learning_rate"]:g}, matrix products in
{run.arguments["precision"]}, weights in float32; seed {config["seed"]}.
{", ".join(f"{package} {version}" for package, version in run.description["versions"].items())}.

**Limits.** What the teacher must not be used for, this model must not be either, and the teacher's licence is the one
to keep to. Nothing but the above was measured.
"""


def _shape(widths: Widths) -> str:
    return f"hidden {widths.hidden}, feed-forward {widths.ffn}, {widths.heads} heads of {widths.head_dim}"
