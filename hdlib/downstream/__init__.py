"""Fine-tune stock checkpoints on downstream tasks, and score them; measure sentence encoders without training.

Nothing here depends on distillation: a checkpoint is a folder that stock classes open. Hugging Face's `Trainer` trains;
scikit-learn and SciPy measure.
"""

from .embeddings import load_pairs, retrieval, sts
from .finetune import FineTuneConfig, finetune
from .score import baselines, score, summary
from .squad import SQUAD, SquadConfig, exact_match, finetune_squad, load_squad, squad_f1
from .tasks import GLUE, PROBES, Task, load_probe, load_task

__all__ = [
    "GLUE",
    "PROBES",
    "SQUAD",
    "FineTuneConfig",
    "SquadConfig",
    "Task",
    "baselines",
    "exact_match",
    "finetune",
    "finetune_squad",
    "load_pairs",
    "load_probe",
    "load_squad",
    "load_task",
    "retrieval",
    "score",
    "squad_f1",
    "sts",
    "summary",
]
