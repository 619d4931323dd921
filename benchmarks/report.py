"""`python -m benchmarks.report`: runs the benchmarks, prints tables, writes JSON, Markdown and pictures to results/<machine>/.

Ratios are the best peer's median time over ours, so more than 1 means that we are faster. Exit status 1 if one of
ours was wrong or failed; what others cannot do is listed. Files are written again after every case, so
that a run that is cut off leaves what it had.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import palm_kernels as pk

from . import cpu_targets, gpu_targets, plot, targets
from .common import Bench, brief, describe_case
from .machine import describe, measure_peaks, release, require_gpu
from .rows import run_case
from .tables import complaints, details, growth, markdown_table, number, summary, text_table, threads, write
from .timing import FULL, GPU_FULL, GPU_QUICK, QUICK

HERE = Path(__file__).parent
PEERS = {"cpu": ("transformers", "PaLM-pytorch"), "cuda": ("triton", "flash-attn", "liger-kernel")}  # packages to name
STEMS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def _benches(device: str) -> dict[str, list[Bench]]:
    """By stem; on a GPU in order of interest, because time may run out."""
    if device == "cuda":
        return importlib.import_module("benchmarks.gpu").BENCHES
    return {stem: importlib.import_module(f"benchmarks.bench_{stem}").BENCHES for stem in STEMS}


def chosen(stems: list[str] | None, quick: bool, device: str = "cpu") -> list[tuple[str, Bench, dict]]:
    """(stem, bench, case) of everything that a run measures."""
    found = _benches(device)
    benches = [(stem, b) for stem in stems or found for b in found[stem]]
    return [(stem, b, case) for stem, b in benches for case in (b.cases[: b.quick] if quick else b.cases)]


def progress(items):
    """items, with a bar on stderr where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, file=sys.stderr, disable=None, unit="case")


def sections(report: dict) -> list[tuple[str, list[list[str]]]]:
    """The tables beside the summary that have lines."""
    rows = report["rows"]
    wanted = [t for t in report["targets"] if t["reached"] is not None or not report["partial"]]
    found = [("Targets", targets.lines(wanted)), ("Growth", growth(rows)), ("Threads", threads(rows))]
    return [(title, lines) for title, lines in found if len(lines) > 1]


def markdown(report: dict) -> str:
    peaks = {k: number(v) for k, v in report["peaks"].items()}
    facts = [f"{k.replace('_', ' ')} {v}" for k, v in report["machine"].items() if v is not None and k != "name"]
    parts = [
        f"# {report['machine']['name']}",
        f"`{report['command']}`, commit {report['commit']}, {report['date']}, seed {report['seed']}, "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        "; ".join(facts),
        "Peaks measured in this run, GFLOP/s and GB/s: " + ", ".join(f"{k} {v}" for k, v in peaks.items()),
        "`of bound`: the time that these peaks allow for the flops and the bytes of the case, over the median. "
        "`over floors`: ours over the parts that bound it. `ratio`: best peer's median over ours. "
        "MiB: peak memory of one call beyond its inputs.",
        markdown_table(summary(report["rows"])),
        *(f"## {title}\n\n{markdown_table(lines)}" for title, lines in sections(report)),
        "## All providers",
        markdown_table(details(report["rows"])),
        *(["## Not measured", "\n".join(f"- {c}" for c in report["not_measured"])] if report["not_measured"] else []),
    ]
    return "\n\n".join(parts) + "\n"


def _versions(device: str) -> dict:
    versions = {"palm_kernels": pk.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in PEERS[device]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one or two cases an op, about 2 minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=STEMS, metavar="STEM", help=f"of {', '.join(STEMS)}")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--scaling",
        action=argparse.BooleanOptionalAction,
        help="ours on one thread and on all, for what arithmetic bounds (CPU; default: without --quick)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="begin no case after this time")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder that gets <machine>/ (default: $OUT itself if set, else benchmarks/results)",
    )
    options = parser.parse_args(argv)
    if options.device == "cuda":
        require_gpu("benchmarks.report --device cuda")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads}: need 1 or more")
    if options.scaling is None:
        options.scaling = not options.quick
    options.scaling = options.scaling and options.device == "cpu" and (options.threads or torch.get_num_threads()) > 1
    return options


def _folder(results: Path | None, machine: str) -> Path:
    if results is None and os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return (results or HERE / "results") / machine


def _save(report: dict, folder: Path, name: str) -> None:
    wanted = gpu_targets.TARGETS if report["device"] == "cuda" else cpu_targets.for_machine(report["peaks"])
    report["targets"] = targets.results(wanted, report["rows"])
    write(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
    write(folder / f"{name}.md", markdown(report))


def measure_all(report: dict, options: argparse.Namespace, save) -> None:
    """Fills report's rows, and lists what did not get its turn."""
    efforts = {("cpu", False): FULL, ("cpu", True): QUICK, ("cuda", False): GPU_FULL, ("cuda", True): GPU_QUICK}
    effort, start, skipped = efforts[options.device, options.quick], time.monotonic(), []
    for stem, bench, case in progress(chosen(options.only, options.quick, options.device)):
        name = f"{bench.op} {describe_case(case)} {bench.variant}".strip()
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            skipped.append(f"no time left: {name}")
            continue
        if options.device == "cuda":
            print(f"{time.monotonic() - start:5.0f} s  {name}", file=sys.stderr, flush=True)
        try:
            report["rows"] += run_case(
                stem, bench, case, options.device, effort, options.seed, report["peaks"], options.scaling
            )
        except Exception as error:
            if options.device == "cpu":
                raise
            skipped.append(f"broke off: {name}: {brief(error)}")
        if options.device == "cuda":
            release()
        report["not_measured"] = complaints(report["rows"], skipped)
        save()
    report["not_measured"] = complaints(report["rows"], skipped)
    save()


def failed(report: dict) -> bool:
    """Whether one of ours was wrong or raised, a case broke off, or nothing was measured. What others cannot do is listed."""
    ours = [r for row in report["rows"] for r in row["providers"].values() if r["kind"] == "ours"]
    if not any("ms" in r for r in ours) or any(s.startswith("broke off") for s in report["not_measured"]):
        return True
    return any(r["status"] in ("wrong", "failed") for r in ours)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = {
        "machine": describe(options.device),
        "device": options.device,
        "command": " ".join(["python -m benchmarks.report", *(sys.argv[1:] if argv is None else argv)]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "partial": options.device == "cpu" and bool(options.quick or options.only),
        "seed": options.seed,
        "versions": _versions(options.device),
        "peaks": measure_peaks(options.device),
        "rows": [],
        "targets": [],
        "not_measured": [],
    }
    name = "-".join(["quick" if options.quick else "full", *(options.only or [])])
    folder = _folder(options.results, report["machine"]["name"])
    measure_all(report, options, functools.partial(_save, report, folder, name))
    print(text_table(summary(report["rows"])))
    for title, lines in sections(report):
        print(f"\n{title}\n{text_table(lines)}")
    print()
    for line in plot.pictures(report["rows"], report["peaks"], f"{report['machine']['name']}, {name}", folder / name):
        print(line)
    print(f"written: {folder / name}.md and .json")
    for line in report["not_measured"]:
        print(line, file=sys.stderr)
    return int(failed(report))


if __name__ == "__main__":
    sys.exit(main())
