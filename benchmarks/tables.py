"""A report's rows as tables of text, and how results are written."""

import os
from collections.abc import Iterator
from pathlib import Path


def number(x: float | None, digits: int = 3) -> str:
    return "-" if x is None else f"{x:.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:.{digits}g}"


def _times(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}x"


def ours_of(row: dict) -> list[tuple[str, dict]]:
    """(name, results) of those of our backends that were measured."""
    return [(n, r) for n, r in row["providers"].items() if r["kind"] == "ours" and "ms" in r]


def _measured(row: dict, name: str) -> list[str]:
    """[median (p20-p80), rate, per cent of the bound, memory] of one provider, or its status."""
    r = row["providers"][name]
    if "ms" not in r:
        return [r["status"], "-", "-", "-"]
    unit = {"flops": "GF/s", "bytes": "GB/s"}[row["limited_by"]]
    spread = f"{number(r['ms'])} ({number(r['p20'])}-{number(r['p80'])})"
    if r["kind"] == "floor":  # a part of the op: the op's work over its time is no rate
        return [spread, "-", "-", number(r["memory_mib"])]
    rate = f"{number(r['giga_per_second'])} {unit}"
    if tokens := row["work"]["tokens"]:
        rate += f", {number(1e3 * tokens / r['ms'])} tokens/s"
    return [spread, rate, f"{100 * r['of_bound']:.0f} %", number(r["memory_mib"])]


def summary(rows: list[dict]) -> list[list[str]]:
    """One line for each of our backends: what it takes, and the ratio to the best peer."""
    lines = ["op", "case", "mode", "ours", "ms (p20-p80)", "rate", "of bound", "MiB"]
    lines = [[*lines, "over floors", "best peer", "ms", "MiB", "ratio"]]
    for row in rows:
        peer = row["providers"].get(row["best_peer"], {})
        for name, r in row["providers"].items():
            if r["kind"] == "ours":
                against = [row["best_peer"] or "-", number(peer.get("ms")), number(peer.get("memory_mib"))]
                floors = _times(r.get("over_floors"))
                measured = [*_measured(row, name), floors, *against, _times(r.get("ratio"))]
                lines.append([row["op"], row["label"], row["mode"], name, *measured])
    return lines


def details(rows: list[dict]) -> list[list[str]]:
    """One line for each provider."""
    lines = [["op", "case", "mode", "provider", "ms (p20-p80)", "rate", "of bound", "MiB", "saved MiB", "calls"]]
    for row in rows:
        for name, r in row["providers"].items():
            shown = f"{name} (floor)" if r["kind"] == "floor" else name
            last = [number(r.get("saved_mib")), str(r.get("calls", "-"))]
            lines.append([row["op"], row["label"], row["mode"], shown, *_measured(row, name), *last])
    return lines


def doublings(rows: list[dict]) -> Iterator[tuple[dict, dict, str, float, float | None]]:
    """(row, the row of twice the size, provider, factor of its time, of its peak memory) along the letter that a bench grows."""

    def place(row: dict, times: int):
        case = {**row["case"], row["grows"]: times * row["case"][row["grows"]]}
        return row["op"], row["variant"], row["mode"], tuple(case.items())

    growing = [row for row in rows if row.get("grows")]
    found = {place(row, 1): row for row in growing}
    for row in growing:
        longer = found.get(place(row, 2))
        if longer is None:
            continue
        for name, r in row["providers"].items():
            twice = longer["providers"].get(name, {})
            if "ms" in r and "ms" in twice:
                known = r["memory_mib"] and twice["memory_mib"] is not None
                memory = twice["memory_mib"] / r["memory_mib"] if known else None
                yield row, longer, name, twice["ms"] / r["ms"], memory


def growth(rows: list[dict]) -> list[list[str]]:
    """What each doubling costs."""
    lines = [["op", "mode", "provider", "from", "to", "time", "peak memory"]]
    for row, longer, name, time, memory in doublings(rows):
        sizes = [f"{r['grows']} {r['case'][r['grows']]}" for r in (row, longer)]
        lines.append([row["op"], row["mode"], name, *sizes, _times(time), _times(memory)])
    return lines


def threads(rows: list[dict]) -> list[list[str]]:
    """Ours on one thread and on all."""
    lines = [["op", "case", "mode", "ours", "ms on 1 thread", "ms on all", "gain"]]
    for row in rows:
        for name, r in ours_of(row):
            if "scaling" in r:
                ms = [number(x) for x in r["threads"].values()]
                lines.append([row["op"], row["label"], row["mode"], name, *ms, _times(r["scaling"])])
    return lines


def text_table(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown_table(lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]])


def write(path: Path, content: str | bytes) -> None:
    """Beside, then renamed: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def complaints(rows: list[dict], skipped: list[str] = ()) -> list[str]:
    """Every provider and case that was not measured, once, with the reason."""
    found = [
        f"{r['status']}: {name}, {row['op']} {row['label']}: {r['reason']}"
        for row in rows
        for name, r in row["providers"].items()
        if r["status"] != "ok"
    ]
    return list(dict.fromkeys([*found, *skipped]))
