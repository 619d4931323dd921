"""`python -m benchmarks.report`: runs the benchmarks, prints one table, writes Markdown and JSON to results/<machine>/.

Ratios are the best peer's median time over ours, so more than 1 means that we are faster. Exit status 1 if a provider was
wrong or failed.
"""

import argparse
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import palm_kernels as pk

from .common import FULL, QUICK, Bench, describe_case, gate, inputs, measure, prepare, providers_of
from .machine import bound, describe, measure_peaks

HERE = Path(__file__).parent
STEMS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def chosen(stems: list[str], quick: bool) -> list[tuple[str, Bench, dict]]:
    """(stem, bench, case) of everything that a run measures."""
    benches = [(stem, b) for stem in stems for b in importlib.import_module(f"benchmarks.bench_{stem}").BENCHES]
    return [(stem, b, case) for stem, b in benches for case in (b.cases[: b.quick] if quick else b.cases)]


def progress(items):
    """items, with a bar on stderr where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, file=sys.stderr, disable=None, unit="case")


def judge(results: dict[str, dict], limit: float, amount: float) -> str | None:
    """Adds to what was measured its rate, its share of the bound and, for ours, the ratio to the best peer, which it names."""
    measured = {name: r for name, r in results.items() if "ms" in r}
    peers = [name for name, r in measured.items() if r["kind"] == "peer"]
    best = min(peers, key=lambda name: measured[name]["ms"], default=None)
    for r in measured.values():
        r |= {"giga_per_second": amount / r["ms"] / 1e6, "of_bound": limit * 1e3 / r["ms"]}
        if best and r["kind"] == "ours":
            r["ratio"] = measured[best]["ms"] / r["ms"]
    return best


def run_case(stem: str, bench: Bench, case: dict, device: str, effort, seed: int, peaks: dict) -> list[dict]:
    """One row a mode: the gate, then the measurements of every provider that passed it."""
    torch.compiler.reset()  # a compiled peer falls back to eager at its eighth shape
    torch.manual_seed(seed)
    rows = []
    with torch.device(device):
        providers = providers_of(bench, device)
        verdicts = gate(bench, case, providers)
        fit = [p for p in providers if verdicts[p.name]["status"] == "ok"]
        sets, works = inputs(bench, case)
        for mode, work in works.items():
            measured = measure(prepare(sets, fit, mode), fit, device, effort)
            results = {p.name: {"kind": p.kind, **verdicts[p.name], **measured.get(p.name, {})} for p in providers}
            limit, limited_by = bound(peaks, *work, case["dtype"], bench.bandwidth)
            best = judge(results, limit, {"flops": work.flops, "bytes": work.bytes}[limited_by])
            rows.append(
                {
                    "stem": stem,
                    "op": bench.op,
                    "case": {k: str(v).removeprefix("torch.") if k == "dtype" else v for k, v in case.items()},
                    "label": f"{describe_case(case)} {bench.variant}".strip(),
                    "gated_at": describe_case({**case, **bench.gate}),
                    "mode": mode,
                    "work": work._asdict(),
                    "limited_by": limited_by,
                    "bound_ms": limit * 1e3,
                    "best_peer": best,
                    "providers": results,
                }
            )
    return rows


def _number(x: float | None, digits: int = 3) -> str:
    return "-" if x is None else f"{x:.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:.{digits}g}"


def _measured(row: dict, name: str) -> list[str]:
    """[median (p20-p80), rate, per cent of the bound, memory] of one provider, or its status."""
    r = row["providers"][name]
    if "ms" not in r:
        return [r["status"], "-", "-", "-"]
    unit = {"flops": "GF/s", "bytes": "GB/s"}[row["limited_by"]]
    spread = f"{_number(r['ms'])} ({_number(r['p20'])}-{_number(r['p80'])})"
    return [spread, f"{_number(r['giga_per_second'])} {unit}", f"{100 * r['of_bound']:.0f} %", _number(r["memory_mib"])]


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
                against = [row["best_peer"] or "-", _number(peer.get("ms")), _number(peer.get("memory_mib")), ratio]
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


def complaints(rows: list[dict]) -> list[str]:
    """Every provider that was not measured, once, with the reason."""
    found = [
        f"{r['status']}: {name}, {row['op']} {row['label']}: {r['reason']}"
        for row in rows
        for name, r in row["providers"].items()
        if r["status"] != "ok"
    ]
    return list(dict.fromkeys(found))


def markdown(report: dict) -> str:
    peaks = {k: _number(v) for k, v in report["peaks"].items()}
    facts = [f"{k.replace('_', ' ')} {v}" for k, v in report["machine"].items() if v is not None and k != "name"]
    parts = [
        f"# {report['machine']['name']}",
        f"`{report['command']}`, commit {report['commit']}, {report['date']}, seed {report['seed']}, "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        "; ".join(facts),
        "Peaks measured in this run, GFLOP/s and GB/s: " + ", ".join(f"{k} {v}" for k, v in peaks.items()),
        "`of bound`: the time that these peaks allow for the flops and the bytes of the case, over the median. "
        "`ratio`: best peer's median over ours. MiB: peak memory of one call beyond its inputs.",
        markdown_table(summary(report["rows"])),
        "## All providers",
        markdown_table(details(report["rows"])),
        *(
            ["## Not measured", "\n".join(f"- {c}" for c in complaints(report["rows"]))]
            if complaints(report["rows"])
            else []
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, text: str) -> None:
    """Beside, then renamed: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one or two cases an op, about 2 minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=STEMS, metavar="STEM", help=f"of {', '.join(STEMS)}")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder that gets <machine>/")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads}: need 1 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    peaks = measure_peaks(options.device)
    effort = QUICK if options.quick else FULL
    rows = []
    for stem, bench, case in progress(chosen(options.only or STEMS, options.quick)):
        rows += run_case(stem, bench, case, options.device, effort, options.seed, peaks)
    report = {
        "machine": describe(options.device),
        "command": " ".join(["python -m benchmarks.report", *(sys.argv[1:] if argv is None else argv)]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": options.seed,
        "versions": {"palm_kernels": pk.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "peaks": peaks,
        "rows": rows,
    }
    name = "-".join(["quick" if options.quick else "full", *(options.only or [])])
    folder = options.results / report["machine"]["name"]
    write(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
    write(folder / f"{name}.md", markdown(report))
    print(text_table(summary(rows)))
    print(f"\nwritten: {folder / name}.md and .json")
    for line in complaints(rows):
        print(line, file=sys.stderr)
    return int(any(r["status"] in ("wrong", "failed") for row in rows for r in row["providers"].values()))


if __name__ == "__main__":
    sys.exit(main())
