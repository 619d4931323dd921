"""A report's rows as tables of text, and how results are written."""

import os
from pathlib import Path


def number(x: float | None, digits: int = 3) -> str:
    return "-" if x is None else f"{x:.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:.{digits}g}"


def _measured(row: dict, name: str) -> list[str]:
    """[median (p20-p80), rate, per cent of the bound, memory] of one provider, or its status."""
    r = row["providers"][name]
    if "ms" not in r:
        return [r["status"], "-", "-", "-"]
    unit = {"flops": "GF/s", "bytes": "GB/s"}[row["limited_by"]]
    spread = f"{number(r['ms'])} ({number(r['p20'])}-{number(r['p80'])})"
    return [spread, f"{number(r['giga_per_second'])} {unit}", f"{100 * r['of_bound']:.0f} %", number(r["memory_mib"])]


def summary(rows: list[dict]) -> list[list[str]]:
    """One line for each of our backends: what it takes, and the ratio to the best peer."""
    lines = [
        ["op", "case", "mode", "ours", "ms (p20-p80)", "rate", "of bound", "MiB", "best peer", "ms", "MiB", "ratio"]
    ]
    for row in rows:
        peer = row["providers"].get(row["best_peer"], {})
        for name, r in row["providers"].items():
            if r["kind"] == "ours":
                ratio = f"{r['ratio']:.2f}x" if "ratio" in r else "-"
                against = [row["best_peer"] or "-", number(peer.get("ms")), number(peer.get("memory_mib")), ratio]
                lines.append([row["op"], row["label"], row["mode"], name, *_measured(row, name), *against])
    return lines


def details(rows: list[dict]) -> list[list[str]]:
    """One line for each provider."""
    lines = [["op", "case", "mode", "provider", "ms (p20-p80)", "rate", "of bound", "MiB", "calls"]]
    for row in rows:
        for name, r in row["providers"].items():
            shown = f"{name} (floor)" if r["kind"] == "floor" else name
            lines.append([row["op"], row["label"], row["mode"], shown, *_measured(row, name), str(r.get("calls", "-"))])
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
