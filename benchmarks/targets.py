"""What the kernels are to reach on an H100, and what a report's rows say of it. Nothing here measures."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .common import BOTH, FORWARD


class Target(NamedTuple):
    """value(rows) is None where the rows do not hold what it needs. With `low`, less is better."""

    name: str
    unit: str
    floor: float
    goal: float | None
    value: Callable[[list[dict]], float | None]
    low: bool = False


def _find(rows: list[dict], op: str, mode: str, **case) -> Iterator[dict]:
    for row in rows:
        if row["op"] == op and row["mode"] == mode and case.items() <= row["case"].items():
            yield row


def _ours(row: dict) -> dict | None:
    """The fastest of our backends in a row."""
    found = [r for r in row["providers"].values() if r["kind"] == "ours" and "ms" in r]
    return min(found, key=lambda r: r["ms"], default=None)


def _peers(row: dict, prefix: str) -> list[dict]:
    return [r for name, r in row["providers"].items() if r["kind"] == "peer" and name.startswith(prefix) and "ms" in r]


def _each(op: str, mode: str, value: Callable[[dict, dict], float | None], worst=min, **case):
    """The worst of value(row, ours) over the rows of an op, None where there is none."""

    def over(rows):
        pairs = [(row, _ours(row)) for row in _find(rows, op, mode, **case)]
        values = [value(row, ours) for row, ours in pairs if ours]
        return worst((v for v in values if v is not None), default=None)

    return over


def _tflops(row: dict, ours: dict) -> float:
    return row["work"]["flops"] / ours["ms"] / 1e9


def _percent(row: dict, ours: dict) -> float:
    return 100 * ours["of_bound"]


def _speedup(prefix: str):
    """How many times as fast as the best peer of that name."""

    def value(row, ours):
        times = [r["ms"] for r in _peers(row, prefix)]
        return min(times) / ours["ms"] if times else None

    return value


def _share(key: str, prefix: str):
    """ours[key] over the least of the peers of that name."""

    def value(row, ours):
        theirs = [r[key] for r in _peers(row, prefix) if r.get(key)]
        return ours[key] / min(theirs) if theirs and ours.get(key) is not None else None

    return value


def _scratch(row: dict, ours: dict) -> float | None:
    """What backward holds beside dq, over dk and dv (bfloat16)."""
    if ours.get("backward_mib") is None:
        return None
    B, T, H, K, D = (row["case"][x] for x in "BTHKD")
    token = 2 * B * T * D / 2**20
    return (ours["backward_mib"] - token * H) / (2 * token * K)


LONG = {"K": 1, "T": 8192}
BLOCK = "torch.compile of PaLM-pytorch"


def _attention(mode: str, D: int, value, worst=min):
    return _each("attention", mode, value, worst, D=D, **LONG)


def _loss(key: str):
    return _each("linear_cross_entropy", BOTH, _share(key, "eager"), max)


TARGETS = [
    Target("attention forward, MQA, D=256, T=8k", "TFLOP/s", 300, 510, _attention(FORWARD, 256, _tflops)),
    Target("attention forward+backward, D=256, SDPA's best", "x", 0.6, 1.0, _attention(BOTH, 256, _speedup("SDPA"))),
    Target("attention forward, MQA, D=128, T=8k", "TFLOP/s", 370, 520, _attention(FORWARD, 128, _tflops)),
    Target("dK, dV and scratch over dK+dV, D=256", "x", 1.1, None, _attention(BOTH, 256, _scratch, max), low=True),
    *(
        Target(f"{op} {mode}, of copy bandwidth", "%", 85, 92, _each(op, mode, _percent))
        for op in ("swiglu", "rms_norm", "layer_norm", "rotary", "cross_entropy")
        for mode in (FORWARD, BOTH)
    ),
    Target("linear_cross_entropy V=128k, memory of eager's", "x", 0.25, None, _loss("memory_mib"), low=True),
    Target("linear_cross_entropy V=128k, time of eager's", "x", 1.0, 0.7, _loss("ms"), low=True),
    Target("decode S=8k, batch 64, of bandwidth", "%", 80, 90, _each("attention_decode", FORWARD, _percent)),
    Target(f"parallel_block, {BLOCK}", "x", 1.2, 1.4, _each("parallel_block", BOTH, _speedup(BLOCK))),
    Target(
        f"parallel_block, saved of {BLOCK}",
        "x",
        0.5,
        None,
        _each("parallel_block", BOTH, _share("saved_mib", BLOCK), max),
        low=True,
    ),
]


def verdict(target: Target, value: float | None) -> str:
    def reached(bar: float) -> bool:
        return value <= bar if target.low else value >= bar

    if value is None:
        return "not measured"
    if target.goal is not None and reached(target.goal):
        return "goal"
    return "floor" if reached(target.floor) else "below the floor"


def lines(rows: list[dict]) -> list[list[str]]:
    """A table: each target with what was reached."""
    table = [["target", "floor", "goal", "reached", ""]]
    for t in TARGETS:
        value = t.value(rows)
        shown = "-" if value is None else f"{value:.3g} {t.unit}"
        table.append([t.name, f"{t.floor:g}", "-" if t.goal is None else f"{t.goal:g}", shown, verdict(t, value)])
    return table
