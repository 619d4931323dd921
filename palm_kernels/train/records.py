"""What a run leaves to read: metrics.jsonl, TensorBoard's events, a learning curve."""

import contextlib
import json
import os
from pathlib import Path


class Records:
    """One JSON line a record in out/metrics.jsonl, the same numbers for TensorBoard where it is installed."""

    def __init__(self, out: Path, keep: int):
        """keep: records of an earlier part of the run that stay; what follows them was not in its last checkpoint."""
        self.path = Path(out) / "metrics.jsonl"
        lines = self.path.read_text().splitlines()[:keep] if keep and self.path.exists() else []
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in lines))
        os.replace(partial, self.path)
        self.count, self.board = len(lines), None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(Path(out) / "tensorboard"))

    def add(self, record: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.count += 1
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def learning_curve(records: list[dict], metric: str, path: Path) -> Path | None:
    """A picture of the training loss and the held-out metric by the epoch; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [r["epoch"] for r in records]
    axes.plot(epochs, [r["loss"] for r in records], "o-", color="tab:blue", label="training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    held_out = [(r["epoch"], r[metric]) for r in records if metric in r]
    if held_out:
        other = axes.twinx()
        other.plot(*zip(*held_out, strict=True), "s-", color="tab:orange", label=metric)
        other.set_ylabel(metric)
    figure.legend(loc="outside upper center", ncols=2)
    axes.grid(alpha=0.3)
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)
    return path
