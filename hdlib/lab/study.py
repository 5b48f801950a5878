"""A study: the same run with one thing changed (its arms), over several seeds, trained once and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os.path import expanduser
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from filelock import FileLock
from matplotlib.figure import Figure
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import DistillConfig
from ..distill import distill
from ..models import is_encoder, load_teacher
from ..runs import Run, write_whole
from ..widths import family
from . import cost

MEASURES = ("kl", "agreement", "mlm", "accuracy", "hidden", "teacher_mlm")  # held out, at the last step
OF_ENCODERS = ("cosine_distance", "rank_correlation", "recall", "hidden")  # the same of sentence encoders
ENOUGH = 5  # seeds for a verdict; three have the same sign by chance in one of four comparisons


@dataclass(frozen=True)
class Study:
    """What all arms share. The runs are in `folder`, `ARM-seed-N` for each arm and seed.

    Args:
        teacher, tokenizer, train, validation, config: as for `hdlib.distill`; the arms change fields of the config.
        draw_only: open finished runs and train nothing.
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
        """Load teacher and corpus, with blocks of `length` tokens, and build the config from `fields`.

        The other fields are those of `DistillConfig.paper`; `eval_every` defaults to a tenth of `steps`. Names are as
        for `hdlib.load_teacher` and `hdlib.load_corpus`.
        """
        from ..text.corpus import load_corpus  # imports datasets, which nothing else here needs
        from ..text.sentences import load_sentences

        model, tokenizer = load_teacher(teacher)
        if is_encoder(model):
            train, validation = load_sentences(corpus, tokenizer, length)
        else:
            train, validation = load_corpus(corpus, tokenizer, length, causal=family(model).causal)
        config = DistillConfig.paper(**{"eval_every": max(1, fields["steps"] // 10)} | fields)
        return cls(model, tokenizer, train, validation, config, folder, draw_only)

    def distill(self, arms: Mapping[str, dict], seeds: Iterable[int]) -> dict[str, list[Run]]:
        """Distil every arm with every seed. Finished runs are opened, interrupted runs are resumed.

        A run is trained in `folder/unfinished` and moved when it is complete. Two processes that request the same
        run train it once.

        Args:
            arms: the fields of the config that each arm changes, by the name of the arm.
            seeds: of order and masks, the same for all arms.

        Returns:
            The runs of each arm in the order of the seeds, without arms that have none (`draw_only`).

        Raises:
            ValueError: a folder of that name holds a run with other arguments.
        """
        configs = {arm: [replace(self.config, seed=seed, **changes) for seed in seeds] for arm, changes in arms.items()}
        runs = {arm: [self._run(arm, config) for config in each] for arm, each in configs.items()}
        return {arm: finished for arm, each in runs.items() if (finished := [run for run in each if run])}

    def tune(self, arms: Mapping[str, dict], learning_rates: Iterable[float], seed: int) -> dict[str, dict]:
        """Add to each arm the learning rate with the lowest final held-out KL on one seed, which must not be reported.

        Without finished trials (`draw_only`) it is the first rate.
        """
        rates, tuned = list(learning_rates), {}
        if len(rates) == 1:
            return {arm: {"learning_rate": rates[0]} | changes for arm, changes in arms.items()}
        for arm, changes in arms.items():
            trials = {f"{arm}-rate-{rate:g}": changes | {"learning_rate": rate} for rate in rates}
            runs = self.distill(trials, [seed])
            final = {name: run.metrics[run.measure].iloc[-1] for name, (run,) in runs.items()}
            tuned[arm] = trials[min(final, key=final.get, default=next(iter(trials)))]
        return tuned

    def _run(self, arm: str, config: DistillConfig) -> Run | None:
        name = f"{arm}-seed-{config.seed}"
        folder = Path(expanduser(self.folder))
        done, unfinished = folder / name, folder / "unfinished" / name
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{unfinished}.lock"):
            if not done.exists() and self.draw_only:
                return None
            if not done.exists():
                data = (self.teacher, self.tokenizer, self.train, self.validation)
                distill(*data, config, unfinished, resume=True)
                os.replace(unfinished, done)
        run = Run.load(done)
        was, now = run.config.to_dict(), config.to_dict()
        if changed := [f"{name} was {was[name]}, is {now[name]}" for name in now if was[name] != now[name]]:
            raise ValueError(
                f"{run.folder} holds a run with other arguments: {'; '.join(changed)}. "
                "Choose another folder for this study, or delete that run"
            )
        return run


def pick(arms: Mapping[str, dict], names: Iterable[str]) -> dict[str, dict]:
    """The arms of these names, in this order. Raises ValueError for an unknown name."""
    if unknown := [name for name in names if name not in arms]:
        raise ValueError(f"there is no arm {', '.join(map(repr, unknown))}; there are: {', '.join(arms)}")
    return {name: arms[name] for name in names}


def final_table(runs: Mapping[str, list[Run]]) -> pd.DataFrame:
    """The final numbers of each run, a row a run.

    Columns: arm, seed; at the last step, held out: kl (nats), agreement, mlm (nats), accuracy, hidden (nan if there
    were too few tokens), teacher_mlm; highest_kl over the run; seconds of training; steps, learning_rate, hidden_size,
    intermediate_size. Of sentence encoders: cosine_distance, rank_correlation, recall, hidden; highest_cosine_distance.
    If there is a stock student: encoder_parameters, encoder_gflops (one forward of 128 tokens, or of
    as many as it has positions).
    """
    return pd.DataFrame([{"arm": arm} | _final(run) for arm, each in runs.items() for run in each])


def _final(run: Run) -> dict:
    metrics, config = run.metrics, run.config
    last = metrics.dropna(subset=[run.measure]).iloc[-1]
    measures, main = (MEASURES, "kl") if run.measure == "held_out_kl" else (OF_ENCODERS, OF_ENCODERS[0])
    row = {"seed": config.seed} | {name: float(last.get(f"held_out_{name}", np.nan)) for name in measures}
    row |= {f"highest_{main}": float(metrics[run.measure].max()), "seconds": float(metrics["elapsed"].iloc[-1])}
    row |= {"steps": config.steps, "learning_rate": config.learning_rate}
    row |= {name: int(last[name]) for name in ("hidden_size", "intermediate_size")}
    if run.has_student:
        shape = AutoConfig.from_pretrained(run.student_folder, trust_remote_code=False)
        row |= {"encoder_parameters": cost.encoder_parameters(shape), "encoder_gflops": cost.flops(shape) / 1e9}
    return row


def verdict(table: pd.DataFrame, arm: str, baseline: str, measure: str = "kl") -> dict:
    """Compare two arms over the seeds that both have. `table` has the columns `arm`, `seed` and `measure`.

    Returns:
        pairs: number of common seeds.
        difference: mean of arm minus baseline, paired by seed.
        low, high: 95 % interval of the difference, Student's t with pairs - 1 degrees of freedom; NaN for one pair.
        verdict: "lower" or "higher" if the interval excludes 0, otherwise "no difference shown". Fewer than five pairs
            are "exploratory", one is "one seed", none is "not measured". If a value is not finite, the verdict names
            its seed, and the other numbers are NaN.

    Raises:
        ValueError: a seed occurs twice in an arm.
    """
    from scipy.stats import t as student_t  # here, because its import is slow

    one, other = (
        table[table["arm"] == name].set_index("seed", verify_integrity=True)[measure] for name in (arm, baseline)
    )
    differences = (one - other)[one.index.intersection(other.index)].astype(float).where(np.isfinite)
    pairs, centre = len(differences), differences.mean(skipna=False)
    half = differences.sem(skipna=False) * student_t.ppf(0.975, pairs - 1)
    found = {"pairs": pairs, "difference": centre, "low": centre - half, "high": centre + half}
    return found | {"verdict": _word(differences, found["low"], found["high"])}


def _word(differences: pd.Series, low: float, high: float) -> str:
    if broken := [str(seed) for seed in differences.index[differences.isna()]]:
        return f"not finite on seed {', '.join(broken)}"
    if len(differences) < ENOUGH:
        return {0: "not measured", 1: "one seed"}.get(len(differences), "exploratory")
    if low > 0:
        return "higher"
    return "lower" if high < 0 else "no difference shown"


def paired_differences(table: pd.DataFrame, baseline: str, measure: str = "kl") -> pd.DataFrame:
    """Compare every arm with a baseline by `verdict`; `table` is from `final_table`.

    Returns:
        A row an arm: `seeds` (count) and `mean` of the measure over all its seeds, then what `verdict` returns; missing
        for the baseline itself.
    """
    rows = {}
    for arm, values in table.groupby("arm", sort=False)[measure]:
        rows[arm] = {"seeds": len(values), "mean": values.mean(skipna=False)}
        rows[arm] |= verdict(table, arm, baseline, measure) if arm != baseline else {}
    columns = ["seeds", "mean", "pairs", "difference", "low", "high", "verdict"]
    summary = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)
    return summary.rename_axis("arm").astype({"pairs": "Int64"})


def power_law(losses: pd.Series) -> tuple[float, float]:
    """Fit losses, indexed by their steps, with a straight line in logarithms: loss = loss at one step × steps^exponent.

    Returns:
        (loss at one step, exponent), by least squares of the logarithms; NaN for fewer than two budgets.
    """
    if len(losses) < 2:
        return np.nan, np.nan
    exponent, start = np.polyfit(np.log(losses.index.to_numpy(float)), np.log(losses.to_numpy(float)), 1)
    return float(np.exp(start)), float(exponent)


def overlap(runs: Mapping[str, list[Run]], group: str = "hidden") -> pd.DataFrame:
    """Fraction of the neurons kept by one run that another run kept too: a table over arms, mean over pairs of runs.

    The runs start as copies of the teacher and end with the same widths. `group` is the last part of group names:
    "hidden", "ffn", "query_key" or "value_output"; the mean over layers. On the diagonal are the seeds of an arm, NaN
    for a single seed. Identical choices give 1, random ones the kept fraction.
    """
    kept = {arm: [_kept(run, group) for run in each] for arm, each in runs.items()}

    def shared(one: str, other: str) -> float:
        pairs = [(a, b) for a in kept[one] for b in kept[other] if a is not b]
        fractions = [mean(len(a[name] & b[name]) / len(a[name]) for name in a) for a, b in pairs]
        return mean(fractions) if fractions else np.nan

    return pd.DataFrame([[shared(one, other) for other in kept] for one in kept], index=list(kept), columns=list(kept))


def _kept(run: Run, group: str) -> dict[str, set[int]]:
    kept = {name: set(neurons) for name, neurons in run.kept.items() if name.rpartition(".")[2] == group}
    if not kept:
        raise ValueError(f"{run.folder} has no neurons of a group {group!r}; it has: {', '.join(run.kept)}")
    return kept


def save_result(
    folder: str | Path, result: dict, *, table: pd.DataFrame | None = None, figure: Figure | None = None
) -> Path:
    """Write `result.json`, `table.csv` and `figure.png` and `.svg` to a folder, and return the path of the first.

    `result.json` is written last, so it marks a complete folder. A number in it that is not finite raises ValueError.
    """
    folder = Path(expanduser(folder))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if table is not None:
        write_whole(folder / "table.csv", table.to_csv(index=False, float_format="%.6g"))
    if figure is not None:
        with plt.rc_context({"svg.hashsalt": "hdlib", "svg.fonttype": "none"}):  # equal figures give equal files
            figure.savefig(folder / "figure.png", dpi=160)
            figure.savefig(folder / "figure.svg", metadata={"Date": None})
    write_whole(folder / "result.json", text)
    return folder / "result.json"
