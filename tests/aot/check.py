"""`make triton-check`: compiles every shipped configuration, writes the table of its resources, fails where a budget is broken."""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
import sys

import torch
import triton
from compiler import ARCHS, ROOT, Kernel, compile_launches
from launches import CASES
from triton.backends.nvidia.compiler import get_ptxas_version

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


def write(kernels: list[Kernel], command: str) -> None:
    """<results>/triton-<version>.md and .json"""
    versions = {f"sm_{arch}": re.findall(r"V([\d.]+)", get_ptxas_version(arch))[-1] for arch in ARCHS}
    facts = {"command": command, "triton": triton.__version__, "ptxas": versions, "torch": torch.__version__}
    rows = [[str(read(k)) for read in COLUMNS.values()] for k in kernels]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [list(COLUMNS), ["---"] * len(COLUMNS), *rows])
    ptxas = ", ".join(f"{v} for {arch}" for arch, v in versions.items())
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"triton-{triton.__version__}"
    path.with_name(f"{path.name}.md").write_text(
        f"# What the Triton kernels take, from their machine code\n\n`{command}`: {len(kernels)} kernels, triton "
        f"{triton.__version__}, ptxas {ptxas}. Registers a thread; stack and shared memory in bytes; spills, MMA and 16-byte "
        f"accesses are instructions in the code. tests/aot/README.md says how to read it.\n\n{table}\n"
    )
    entries = ({**dataclasses.asdict(k), "blocks": k.blocks, "occupancy": k.occupancy} for k in kernels)
    lines = ",\n".join(json.dumps({key: v for key, v in entry.items() if key != "hash"}) for entry in entries)
    path.with_name(f"{path.name}.json").write_text(f'{{"facts": {json.dumps(facts)},\n"kernels": [\n{lines}\n]}}\n')
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
        write(kernels, "make triton-check" + f" TRITON={triton.__version__}" * bool(os.environ.get("TRITON")))
    failures += [broken for k in kernels for broken in k.broken_budgets()]
    print(f"{len(failures)} budgets broken", *failures, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
