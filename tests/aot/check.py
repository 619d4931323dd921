"""`make triton-check`: compiles every shipped configuration, writes the table of its resources, fails where a budget is broken."""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable

import torch
import triton
from compiler import ARCHS, ROOT, Kernel, compile_launches
from launches import CASES
from triton.backends.nvidia.compiler import get_ptxas_version

from benchmarks.tables import markdown_table, write

RESULTS = ROOT / "benchmarks/results/triton-resources"
COLUMNS = {
    "kernel": lambda k: k.name,
    "arch": lambda k: f"sm_{k.arch}",
    "case": lambda k: k.case,
    "configuration": lambda k: k.configuration,
    "warps": lambda k: k.warps,
    "registers": lambda k: k.registers,
    "stack": lambda k: k.stack,
    "spills": lambda k: k.spills,
    "shared": lambda k: k.shared,
    "blocks per SM": lambda k: k.blocks,
    "occupancy": lambda k: f"{k.occupancy:.0%}",
    "MMA": lambda k: k.products,
    "16-byte loads": lambda k: k.wide_loads,
    "16-byte stores": lambda k: k.wide_stores,
}
GROUP_COLUMNS = {
    "arch": lambda g: f"sm_{g[0].arch}",
    "tiles": lambda g: tiles(g[0].configuration),
    "kernels": len,
    "warps": lambda g: g[0].warps,
    "registers": lambda g: span(k.registers for k in g),
    "stack": lambda g: max(k.stack for k in g),
    "spills": lambda g: max(k.spills for k in g),
    "shared": lambda g: max(k.shared for k in g),
    "blocks per SM": lambda g: min(k.blocks for k in g),
    "occupancy": lambda g: f"{min(k.occupancy for k in g):.0%}",
    "MMA": lambda g: " ".join(m for m in ("HGMMA", "HMMA") if any(getattr(k, m) for k in g)),
    "16-byte loads": lambda g: span(k.wide_loads for k in g),
    "16-byte stores": lambda g: span(k.wide_stores for k in g),
}


def compile_case(name: str, arch: int) -> tuple[list[Kernel], str | None]:
    """The case's kernels, or why there are none."""
    try:
        return [dataclasses.replace(k, case=name) for k in compile_launches(arch, CASES[name].call)], None
    except Exception as error:
        return [], f"{name} sm_{arch}: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"


def compile_all(names: list[str], jobs: int) -> tuple[list[Kernel], list[str]]:
    """Every kernel once, in the table's order, and every failure."""
    kernels, failures = {}, []
    work = [(name, arch) for name in names for arch in ARCHS]
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for i, (found, failure) in enumerate(pool.map(compile_case, *zip(*work, strict=True))):
            for kernel in found:
                kernels.setdefault(kernel.hash, kernel)
            failures += [failure] if failure else []
            if sys.stderr.isatty():
                print(f"\r{i + 1} of {len(work)} calls, {len(kernels)} kernels", end="", file=sys.stderr)
    return sorted(kernels.values(), key=lambda k: (k.name, k.case, k.arch)), failures


def tiles(configuration: str) -> str:
    """Its tile sizes and floating-point types: without flags, precision and indices, of which there are many combinations."""
    return " ".join(dict.fromkeys(re.findall(r"\b(?!PREC=)\w+=(?!True|False)\S+|(?<=:)b?f\w+", configuration)))


def span(values: Iterable[int]) -> tuple[int, int]:
    values = list(values)
    return min(values), max(values)


def table(kernels: list[Kernel]) -> dict[str, list[list]]:
    """By kernel: a row of GROUP_COLUMNS for each chip, tile configuration and number of warps."""
    groups: dict[tuple, list[Kernel]] = {}
    for k in kernels:
        groups.setdefault((k.name, tiles(k.configuration), k.arch, k.warps), []).append(k)
    rows: dict[str, list[list]] = {}
    for (name, *_), group in groups.items():
        rows.setdefault(name, []).append([read(group) for read in GROUP_COLUMNS.values()])
    return rows


def cell(value: str | int | tuple[int, int]) -> str:
    """A tuple is a range."""
    return "-".join(map(str, dict.fromkeys(value))) if isinstance(value, tuple) else str(value)


def save(kernels: list[Kernel], command: str) -> None:
    """<results>/triton-<version>.md and .json"""
    versions = {f"sm_{arch}": re.findall(r"V([\d.]+)", get_ptxas_version(arch))[-1] for arch in ARCHS}
    facts = {"command": command, "triton": triton.__version__, "ptxas": versions, "torch": torch.__version__}
    rows = table(kernels)
    ptxas = ", ".join(f"{v} for {arch}" for arch, v in versions.items())
    parts = [
        "# What the Triton kernels take, from their machine code",
        f"`{command}`: {len(kernels)} kernels, triton {triton.__version__}, ptxas {ptxas}. A row is all kernels of one chip, tile "
        "configuration and number of warps, whatever their masks and options: least-most registers a thread and 16-byte accesses, "
        "most stack, spills and shared memory, fewest blocks on an SM. Stack and shared memory are in bytes; spills and 16-byte "
        "accesses are instructions in the code. tests/aot/README.md says how to read it.",
    ]
    for name, lines in rows.items():
        parts += [f"## {name}", markdown_table([list(GROUP_COLUMNS), *(list(map(cell, line)) for line in lines)])]
    path = RESULTS / f"triton-{triton.__version__}"
    write(path.with_name(f"{path.name}.md"), "\n\n".join(parts) + "\n")
    entries = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines) + "\n]"
        for name, lines in rows.items()
    )
    columns = json.dumps(list(GROUP_COLUMNS))
    text = f'{{"facts": {json.dumps(facts)},\n"columns": {columns},\n"kernels": {{\n{entries}\n}}}}\n'
    write(path.with_name(f"{path.name}.json"), text)
    print(f"{len(kernels)} kernels in {path.relative_to(ROOT)}.md and .json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make triton-check ARGS=...", description=__doc__)
    parser.add_argument("--only", default="", help="regular expression: cases to compile; no table is written")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args()
    names = [name for name in CASES if re.search(options.only, name)]
    kernels, failures = compile_all(names, options.jobs)
    if options.only:
        for k in kernels:
            print(*(f"{title} {read(k)};" for title, read in COLUMNS.items()))
    else:
        save(kernels, "make triton-check" + f" TRITON={triton.__version__}" * bool(os.environ.get("TRITON")))
    failures += [broken for k in kernels for broken in k.broken_budgets()]
    print(f"{len(failures)} budgets broken", *failures, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
