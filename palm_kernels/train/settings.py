"""Settings of a run: one place for defaults, checks and command-line options."""

import argparse
import dataclasses
from dataclasses import dataclass, field

from .schedules import SCHEDULES


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows each default, but not "None" where the text says what absence means."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def option(default, text: str, **keywords):
    """A field of Settings: its default, and what --help says of it."""
    return field(default=default, metadata={"help": text, **keywords})


@dataclass
class Settings:
    """How to train. The defaults are a fine-tuning's; pre-training wants lr 1e-3 and final_lr 1e-4."""

    epochs: int = option(3, "passes over the training data")
    steps: int | None = option(None, "stop after so many steps; absent: after the epochs", type=int)
    minutes: float | None = option(None, "begin no step after this time; absent: no limit", type=float)
    lr: float = option(1e-4, "peak learning rate")
    final_lr: float = option(1e-5, "learning rate at the end (cosine, linear, epoch-decay)")
    schedule: str = option("cosine", "how the learning rate goes from one to the other", choices=SCHEDULES)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises")
    optimizer: str = option("adamw", "what takes the steps", choices=("adamw", "adafactor"))
    weight_decay: float = option(0.1, "on matrices; vectors have none")
    clip: float = option(1.0, "largest norm of the gradient")
    accumulate: int = option(1, "batches whose gradients make one step")
    precision: str = option("fp32", "of products in forward and backward; bf16 by autocast", choices=("fp32", "bf16"))
    patience: int | None = option(
        None, "epochs without a better held-out figure before the run ends; absent: none", type=int
    )
    save_every: int | None = option(None, "steps between two states to resume from; absent: every epoch", type=int)
    seed: int = option(0, "of order, dropout and masks")

    def __post_init__(self):
        for name in ("epochs", "accumulate", "steps", "patience", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Settings: {name} is {value}, need at least 1")
        for name, choices in (
            ("schedule", SCHEDULES),
            ("optimizer", ("adamw", "adafactor")),
            ("precision", ("fp32", "bf16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"Settings: {name} is {getattr(self, name)!r}, need one of {', '.join(choices)}")
        if not (self.final_lr > 0 and self.lr > 0 and 0 <= self.warmup <= 1 and self.clip > 0):
            raise ValueError("Settings: lr, final_lr and clip must be positive, warmup a share")

    @classmethod
    def add_to(cls, parser, **defaults) -> None:
        """An option --like-this for each field, with its default here or in `defaults`."""
        for f in dataclasses.fields(cls):
            keywords = dict(f.metadata)
            default = defaults.get(f.name, f.default)
            keywords.setdefault("type", type(default))
            parser.add_argument(f"--{f.name.replace('_', '-')}", default=default, **keywords)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Settings":
        """The settings that the options of `add_to` say; a value out of range ends the program with one line."""
        try:
            return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
