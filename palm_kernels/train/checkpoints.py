"""Folders that are whole at every moment, and the state from which a run goes on bit for bit."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from transformers.utils import logging

STATE, OPTIMIZER, WEIGHTS = "state.json", "optimizer.pt", "model.safetensors"


class CheckpointError(ValueError):
    """A folder that cannot be used, with the reason and the way out."""


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """write(path) fills a new folder beside `folder`, which then becomes a link to it; the one before is removed.

    The link changes in one rename: whenever the process or the machine stops, `folder` is the old one or the new one, whole.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_symlink():
        raise CheckpointError(f"{folder}: a folder of somebody else's is in the way: move it, or write elsewhere")
    before = folder.resolve() if folder.is_symlink() else None
    number = int(before.name.rpartition(".")[2]) + 1 if before else 0
    fresh = folder.with_name(f".{folder.name}.{number}")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was stopped while it wrote
    fresh.mkdir()
    write(fresh)
    for path in fresh.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    link = folder.with_name(f".{folder.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(fresh.name)
    link.replace(folder)
    if before and before != fresh:
        shutil.rmtree(before, ignore_errors=True)


@contextlib.contextmanager
def _no_bars():
    """Without transformers' progress bars, one for each file of a model."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@_no_bars()
def save_model(folder: Path, model, tokenizer=None) -> None:
    """model and tokenizer as `from_pretrained` reads them (safetensors); PEFT's adapters merged into a copy of what they wrap."""
    plain = copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
    plain.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_run(folder: Path, model, tokenizer, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """All that a run needs to go on, as one folder: every weight under its own name, adapters apart."""

    def write(path: Path) -> None:
        save_weights(model, str(path / WEIGHTS), {"format": "pt"})
        model.config.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        torch.save(optimizer.state_dict(), path / OPTIMIZER)
        (path / STATE).write_text(json.dumps(state, indent=1))

    replace_folder(folder, write)


def load_run(folder: Path, model, optimizer: torch.optim.Optimizer) -> dict:
    """The state that save_run got, with model and optimizer as they were."""
    folder = Path(folder)
    for name in (STATE, OPTIMIZER, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name} in it: nothing to go on from")
    try:
        load_weights(model, folder / WEIGHTS)
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True))
        return json.loads((folder / STATE).read_text())
    except Exception as error:
        raise CheckpointError(f"{folder}: not a run of this model ({str(error).splitlines()[0]})") from error


@_no_bars()
def load_model(kind, tokenizer_kind, folder: str | Path, *, weights: bool = True, **config):
    """(model, tokenizer) saved in a folder, config fields replaced; a head of another size starts anew. CheckpointError if not a pair.

    weights=False: a new model of that shape, for `fit(resume=True)` to fill.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no saved model (no config.json in it)")
    try:
        if weights:
            model = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **config)
        else:
            model = kind(kind.config_class.from_pretrained(folder, **config))
        tokenizer = tokenizer_kind.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]})") from error
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: not a pair"
        )
    return model, tokenizer
