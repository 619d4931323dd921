"""Fine-tuning and pre-training: one loop (`fit`), what it is told (`Settings`), what it learns (objectives)."""

from .checkpoints import CheckpointError, load_model, replace_folder
from .loop import Settings, fit
from .objectives import Language, MaskedLanguage, Objective, corrupt
from .records import learning_curve
from .schedules import learning_rate

__all__ = [
    "CheckpointError",
    "Language",
    "MaskedLanguage",
    "Objective",
    "Settings",
    "corrupt",
    "fit",
    "learning_curve",
    "learning_rate",
    "load_model",
    "replace_folder",
]
