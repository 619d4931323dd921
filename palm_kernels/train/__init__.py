"""Fine-tuning and pre-training: one loop (`fit`), what it is told (`Settings`), what it learns (objectives)."""

from .checkpoints import CheckpointError, load_model, replace_folder
from .labelled import Labelled, by_length, outputs
from .loop import fit
from .objectives import Language, MaskedLanguage, Objective, corrupt
from .records import learning_curve
from .schedules import learning_rate
from .settings import Help, Settings

__all__ = [
    "CheckpointError",
    "Help",
    "Labelled",
    "Language",
    "MaskedLanguage",
    "Objective",
    "Settings",
    "by_length",
    "corrupt",
    "fit",
    "learning_curve",
    "learning_rate",
    "load_model",
    "outputs",
    "replace_folder",
]
