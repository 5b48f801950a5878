"""The measures of GLUE, by name, as scikit-learn and SciPy compute them."""

from __future__ import annotations

import numpy as np
from scipy import stats
from sklearn import metrics


def _correlation(function):
    """Of two columns of numbers; 0 where one of them is constant and no correlation is defined."""

    def measure(labels, predictions) -> float:
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return float(function(labels, predictions).statistic)

    return measure


MEASURES = {
    "accuracy": lambda labels, predictions: float(metrics.accuracy_score(labels, predictions)),
    "f1": lambda labels, predictions: float(metrics.f1_score(labels, predictions, zero_division=0)),  # of class 1
    "macro_f1": lambda labels, predictions: float(
        metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    ),
    "matthews": lambda labels, predictions: float(metrics.matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def measure(names: tuple[str, ...], labels, predictions) -> dict[str, float]:
    """Measures of predictions, each at most 1, which is a perfect match.

    Args:
        names: which, from MEASURES.
        labels, predictions: (N,) classes or numbers.

    Raises:
        ValueError: a measure that is none, listing those there are; or nothing to measure.
    """
    if unknown := [name for name in names if name not in MEASURES]:
        raise ValueError(f"there is no measure {', '.join(unknown)}; there are: {', '.join(MEASURES)}")
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.size == 0:
        raise ValueError(f"{labels.shape} labels and {predictions.shape} predictions cannot be compared")
    return {name: MEASURES[name](labels, predictions) for name in names}
