"""`make gpu-check PART=tests|sanitize|speed`: everything that wants a GPU, in one command, from the source tree.

tests: the tests marked `kernel` and `gpu` on CUDA tensors. sanitize: tests/cases.py under compute-sanitizer. Both once a backend.
speed: benchmarks.report --device cuda. A part that fails does not stop the next; a table comes last; status 1 if something failed.
Kernels are compiled into one cache, build/gpu-check. Logs go beside the results: to $OUT if set, else to build/gpu-check.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .tables import write

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gpu-check"
PARTS = ("tests", "sanitize", "speed")
LIMIT = 470  # seconds that a part may take: under 8 minutes
FOUND = 86  # compute-sanitizer's exit status where it found something
TOOLS = ("memcheck", "racecheck")
EXIT = {True: "ok", False: "failed"}


class Step(NamedTuple):
    part: str
    name: str
    command: list[str]
    env: dict[str, str]
    limit: float


class Result(NamedTuple):
    part: str
    name: str
    verdict: str  # "ok", "failed", "timed out" or "skipped"
    seconds: float
    note: str = ""


def environment(**more: str) -> dict[str, str]:
    """The caller's, with the source tree importable and one cache for all compilers; what the caller set for these holds."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {
        "TRITON_CACHE_DIR": str(BUILD / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor"),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "HYPOTHESIS_PROFILE": "interpreter",
        "PYTHONUNBUFFERED": "1",
    }
    return {**ours, **os.environ, "PYTHONPATH": path, **more}


def workers() -> int:
    return max(1, min(12, os.cpu_count() or 1))


def test_files() -> list[str]:
    """Files with tests for a GPU: the others may import what is not installed beside it."""
    files = sorted([*(ROOT / "tests").glob("test_*.py"), *(ROOT / "tests/emulator").glob("test_[fh]*.py")])
    marked = [f for f in files if "mark.kernel" in f.read_text() or "mark.gpu" in f.read_text()]
    return [str(f.relative_to(ROOT)) for f in marked]


def test_step(backend: str, quick: bool) -> Step:
    command = [sys.executable, "-m", "pytest", *test_files(), "-m", "(kernel or gpu)" + " and not hypothesis" * quick]
    command += [
        "-q",
        "--tb=short",
        "-rfE",
        "--maxfail=40",
        "--durations=10",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
    ]
    command += ["-o", "faulthandler_timeout=240"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers())]
    env = environment(PALM_KERNELS_TEST_DEVICE="cuda", PALM_KERNELS_BACKEND=backend)
    return Step("tests", f"pytest, {backend}", command, env, LIMIT)


def speed_step(quick: bool) -> Step:
    command = [sys.executable, "-m", "benchmarks.report", "--device", "cuda", "--minutes", "2.5" if quick else "6"]
    return Step("speed", "benchmarks.report", command + ["--quick"] * quick, environment(), LIMIT)


def case_step(name: str, tool: str | None, backend: str = "triton", program: list[str] | None = None) -> Step:
    """A case of tests/cases.py on one backend, by itself or under one of compute-sanitizer's tools.

    Every tensor gets an allocation of its own, for the tool sees the bounds of allocations and not those of tensors.
    """
    command = program or [sys.executable, str(ROOT / "tests" / "cases.py"), name]
    if tool is None:
        return Step("sanitize", name, command, environment(PALM_KERNELS_BACKEND=backend), 240)
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    options += ["--report-api-errors", "no", "--print-limit", "20"]
    env = environment(PALM_KERNELS_BACKEND=backend, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return Step(
        "sanitize", f"{name}, {backend}, {tool}", [sanitizer() or "compute-sanitizer", *options, *command], env, 240
    )


def sanitizer() -> str | None:
    usual = "/usr/local/cuda/bin/compute-sanitizer"
    return shutil.which("compute-sanitizer") or (usual if os.path.exists(usual) else None)


def run(step: Step, log: Path) -> Result:
    """The step in a session of its own, its output appended to `log`; ended with all its children when its time is over."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("a") as out:
        out.write(f"\n$ {shlex.join(step.command)}\n")
        out.flush()
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=step.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Result(step.part, step.name, "failed", 0.0, str(error))
        try:
            status = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Result(step.part, step.name, "timed out", time.monotonic() - start, f"after {step.limit:.0f} s")
    return Result(
        step.part, step.name, EXIT[status == 0], time.monotonic() - start, "" if status == 0 else f"status {status}"
    )


def left(end: float, most: float) -> float:
    return max(1.0, min(most, end - time.monotonic()))


def last_lines(log: Path, count: int) -> list[str]:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-count:]


def backends() -> list[str]:
    """Triton, and CUDA where its library is loaded and serves an op."""
    sys.path.insert(0, str(ROOT))
    from palm_kernels import dispatch

    return ["triton", *(["cuda"] if any(dispatch._served("cuda", op) for op in dispatch.KERNELS) else [])]


def tests(folder: Path, quick: bool) -> Iterator[Result]:
    end = time.monotonic() + LIMIT
    for backend in backends():
        log = folder / f"tests-{backend}.log"
        log.unlink(missing_ok=True)
        result = run(test_step(backend, quick)._replace(limit=left(end, LIMIT)), log)
        said = last_lines(log, 60)
        if result.verdict != "ok":
            print("\n".join(line[:300] for line in said))
        yield result._replace(note=result.note or (said[-1].strip("= ") if said else ""))


def case_names(tool: str | None, quick: bool) -> list[str]:
    """Cases of tests/cases.py. racecheck looks at shared memory: without those where it is mostly the GEMMs of cuBLAS that have some."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from cases import CASES

    names = list(CASES)[:: 3 if quick else 1]
    return [n for n in names if tool != "racecheck" or not n.startswith(("linear_cross_entropy", "parallel_block"))]


def probe(tool: str, log: Path) -> str:
    """Why the tool cannot be used here, or nothing: it is tried on a program in which there is nothing to find."""
    program = "import torch; torch.ones(8, device='cuda').add_(1); torch.cuda.synchronize(); print('fine')"
    log.unlink(missing_ok=True)
    if run(case_step("probe", tool, program=[sys.executable, "-c", program]), log).verdict == "ok":
        return ""
    said = [line.strip("= ") for line in last_lines(log, 60) if not line.startswith("$ ")]
    reasons = [line for line in said if "rror" in line or "not supported" in line]
    return next(iter([*reasons, *said[-1:]]), "it says nothing")


def sanitize_tool(tool: str | None, backend: str, quick: bool, folder: Path, jobs: int, end: float) -> Result:
    """Every case in a process of its own, several at a time."""
    label, start, names = f"{backend}, {tool or 'without a tool'}", time.monotonic(), case_names(tool, quick)
    logs = {name: BUILD / "sanitize" / f"{label.replace(', ', '-').replace(' ', '-')}-{name}.log" for name in names}
    for log in logs.values():
        log.unlink(missing_ok=True)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        done = pool.map(
            lambda name: run(case_step(name, tool, backend)._replace(limit=left(end, 240)), logs[name]), names
        )
        results = list(done)
    with (folder / "sanitize.log").open("a") as whole:
        whole.writelines(logs[name].read_text(errors="replace") for name in names)
    bad = {name: r for name, r in zip(names, results, strict=True) if r.verdict != "ok"}
    for name in bad:
        print(f"{label}, {name}:\n" + "\n".join(line[:200] for line in last_lines(logs[name], 12)))
    worst = "timed out" if bad and all(r.verdict == "timed out" for r in bad.values()) else "failed"
    found = {f"status {FOUND}": "found errors"}
    note = ", ".join(f"{name} {found.get(r.note, r.note)}" for name, r in bad.items()) or f"{len(names)} cases"
    return Result("sanitize", label, worst if bad else "ok", time.monotonic() - start, note)


def sanitize(folder: Path, quick: bool) -> Iterator[Result]:
    end = time.monotonic() + LIMIT
    (folder / "sanitize.log").unlink(missing_ok=True)
    for backend in backends():
        yield sanitize_tool(None, backend, quick, folder, workers(), end)
    if sanitizer() is None:
        yield Result("sanitize", "compute-sanitizer", "skipped", 0.0, "compute-sanitizer is not installed")
        return
    for tool in TOOLS:
        if reason := probe(tool, BUILD / "sanitize" / f"probe-{tool}.log"):
            yield Result("sanitize", tool, "skipped", 0.0, f"does not work here: {reason[:120]}")
        else:
            for backend in backends():
                yield sanitize_tool(tool, backend, quick, folder, min(8, workers()), end)


def speed(folder: Path, quick: bool) -> Iterator[Result]:
    log = folder / "speed.log"
    log.unlink(missing_ok=True)
    result = run(speed_step(quick), log)
    print("\n".join(line.rstrip() for line in log.read_text(errors="replace").splitlines()[-90:]))
    yield result


def build() -> Iterator[Result]:
    """_cuda.so, where there are CUDA sources and nobody brought it along."""
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")) or (ROOT / "palm_kernels" / "_cuda.so").exists():
        return
    missing = [tool for tool in ("g++", "nvcc") if shutil.which(tool) is None]
    if missing:
        yield Result("build", "_cuda.so", "skipped", 0.0, f"{' and '.join(missing)} not found")
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    yield run(Step("build", "_cuda.so", command, environment(), LIMIT), BUILD / "build.log")


RUN = {"tests": tests, "sanitize": sanitize, "speed": speed}


def table(results: list[Result]) -> str:
    lines = [("part", "step", "result", "seconds", "note")]
    lines += [(r.part, r.name, r.verdict, f"{r.seconds:.0f}", r.note[:160]) for r in results]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        "  ".join([*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[4]]).rstrip() for line in lines
    )


def go(parts: list[str], folder: Path, quick: bool) -> list[Result]:
    """Every part in turn, whatever became of the one before."""
    results = list(build())
    for part in parts:
        print(f"== {part}", flush=True)
        start = time.monotonic()
        try:
            for result in RUN[part](folder, quick):
                results.append(result)
                print(f"{result.name}: {result.verdict}, {result.seconds:.0f} s {result.note[:160]}", flush=True)
        except Exception as error:
            results.append(
                Result(
                    part, "the script itself", "failed", time.monotonic() - start, f"{type(error).__name__}: {error}"
                )
            )
    return results


def dry_run(parts: list[str], quick: bool) -> None:
    steps = {
        "tests": [test_step(backend, quick) for backend in backends()],
        "sanitize": [
            case_step(name, tool, backend)
            for tool in (None, *TOOLS)
            for backend in backends()
            for name in case_names(tool, quick)
        ],
        "speed": [speed_step(quick)],
    }
    for part in parts:
        for step in steps[part]:
            print(f"{part}: {shlex.join(step.command)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all, one after another"
    )
    parser.add_argument(
        "--quick", action="store_true", help="no property tests, a third of the cases, the quick report"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands; needs no GPU")
    options = parser.parse_args(argv)
    options.parts = options.parts or list(PARTS)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"PART {part!r} is none of {', '.join(PARTS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.dry_run:
        dry_run(options.parts, options.quick)
        return 0
    from .machine import describe, require_gpu

    require_gpu("gpu-check")
    folder = Path(os.environ.get("OUT") or BUILD)
    folder.mkdir(parents=True, exist_ok=True)
    results = go(options.parts, folder, options.quick)
    report = {"machine": describe("cuda"), "results": [r._asdict() for r in results]}
    write(folder / "gpu-check.json", json.dumps(report, indent=1) + "\n")
    print("\n" + table(results))
    return int(any(r.verdict in ("failed", "timed out") for r in results))


if __name__ == "__main__":
    sys.exit(main())
