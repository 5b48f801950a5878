"""Does a student serve? Fine-tuning stock checkpoints on tasks, and what it takes to judge the numbers.

Nothing in here knows of distillation: a student, its teacher and anyone's checkpoint are folders that stock classes
open. Hugging Face's `Trainer` trains, scikit-learn and SciPy measure.
"""

from .finetune import FineTuneConfig, finetune
from .probes import PROBES, load_probe
from .score import baselines, score, summary
from .squad import SQUAD, SquadConfig, exact_match, finetune_squad, load_squad, squad_f1
from .tasks import GLUE, Task, load_task

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
    "load_probe",
    "load_squad",
    "load_task",
    "score",
    "squad_f1",
    "summary",
]
