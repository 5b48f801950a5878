"""Arms of a study: the same run with one thing changed, over several seeds, trained once and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import pandas as pd
from filelock import FileLock
from matplotlib.figure import Figure
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import DistillConfig
from ..corpus import load_corpus
from ..distill import distill
from ..models import load_teacher
from ..runs import Run, write_whole
from . import cost

MEASURES = ("kl", "agreement", "mlm", "accuracy", "hidden")  # held out, at the last step


@dataclass(frozen=True)
class Study:
    """What the arms of a study have in common: teacher, text, arguments, and the folder of their runs.

    Args:
        teacher, tokenizer, train, validation: as for `hdlib.distill`.
        config: the arguments from which the arms differ.
        folder: holds one run folder for each arm and seed, `ARM-seed-N`.
        draw_only: open the runs that have finished and train nothing.
    """

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: object
    validation: object
    config: DistillConfig
    folder: str | Path
    draw_only: bool = False

    @classmethod
    def load(
        cls, teacher: str, corpus: str, length: int, folder: str | Path, *, draw_only: bool = False, **fields
    ) -> Study:
        """A study by names and numbers: loads teacher and corpus, builds the config.

        Args:
            teacher: as for `hdlib.load_teacher`.
            corpus: as for `hdlib.load_corpus`.
            length: S, tokens a block.
            folder, draw_only: as above.
            fields: of DistillConfig; `eval_every` is a twentieth of the steps unless given.
        """
        model, tokenizer = load_teacher(teacher)
        train, validation = load_corpus(corpus, tokenizer, length)
        config = DistillConfig(**{"eval_every": max(1, fields["steps"] // 20)} | fields)
        return cls(model, tokenizer, train, validation, config, folder, draw_only)

    def distill(self, arms: Mapping[str, dict], seeds: Iterable[int]) -> dict[str, list[Run]]:
        """Distil every arm with every seed; what has finished is only opened, what was interrupted goes on.

        A run is trained in `folder/unfinished` and moved when it is done, so a run folder that has its
        name is whole. Two processes that ask for the same run train it once.

        Args:
            arms: the fields of the config that each arm changes, by the arm's name.
            seeds: of order and masks, the same for all arms.

        Returns:
            For each arm its runs, in the order of the seeds; arms without any are left out.

        Raises:
            ValueError: a folder of that name holds a run with other arguments.
        """
        configs = {arm: [replace(self.config, seed=seed, **changes) for seed in seeds] for arm, changes in arms.items()}
        runs = {arm: [self._run(arm, config) for config in each] for arm, each in configs.items()}
        return {arm: finished for arm, each in runs.items() if (finished := [run for run in each if run])}

    def tune(self, arms: Mapping[str, dict], learning_rates: Iterable[float], seed: int) -> dict[str, dict]:
        """Give each arm the learning rate with which it ended closest to its teacher on one seed.

        Every arm gets the same number of trials. Report other seeds than this one.

        Returns:
            The arms again, with their learning rates among the changes; the first rate for an arm of
            which no trial has finished (`draw_only`).
        """
        rates = list(learning_rates)
        if len(rates) == 1:
            return {arm: {"learning_rate": rates[0]} | changes for arm, changes in arms.items()}
        tuned = {}
        for arm, changes in arms.items():
            trials = {f"{arm}-rate-{rate:g}": changes | {"learning_rate": rate} for rate in rates}
            ends = {
                name: runs[0].metrics["held_out_kl"].iloc[-1] for name, runs in self.distill(trials, [seed]).items()
            }
            tuned[arm] = trials[min(ends, key=ends.get, default=next(iter(trials)))]
        return tuned

    def _run(self, arm: str, config: DistillConfig) -> Run | None:
        name = f"{arm}-seed-{config.seed}"
        done, unfinished = Path(self.folder) / name, Path(self.folder) / "unfinished" / name
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{unfinished}.lock"):
            if not done.exists() and self.draw_only:
                return None
            if not done.exists():
                data = (self.teacher, self.tokenizer, self.train, self.validation)
                distill(*data, config, unfinished, resume=True)
                os.replace(unfinished, done)
        run = Run.load(done)
        _check_same(run, config)
        return run


def _check_same(run: Run, config: DistillConfig) -> None:
    """A finished run is taken for the one that is asked for only if its arguments are the same."""
    was, now = DistillConfig(**run.arguments["config"]).to_dict(), config.to_dict()
    changed = [f"{name} was {was[name]}, is {now[name]}" for name in now if was[name] != now[name]]
    if changed:
        raise ValueError(
            f"{run.folder} holds a run with other arguments: {'; '.join(changed)}. "
            "Take another folder for this study, or remove that one"
        )


def pick(arms: Mapping[str, dict], names: Iterable[str]) -> dict[str, dict]:
    """The arms of these names, in this order. Raises ValueError for a name that is none, listing those there are."""
    if unknown := [name for name in names if name not in arms]:
        raise ValueError(f"there is no arm {', '.join(map(repr, unknown))}; there are: {', '.join(arms)}")
    return {name: arms[name] for name in names}


def final_table(runs: Mapping[str, list[Run]]) -> pd.DataFrame:
    """One row for each run: how it ended, in numbers.

    Columns: arm, seed; held out at the last step kl (nats), agreement, mlm (nats), accuracy, hidden, and
    teacher_mlm; highest_kl along the run; seconds of training; steps, learning_rate, hidden_size,
    intermediate_size, encoder_parameters, encoder_gflops (one forward of 128 tokens, or as many as there are
    positions).
    """
    return pd.DataFrame([{"arm": arm} | _final(run) for arm, each in runs.items() for run in each])


def _final(run: Run) -> dict:
    metrics, config = run.metrics, run.arguments["config"]
    last = metrics.dropna(subset=["held_out_kl"]).iloc[-1]
    row = {"seed": config["seed"]} | {name: float(last[f"held_out_{name}"]) for name in (*MEASURES, "teacher_mlm")}
    row |= {"highest_kl": float(metrics["held_out_kl"].max()), "seconds": float(metrics["elapsed"].iloc[-1])}
    row |= {name: config[name] for name in ("steps", "learning_rate")}
    row |= {name: int(last[name]) for name in ("hidden_size", "intermediate_size")}
    if config["scope"] == "local":  # otherwise there is no student of one shape
        shape = AutoConfig.from_pretrained(run.student_folder, trust_remote_code=False)
        row |= {"encoder_parameters": cost.encoder_parameters(shape), "encoder_gflops": cost.flops(shape) / 1e9}
    return row


def paired_differences(table: pd.DataFrame, baseline: str, measure: str = "kl") -> pd.DataFrame:
    """Every arm beside one of them, over the seeds that both have.

    Args:
        table: as `final_table` returns it.
        baseline: the arm that the others are compared with.
        measure: a column of the table, of which lower is better.

    Returns:
        A row for each arm: seeds, mean, lowest and highest of the measure; difference (arm minus baseline,
        mean over the seeds of both), its lowest and highest, and `worse`, the share of these seeds on which the arm
        is the higher one. Differences are missing where the baseline is.
    """
    by_seed = table.pivot(index="seed", columns="arm", values=measure)
    rows = {}
    for arm in table["arm"].unique():
        values = by_seed[arm].dropna()
        rows[arm] = {"seeds": len(values), "mean": values.mean(), "lowest": values.min(), "highest": values.max()}
        paired = (by_seed[arm] - by_seed[baseline]).dropna() if baseline in by_seed else values.iloc[:0]
        if len(paired) and arm != baseline:
            spread = {"lowest difference": paired.min(), "highest difference": paired.max()}
            rows[arm] |= {"difference": paired.mean()} | spread | {"worse": float((paired > 0).mean())}
    columns = ["seeds", "mean", "lowest", "highest"]
    columns += ["difference", "lowest difference", "highest difference", "worse"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("arm")


def overlap(runs: Mapping[str, list[Run]], group: str = "hidden") -> pd.DataFrame:
    """How much arms agree about which neurons stay: the share of one run's neurons that the other kept too.

    Args:
        runs: of students that ended with the same widths, each the teacher's copy at first.
        group: the end of a group's name: "hidden", "ffn", "query_key", "value_output"; the mean over layers.

    Returns:
        A square table over arms, the mean over all pairs of different runs; on the diagonal the seeds of one arm
        (missing if there is only one). Two random choices agree in the kept fraction.
    """
    kept = {arm: [_neurons(run, group) for run in each] for arm, each in runs.items()}
    pairs = {
        one: {
            other: [_shared(ours, theirs) for ours in kept[one] for theirs in kept[other] if ours is not theirs]
            for other in kept
        }
        for one in kept
    }
    means = {
        one: {other: mean(shares) if shares else None for other, shares in row.items()} for one, row in pairs.items()
    }
    return pd.DataFrame.from_dict(means, orient="index", columns=list(kept), dtype=float)


def _neurons(run: Run, group: str) -> dict[str, set[int]]:
    kept = {name: set(neurons) for name, neurons in run.kept.items() if name.rpartition(".")[2] == group}
    if not kept:
        raise ValueError(f"{run.folder} has no neurons of a group {group!r}; it has: {', '.join(run.kept)}")
    return kept


def _shared(one: dict[str, set[int]], other: dict[str, set[int]]) -> float:
    return mean(len(one[name] & other[name]) / len(one[name]) for name in one)


def save_result(
    folder: str | Path, result: dict, *, table: pd.DataFrame | None = None, figure: Figure | None = None
) -> Path:
    """Write what a notebook found to a folder, the result last: where it is, the others are too.

    Args:
        folder: where to; made if it is not there.
        result: plain numbers and texts, to `result.json`. Raises ValueError for a number that is not finite.
        table: to `table.csv`, without its index.
        figure: to `figure.png` and `figure.svg`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if table is not None:
        write_whole(folder / "table.csv", table.to_csv(index=False, float_format="%.6g"))
    if figure is not None:
        with plt.rc_context({"svg.hashsalt": "hdlib", "svg.fonttype": "none"}):  # the same figure, the same file
            figure.savefig(folder / "figure.png", dpi=160)
            figure.savefig(folder / "figure.svg", metadata={"Date": None})
    write_whole(folder / "result.json", text)
    return folder / "result.json"
