"""What a model and a run cost: parameters, floating-point operations, time and memory."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import accumulate, chain, product
from operator import eq
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from scipy.linalg import qr
from scipy.optimize import nnls
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertTokenizerFast, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import DistillConfig
from ..data import Blocks, Masking, NextToken, labelled_once
from ..distill import distill
from ..losses import DistillationLoss
from ..widths import Widths, family, set_widths

STEPS = 24  # of the short run
WARM_UP = 2  # first steps and forwards, not timed: caches fill and threads start
COUNTED = 12  # shapes whose operations are counted; the others follow from them
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameter counts, tied weights once: `total`, and `encoder`, the layers without embeddings and head."""
    layers = sum(p.numel() for name, p in model.named_parameters() if re.search(r"[.]\d+[.]", name))
    return {"total": model.num_parameters(), "encoder": layers}


def encoder_parameters(config: PreTrainedConfig) -> int:
    """Parameters in the layers of a model of this shape."""
    return parameters(_bare_model(config, "meta"))["encoder"]


def flops(config: PreTrainedConfig, length: int = 128) -> int:
    """Floating-point operations of one forward of one sequence through the layers, without the head.

    PyTorch counts the matrix products, two operations for each multiply-add. The weights are not needed; `length` (S,
    tokens) is cut to the positions of the model.
    """
    try:
        return _counted_flops(config, length, "meta")
    except RuntimeError:  # DeBERTa reads values of tensors, which the meta device does not have
        return _counted_flops(config, length, "cpu")


def _counted_flops(config: PreTrainedConfig, length: int, device: str) -> int:
    model = _bare_model(config, device)
    tokens = torch.zeros(1, min(length, config.max_position_embeddings), dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    return counter.get_total_flops()


def _bare_model(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    """The model of a shape without its head; eager, because PyTorch does not count every SDPA kernel."""
    with torch.device(device):
        return AutoModel.from_config(deepcopy(config), attn_implementation="eager")


@torch.inference_mode()
def latency(models: dict[str, PreTrainedModel], batch_size: int = 1, length: int = 128, repeats: int = 20) -> dict:
    """Milliseconds of one forward of each model, with the head at every position: the median over `repeats`.

    Raises ValueError for models on different devices.
    """
    if len(devices := {str(model.device) for model in models.values()}) > 1:
        raise ValueError(f"the models are on different devices, {', '.join(sorted(devices))}: move all to one")

    def calls() -> dict[str, Callable]:
        return {name: partial(model, _random_tokens(model, batch_size, length)) for name, model in models.items()}

    return timed(calls() for _ in range(WARM_UP + repeats))


def timed(turns: Iterable[dict[str, Callable[[], object]]]) -> dict[str, float]:
    """Milliseconds of calls, by name: the median over the turns after WARM_UP.

    The calls of a turn follow each other, so that other load on the machine affects all alike. On a GPU the host waits
    for each.
    """
    times: dict[str, list[float]] = {}
    for calls in turns:
        for name, call in calls.items():
            started = perf_counter()
            call()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times.setdefault(name, []).append((perf_counter() - started) * 1000)
    return {name: median(each[WARM_UP:]) for name, each in times.items()}


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Highest number of bytes that a call holds at the same time, beyond what was allocated before.

    On a GPU from PyTorch's allocator, on a CPU from the allocations that its profiler records.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def forward_table(
    models: dict[str, PreTrainedModel],
    batch_sizes: Iterable[int] = (1, 32),
    lengths: Iterable[int] = (32, 128, 512),
    repeats: int = 10,
) -> pd.DataFrame:
    """The cost of a forward: a row for each model, batch size and length, where the model has the positions.

    Columns: model, batch_size, length; `milliseconds` from `latency`; `tokens_per_second`; `megabytes` (peak, without
    the weights); `gflop` (of the layers, without the head).
    """
    rows = []
    for batch_size, length in product(batch_sizes, lengths):
        fitting = {name: model for name, model in models.items() if length <= model.config.max_position_embeddings}
        for name, milliseconds in latency(fitting, batch_size, length, repeats).items():
            model = fitting[name]
            tokens = _random_tokens(model, batch_size, length)
            with torch.inference_mode():
                memory = peak_memory(lambda model=model, tokens=tokens: model(tokens), model.device)
            row = {"model": name, "batch_size": batch_size, "length": length, "milliseconds": milliseconds}
            row |= {"tokens_per_second": 1000 * batch_size * length / milliseconds, "megabytes": memory / 1e6}
            rows.append(row | {"gflop": batch_size * flops(model.config, length) / 1e9})
    return pd.DataFrame(rows)


def _random_tokens(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    return torch.randint(5, model.config.vocab_size, (batch_size, length), device=model.device)


def vocabulary_table(
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]], texts: Iterable[str]
) -> pd.DataFrame:
    """The round trip of held-out texts through vocabularies: a row for each model with its tokenizer.

    Columns: model; entries; parameters; `tokens`, mean per text; `unknown`, fraction of the tokens; `same_text`,
    fraction of the texts that decode as by the first tokenizer.
    """
    texts, rows, first = list(texts), [], None
    for name, (model, tokenizer) in models.items():
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        tokens, decoded = [*chain.from_iterable(ids)], tokenizer.batch_decode(ids)
        first = first or decoded
        row = {"model": name, "entries": len(tokenizer), "parameters": model.num_parameters()}
        row |= {"tokens": len(tokens) / len(texts), "unknown": tokens.count(tokenizer.unk_token_id) / len(tokens)}
        rows.append(row | {"same_text": np.mean([*map(eq, first, decoded)])})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Projection:
    """Cost of a whole run on devices like this one."""

    hours: float
    tokens_per_second: float  # all devices together
    operations: float  # floating-point operations of all forward and backward passes
    operations_per_second: float  # of one device
    gigabytes: float  # peak memory of one device


def project(teacher: PreTrainedModel, config: DistillConfig, length: int, processes: int = 1) -> Projection:
    """Project the cost of a run from a short run of the same kind on random tokens, which takes some seconds.

    The seconds of a step are fitted as a constant, a part in proportion to its operations, and a part for a prune.
    Communication between processes is not included.

    Args:
        teacher: of the right shape; its weights do not matter and are not changed.
        config: of the run.
        length: S, tokens a block.
        processes: devices like this one, with equal shares of the batch. Raises ValueError if that is impossible.
    """
    if config.batch_size % processes:
        raise ValueError(f"batch_size {config.batch_size} is not divisible by {processes} processes: change one")
    config = replace(config, target=config.shape(teacher))
    share = config.batch_size // processes  # blocks a step on one device
    blocks = min(config.micro_batch_size or share, share)

    short, metrics = _short_run(teacher, config, length, STEPS, blocks)
    (short_widths, short_prunes), (widths, prunes) = course(teacher, short), course(teacher, config)
    of_block = operations(teacher, {*short_widths, *widths}, config, length)
    costs = _fitted(metrics["seconds"].iloc[1:], [blocks * of_block[each] for each in short_widths], short_prunes)
    total = share * sum(of_block[each] for each in widths)
    seconds = float(costs @ [config.steps * share / blocks, total, sum(prunes)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = peak_memory(lambda: _short_run(teacher, config, length, 3, blocks), device)
    tokens = config.steps * config.batch_size * length
    return Projection(seconds / 3600, tokens / seconds, total * processes, total / seconds, held / 1e9)


def course(teacher: PreTrainedModel, config: DistillConfig) -> tuple[list[Widths], list[bool]]:
    """For each step from 1 on: the shape that it computes in, and whether neurons are chosen after it."""
    wide, target = Widths.of(teacher), config.shape(teacher)
    now = target if config.initial == "random" else wide
    widths, prunes = [], []
    for step in range(1, config.steps + 1):
        scheduled = config.widths_at(step, teacher, target)
        after = scheduled if scheduled.fits_in(now) else now
        widths.append(wide if config.under_masks else now)  # masked neurons are still computed
        prunes.append(config.chooses_at(step) if config.under_masks else after != now)
        now = after
    return widths, prunes


def operations(
    teacher: PreTrainedModel, shapes: Iterable[Widths], config: DistillConfig, length: int
) -> dict[Widths, float]:
    """Floating-point operations of a step for one block of S = `length` tokens, by the shape of the student.

    One forward of the teacher, if a loss term uses it, and three times the forward of the student (forward and
    backward pass). A matrix product has two widths, or one width and a constant, in every layer or once. So a linear
    fit to the counts of some shapes gives the others exactly.
    """
    wide, shapes = Widths.of(teacher), sorted(set(shapes), key=astuple)
    loss_positions = length
    if config.positions == "masked" and not family(teacher).causal:
        loss_positions = max(1, round(config.mask_probability * length))
    uses_teacher = DistillationLoss(1, 1, 1, **config.loss_options()).compares
    of_teacher = _forward(teacher, wide, length, loss_positions) if uses_teacher else 0.0
    some = sorted(set(np.linspace(0, len(shapes) - 1, COUNTED).round().astype(int)))
    forward = fitted_count(
        lambda shape: _forward(teacher, shape, length, loss_positions), map(shapes.__getitem__, some), wide
    )
    return {shape: of_teacher + 3 * forward(shape) for shape in shapes}


def fitted_count(count: Callable[[Widths], float], some: Iterable[Widths], wide: Widths) -> Callable[[Widths], float]:
    """Operations or parameters of any shape, by a linear fit to those of `some`, which differ in all that changes.

    As many are counted as the fit has unknowns.
    """
    some = list(some)
    products = np.array([_products(shape, wide) for shape in some])  # (shapes, products)
    independent = qr(products.T, mode="r", pivoting=True)[1][: np.linalg.matrix_rank(products)]
    counts = np.array([count(some[each]) for each in independent], dtype=float)
    weights = np.linalg.lstsq(products[independent], counts)[0]
    return lambda shape: float(_products(shape, wide) @ weights)


def _products(widths: Widths, wide: Widths) -> list[float]:
    """The terms whose weighted sum is the operations of a forward: widths over the teacher's, and their products."""
    hidden, ffn = widths.hidden / wide.hidden, widths.ffn / wide.ffn
    heads, depth = widths.heads * widths.head_dim / (wide.heads * wide.head_dim), widths.layers / wide.layers
    of_layers = [1.0, hidden, ffn, heads, hidden * ffn, hidden * heads, hidden * hidden]
    biases = widths.heads / wide.heads  # of relative positions, in MPNet one for each head
    return [1.0, hidden, hidden * hidden, biases, *(depth * each for each in of_layers)]


def _forward(teacher: PreTrainedModel, widths: Widths, length: int, loss_positions: int) -> float:
    """Operations of one block through the layers, and through the head at the loss positions."""
    config = shape_config(teacher, widths)
    return flops(config, length) + 2 * loss_positions * config.hidden_size * (config.hidden_size + config.vocab_size)


def shape_config(model: PreTrainedModel, widths: Widths) -> PreTrainedConfig:
    """The config of a model of this shape."""
    config = deepcopy(model.config)
    set_widths(model, config, widths)
    return config


def placeholder_tokenizer(vocab_size: int, pad_token_id: int | None = None) -> BertTokenizerFast:
    """A tokenizer with V = `vocab_size` entries, for random tokens; [PAD] has the index `pad_token_id`, or 0."""
    tokens = [*SPECIAL_TOKENS, *(f"token{index}" for index in range(vocab_size - len(SPECIAL_TOKENS)))]
    if pad_token_id is not None:
        tokens[0], tokens[pad_token_id] = tokens[pad_token_id], tokens[0]
    return BertTokenizerFast(vocab={token: index for index, token in enumerate(tokens)})


def _short_run(
    teacher: PreTrainedModel, config: DistillConfig, length: int, steps: int, blocks: int
) -> tuple[DistillConfig, pd.DataFrame]:
    """Run a few steps of one micro-batch of random tokens between the same two shapes: the config and the metrics."""
    few = {"steps": steps, "batch_size": blocks, "micro_batch_size": 0, "prune_every": 2, "eval_blocks": 1}
    few |= {"prune_start": 0.25, "prune_end": 0.75, "eval_every": steps, "checkpoint_every": steps}
    short, vocabulary = replace(config, **few), teacher.config.vocab_size
    tokenizer = placeholder_tokenizer(vocabulary, teacher.config.pad_token_id)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(SPECIAL_TOKENS), vocabulary, (blocks, length), generator=generator)  # (B, S)
    task = NextToken() if family(teacher).causal else Masking.of(tokenizer, config.mask_probability)
    data = (Blocks(tokens), labelled_once(tokens, task, seed=0))
    with tempfile.TemporaryDirectory() as folder:
        return short, distill(deepcopy(teacher), tokenizer, *data, short, Path(folder) / "run").metrics


def _fitted(seconds: Iterable[float], operations: Iterable[float], prunes: Iterable[bool]) -> np.ndarray:
    """Seconds for a step, an operation and a prune: the non-negative least squares fit to measured steps."""
    design = np.column_stack([np.ones(len(prunes)), operations, prunes])  # (steps, 3)
    scale = np.maximum(design.max(0), 1)  # operations are many orders of magnitude larger than the rest
    return nnls((design / scale)[WARM_UP:], np.array(seconds)[WARM_UP:])[0] / scale
