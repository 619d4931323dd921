"""What the kernels are to reach, and what a report's rows say of it. Nothing here measures."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .tables import ours_of


class Target(NamedTuple):
    """value(rows) is None where the rows do not hold what it needs. With `low`, less is better."""

    name: str
    unit: str
    floor: float | None
    goal: float | None
    value: Callable[[list[dict]], float | None]
    low: bool = False


def find(rows: list[dict], op: str, mode: str, /, **case) -> Iterator[dict]:
    """The rows of an op and mode whose case has these letters; variant="..." asks for a bench of that name."""
    variant = case.pop("variant", None)
    for row in rows:
        named = variant is None or row["variant"] == variant
        if named and row["op"] == op and row["mode"] == mode and case.items() <= row["case"].items():
            yield row


def ours(row: dict) -> dict | None:
    """The fastest of our backends in a row."""
    return min((r for _, r in ours_of(row)), key=lambda r: r["ms"], default=None)


def _peers(row: dict, *prefixes: str) -> list[dict]:
    named = row["providers"].items()
    return [r for n, r in named if r["kind"] == "peer" and n.startswith(prefixes or "") and "ms" in r]


def each(op: str, mode: str, value: Callable[[dict, dict], float | None], worst=min, /, **case):
    """The worst of value(row, ours) over the rows of an op, None where there is none."""

    def over(rows):
        pairs = [(row, ours(row)) for row in find(rows, op, mode, **case)]
        values = [value(row, r) for row, r in pairs if r]
        return worst((v for v in values if v is not None), default=None)

    return over


def tflops(row: dict, r: dict) -> float:
    return row["work"]["flops"] / r["ms"] / 1e9


def percent(row: dict, r: dict) -> float:
    return 100 * r["of_bound"]


def key(name: str):
    return lambda row, r: r.get(name)


def speedup(*prefixes: str):
    """How many times as fast as the best of the peers of these names (none: of all)."""

    def value(row, r):
        times = [peer["ms"] for peer in _peers(row, *prefixes)]
        return min(times) / r["ms"] if times else None

    return value


def share(name: str, prefix: str, without: Callable[[dict], float] = lambda row: 0.0):
    """ours[name] over the least of the peers of that name, `without` taken off both."""

    def value(row, r):
        theirs = [peer[name] for peer in _peers(row, prefix) if peer.get(name)]
        if not theirs or r.get(name) is None:
            return None
        return (r[name] - without(row)) / (min(theirs) - without(row))

    return value


def ratio(over: Callable, under: Callable):
    """One value over another."""

    def value(rows):
        a, b = over(rows), under(rows)
        return a / b if a is not None and b else None

    return value


def verdict(target: Target, value: float | None) -> str:
    def reached(bar: float) -> bool:
        return value <= bar if target.low else value >= bar

    if value is None:
        return "not measured"
    if target.goal is not None and reached(target.goal):
        return "goal"
    if target.floor is None:
        return "below the goal"
    return "floor" if reached(target.floor) else "below the floor"


def results(targets: list[Target], rows: list[dict]) -> list[dict]:
    """Each target with what was reached."""
    found = [(t, t.value(rows)) for t in targets]
    fields = ("name", "unit", "floor", "goal", "low")
    return [{**{k: getattr(t, k) for k in fields}, "reached": v, "verdict": verdict(t, v)} for t, v in found]


def lines(found: list[dict]) -> list[list[str]]:
    """The results as a table."""
    table = [["target", "floor", "goal", "reached", "met"]]
    for t in found:
        bars = ["-" if t[k] is None else f"{'<= ' * t['low']}{t[k]:g}" for k in ("floor", "goal")]
        shown = "-" if t["reached"] is None else f"{t['reached']:.3g} {t['unit']}"
        table.append([t["name"], *bars, shown, t["verdict"]])
    return table
