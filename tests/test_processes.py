"""Several processes: the neurons, losses and weights of one process, few collectives, a disturbed one is found."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.multiprocessing import start_processes
from torch.profiler import ProfilerActivity, profile

import hdlib
from experiments.gpu.cases import CONFIG, _text
from hdlib.data import Blocks
from hdlib.losses import TERMS
from hdlib.training import Training

from models import random_model

VOCABULARY = 96
OPTIONS = {"steps": 8, "precision": "float32", "prune_end": 0.5, "eval_every": 8, "checkpoint_every": 3}
LATE = {"prune_start": 0.5, "prune_end": 0.8}  # a fit on few tokens enlarges differences in rounding
NARROW = hdlib.Widths(12, 28, heads=4)  # all heads, of half of their dimensions
RUNS = {
    "compensated": ("bert", {"rotate": True, "compensate": True, "scorer": "reconstruction", "target": NARROW} | LATE),
    "micro-batches": ("bert", {"micro_batch_size": 3, "target": hdlib.Widths(layers=2, ffn=28)}),
}
FULL = {
    "no head": ("bert", {"mlm": 0.0, "prediction": 0.0, "hidden": 0.0}),  # parameters without gradient
    "neurons return": ("gpt2", {"recover": True}),
    "global": ("bert", {"scope": "global"}),
    "causal": ("qwen3", {"micro_batch_size": 2, "scorer": "platon"}),
    "random scores": ("llama", {"scorer": "random", "positions": "all"}),
    "compensated, micro-batches": ("opt, projected", {"compensate": True, "micro_batch_size": 1} | LATE),
    "no projection": ("bert", {"embedding": 0.0, "eval_prunes": True}),
}


def run(kind: str, options: dict, folder: Path, **how) -> hdlib.Run:
    """A short run on random tokens; every other block has few labels or none."""
    teacher = random_model(kind, vocabulary=VOCABULARY, layers=3 if "target" in options else 2)
    tokenizer, train, held_out = _text(teacher)
    tokens = train[:]["input_ids"]
    if not options.get("compensate"):
        tokens[::2, 3:-1] = tokens[::4, 1:-1] = tokenizer.unk_token_id
    return hdlib.distill(
        teacher, tokenizer, Blocks(tokens), held_out, hdlib.DistillConfig(**CONFIG | OPTIONS | options), folder, **how
    )


def in_processes(count: int, call, folder: Path, *arguments) -> None:
    """Call `call(rank, folder, *arguments)` in so many processes."""
    start_processes(_begin, (count, call, folder, *arguments), nprocs=count, start_method="fork")


def _begin(rank: int, count: int, call, folder: Path, *arguments) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in launched.items()} | {"ACCELERATE_USE_CPU": "true"})
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    call(rank, folder, *arguments)
    torch.distributed.destroy_process_group()


def _run_all(rank: int, folder: Path, runs: dict) -> None:
    for name, (kind, options) in runs.items():
        run(kind, options, folder / name)


def agree(one: hdlib.Run, several: hdlib.Run) -> None:
    for width in ("intermediate_size", "num_layers"):
        assert several.metrics[width].equals(one.metrics[width])
    assert one.has_student == several.has_student and (not one.has_student or several.kept == one.kept)
    for name in ("total", *TERMS, "gradient_norm", "held_out_kl"):
        if name in one.metrics:
            expected = one.metrics[name].dropna().tolist()
            tolerance = 1e-3 if name == "gradient_norm" else 1e-4
            assert several.metrics[name].dropna().tolist() == pytest.approx(expected, rel=tolerance, abs=1e-6), name
    for path in (*one.checkpoints(), *one.folder.glob("student")):
        found = load_file(several.folder / path.relative_to(one.folder) / "model.safetensors")
        for name, weight in load_file(path / "model.safetensors").items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4)


def test_two_processes(tmp_path):
    """A compensated run that is disturbed and resumed, and micro-batches of unequal numbers of labels."""
    in_processes(2, _disturbed, tmp_path)
    for name, (kind, options) in RUNS.items():
        agree(run(kind, options, tmp_path / "one" / name), hdlib.Run.load(tmp_path / name))


def _disturbed(rank: int, folder: Path) -> None:
    """A bit of a process flips, which is found at the next prune or checkpoint; then the run is resumed."""
    start_step, forward_backward, counted = Training.start_step, Training.forward_backward, {}

    def disturb(self, step):
        start_step(self, step)
        if rank == 1 and step == 6:
            self.student.get_input_embeddings().weight.data.view(torch.int32)[0, 0] ^= 1

    def count(self, batch):
        with profile(activities=[ProfilerActivity.CPU]) if self.step == 7 else nullcontext() as profiled:
            terms = forward_backward(self, batch)
        if profiled:
            counted[self.step] = sum(event.name.startswith("c10d::") for event in profiled.events())
        return terms

    (name, (kind, options)), *others = RUNS.items()
    Training.start_step, Training.forward_backward = disturb, count
    with pytest.raises(hdlib.Diverged, match="step 6: the weights of process 1 differ from those of process 0"):
        run(kind, options, folder / name)
    Training.start_step = start_step
    run(kind, options, folder / name, resume=True)
    _run_all(rank, folder, dict(others))
    assert counted[7] == 2, "the gradients of all micro-batches, less than 25 MB, and the loss terms"


def _asked_to_stop(rank: int, folder: Path) -> None:
    start_step = Training.start_step

    def signalled(self, step):
        start_step(self, step)
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    Training.start_step = signalled
    with pytest.raises(hdlib.Stopped, match="stopped after step 2"):
        run("bert", {}, folder / "run")


def test_all_processes_stop_after_the_same_step(tmp_path):
    """The request of one travels with the loss terms of the step."""
    in_processes(2, _asked_to_stop, tmp_path)
    assert [path.name for path in hdlib.Run.load(tmp_path / "run").checkpoints()] == ["step_00000002"]


@pytest.mark.full
@pytest.mark.parametrize("count, runs", [(2, FULL), (4, RUNS | FULL)])
def test_several_processes(count, runs, tmp_path):
    in_processes(count, _run_all, tmp_path, runs)
    for name, (kind, options) in runs.items():
        agree(run(kind, options, tmp_path / "one" / name), hdlib.Run.load(tmp_path / name))
