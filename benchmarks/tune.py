"""`python -m benchmarks.tune`: times tile sizes of the attention kernels on this GPU and prints a table for attention_tiles.py.

Every candidate first runs a small problem in a pool of processes, against the reference in the tests' error budget: that compiles
it, in parallel, into Triton's cache, and drops what does not fit the chip or is wrong. What is left is timed in turn, call by
call. The shipped entry stays where nothing is 2 % faster. Nothing is written: the table goes into the source by hand.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import palm_kernels as pk

from .common import brief, randn
from .gate import check_op
from .machine import gpu_clock, require_gpu

FIELDS = (
    "BM",
    "BN",
    "num_warps",
    "num_stages",
    "BM_DK",
)  # the last of "dkdv" alone, and only where it makes two passes
KERNELS = ("fwd", "dq", "dkdv", "decode")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDTH = 4096  # of all heads together, as in PaLM 8B
GAIN = 1.02


class Entry(NamedTuple):
    """What a line of the table is for; 16-bit types share one."""

    kernel: str
    D: int
    dtype: str
    bias: bool = False

    def __str__(self):
        return f"{self.kernel}{'+bias' * self.bias} D={self.D} {self.dtype}"


def _tables():
    return importlib.import_module("palm_kernels._triton.attention_tiles")


@contextlib.contextmanager
def tiles(kernel: str, values: tuple) -> Iterator[None]:
    """Launches of `kernel` take these tiles instead of the table's: they look them up every time."""
    tables, shipped = _tables(), _tables().config

    def config(name, *args, **kwargs):
        found = shipped(name, *args, **kwargs)
        if name != kernel:
            return found
        return dict.fromkeys(found, 0) | dict(zip(FIELDS, values, strict=False))

    tables.config = config
    try:
        yield
    finally:
        tables.config = shipped


def shipped(entry: Entry, arch: int) -> tuple:
    config = _tables().config(entry.kernel, arch, entry.D, DTYPES[entry.dtype], entry.bias)
    return tuple(config[f] for f in FIELDS if config.get(f))


def _shared_bytes(entry: Entry, values: tuple) -> int:
    """About the least shared memory: the tiles that stay and, for every stage but one, the two that pass by."""
    BM, BN, _, stages, *_ = values
    row = _tables().padded(entry.D) * DTYPES[entry.dtype].itemsize
    kept, passing = (2 * BN, 2 * BM) if entry.kernel == "dkdv" else (BM, 2 * BN)
    return (kept + passing * (stages - 1)) * row


def candidates(entry: Entry, shared_limit: int) -> list[tuple]:
    """The shapes worth a try that may fit; decode cuts BM down to its few rows."""
    rows = {"decode": (64,), "dkdv": (32, 64, 128)}.get(entry.kernel, (64, 128))
    if entry.dtype == "float32" and 32 not in rows:
        rows = (32, *rows)
    every = itertools.product(rows, (32, 64, 128), (4, 8), (2, 3, 4) if entry.kernel != "dkdv" else (2, 3))
    found = [c for c in every if _shared_bytes(entry, c) <= shared_limit]
    twice = [(*c, 32) for c in found] if entry.kernel == "dkdv" and entry.D > 64 else []
    return found + twice


def tensors(entry: Entry, small: bool) -> tuple:
    """q, k, v. Small or not, sizes agree in what Triton compiles for: 1 or not, multiple of 16 or not."""
    dtype, H = DTYPES[entry.dtype], WIDTH // entry.D
    if entry.kernel == "decode":
        B, S = (16, 512) if small else (64, 8192)
        return tuple(randn(B, n, heads, entry.D, dtype=dtype, grad=False) for n, heads in ((1, H), (S, 1), (S, 1)))
    B, T = (2, 256) if small else (4, 4096)
    return tuple(randn(B, T, heads, entry.D, dtype=dtype) for heads in (H, 1, 1))


def _options(entry: Entry, q: torch.Tensor, k: torch.Tensor) -> dict:
    """The keywords of the entry's op; a bias removes a key in eight."""
    options = {"cache_lengths": _lengths(k)} if entry.kernel == "decode" else {"causal": True}
    if entry.bias:
        bias = randn(*k.shape[:2], grad=False)
        options["key_bias"] = bias.masked_fill(torch.rand_like(bias) < 0.125, -torch.inf)
        options["key_bias"].requires_grad_(entry.kernel in ("dq", "dkdv"))
    return options


def _lengths(cache: torch.Tensor) -> torch.Tensor:
    return torch.full(cache.shape[:1], cache.shape[1], dtype=torch.int32)


def problem(entry: Entry) -> Callable[[], object]:
    """A call that spends its time in the entry's kernel: forward, all of backward, or one decoding step."""
    q, k, v = tensors(entry, small=False)
    options = _options(entry, q, k)
    if entry.kernel == "decode":
        return functools.partial(pk.attention_decode, q, k, v, **options)
    if entry.kernel == "fwd":
        return functools.partial(pk.attention, q.detach(), k.detach(), v.detach(), **options)
    out = pk.attention(q, k, v, **options)
    leaves = (q, k, v, *([options["key_bias"]] if entry.bias else []))
    return functools.partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)


def try_out(entry: Entry, values: tuple, device: str = "cuda") -> str:
    """Why a candidate cannot be taken, or nothing. Runs in a process of the pool."""
    with torch.device(device), tiles(entry.kernel, values):
        torch.manual_seed(0)
        q, k, v = tensors(entry, small=True)
        try:
            check_op("attention_decode" if entry.kernel == "decode" else "attention", q, k, v, **_options(entry, q, k))
        except Exception as error:
            return brief(error)
    return ""


def fitting(entry: Entry, wanted: list[tuple], pool) -> list[tuple]:
    jobs = {pool.submit(try_out, entry, values): values for values in wanted}
    fit = []
    for job in concurrent.futures.as_completed(jobs):
        try:
            reason = job.result()
        except concurrent.futures.BrokenExecutor:
            raise
        except Exception as error:
            reason = brief(error)
        if reason:
            print(f"  {jobs[job]}: {reason[:110]}", file=sys.stderr)
        else:
            fit.append(jobs[job])
    return sorted(fit)


def measure(entry: Entry, fit: list[tuple], clock, rounds: int) -> dict[tuple, float]:
    """Median ms by candidate, call by call in shuffled order; the first round warms up."""
    call, order = problem(entry), random.Random(0)
    times = {values: [] for values in fit}
    for turn in range(rounds + 1):
        for values in order.sample(fit, len(fit)):
            with tiles(entry.kernel, values):
                seconds = clock(call)
            if turn:
                times[values].append(seconds * 1e3)
    return {values: statistics.median(t) for values, t in times.items()}


def choose(ms: dict[tuple, float], current: tuple) -> tuple:
    """The fastest, unless what is shipped is within 2 % of it."""
    best = min(ms, key=ms.__getitem__)
    return current if current in ms and ms[current] <= GAIN * ms[best] else best


def line(entry: Entry, chosen: tuple, current: tuple, ms: dict[tuple, float]) -> str:
    """A line of the table, as it stands in attention_tiles.py."""
    before = f"{ms[current]:.3g} ms with {current}" if current in ms else f"{current} does not run"
    note = "as it was" if chosen == current else f"was {before}"
    half = DTYPES[entry.dtype].itemsize == 2
    key = f'("{entry.kernel}{"+bias" * entry.bias}", {half}, {max(32, _tables().padded(entry.D))})'
    return f"    {key}: {chosen},  # {ms[chosen]:.3g} ms, {note}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="KERNEL", help=", ".join(KERNELS)
    )
    parser.add_argument("--dims", nargs="+", type=int, default=(256, 128, 64), metavar="D", help="head dims, 1 to 256")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=("bfloat16",), metavar="DTYPE", help=", ".join(DTYPES)
    )
    parser.add_argument("--bias", action="store_true", help="with a key_bias: the lines marked +bias")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of a candidate")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no entry after this time")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--list", action="store_true", help="list what would be tried, without a GPU")
    options = parser.parse_args(argv)
    for name, value in (("--rounds", options.rounds), ("--jobs", options.jobs), ("--dims", min(options.dims))):
        if value < 1:
            parser.error(f"{name} {value}: need 1 or more")
    if max(options.dims) > 256:
        parser.error(f"--dims {max(options.dims)}: need at most 256")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    entries = [Entry(*e, options.bias) for e in itertools.product(options.kernels, options.dims, options.dtypes)]
    if options.list:
        for entry in entries:
            print(f"{entry}: {len(candidates(entry, 232448))} candidates on an H100")
        return 0
    require_gpu("benchmarks.tune")
    properties = torch.cuda.get_device_properties()
    arch, start, lines, broken = 10 * properties.major + properties.minor, time.monotonic(), [], []
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(options.jobs, context) as pool,
        torch.device("cuda"),
        pk.backend("triton"),
    ):
        for entry in entries:
            if time.monotonic() - start > 60 * options.minutes:
                broken.append(f"no time left: {entry}")
                continue
            print(f"{time.monotonic() - start:5.0f} s  {entry}", file=sys.stderr, flush=True)
            current = shipped(entry, arch)
            try:
                wanted = list(dict.fromkeys([current, *candidates(entry, properties.shared_memory_per_block_optin)]))
                ms = measure(entry, fitting(entry, wanted, pool), gpu_clock(), options.rounds)
                lines.append(line(entry, choose(ms, current), current, ms))
            except Exception as error:
                broken.append(f"{entry}: {brief(error)}")
    print(f"# {properties.name}, sm_{arch}, torch {torch.__version__}: (kernel, 16-bit?, padded head dim): {FIELDS}")
    print("\n".join(lines))
    for reason in broken:
        print(reason, file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
