"""Two ways of one computation: that they agree, and how long each takes, interleaved."""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm


def compare(
    ways: dict[str, Callable[[], list[torch.Tensor]]], rounds: int, tolerance: float = 1e-4
) -> dict[str, float]:
    """Milliseconds (median) of each way after one call that is not measured; an error if their results differ by more than `tolerance`.

    The largest difference is held against the largest number of the first way's result, result by result.
    """
    first, *others = (call() for call in ways.values())
    for name, results in zip(list(ways)[1:], others, strict=True):
        for i, (a, b) in enumerate(zip(first, results, strict=True)):
            error = (a - b).abs().max().item() / max(a.abs().max().item(), 1e-30)
            if not error <= tolerance:
                raise AssertionError(f"{name}: result {i} differs by {error:.1e} of its largest number")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds), "rounds", leave=False, disable=not sys.stderr.isatty()):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(s) for name, s in seconds.items()}


def show(title: str, found: dict[str, float]) -> None:
    (_, before), (_, after) = found.items()
    print(title)
    for name, ms in found.items():
        print(f"  {name:28}{ms:9.1f} ms")
    print(f"  {'ratio':28}{before / after:9.2f} x")
