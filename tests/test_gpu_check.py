"""gpu-check and tune as far as they go without a GPU: arguments, parts, time limits, a tool that refuses, tables."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))
from benchmarks import gpu_check, machine  # noqa: E402
from benchmarks.gpu_check import Result, Step  # noqa: E402

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where everything is written, with a GPU that is not there."""
    monkeypatch.setattr(gpu_check, "BUILD", tmp_path / "build")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(machine, "require_gpu", lambda command: None)
    monkeypatch.setattr(machine, "describe", lambda device: {"name": "none"})
    monkeypatch.setattr(gpu_check, "build", lambda: [])
    return tmp_path / "out"


def python(program, part="tests", limit=60.0):
    return Step(part, "a step", [sys.executable, "-c", program], dict(os.environ), limit)


@needs_no_gpu
def test_without_a_gpu(capsys):
    for module in (gpu_check, importlib.import_module("benchmarks.tune"), importlib.import_module("benchmarks.report")):
        with pytest.raises(SystemExit) as error:
            module.main(["--device", "cuda"] if "report" in module.__name__ else [])
        said = capsys.readouterr()
        assert (
            error.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and "sees no CUDA device" in said.err
        )


def test_bad_part(capsys):
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["tests", "everything"])
    assert error.value.code == 2 and "PART 'everything' is none of tests, sanitize, speed" in capsys.readouterr().err


@pytest.mark.parametrize("parts", [[], ["speed"], ["tests", "sanitize"]])
def test_dry_run(parts, capsys):
    assert gpu_check.main([*parts, "--dry-run", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list(dict.fromkeys(line.split(":")[0] for line in lines)) == (parts or list(gpu_check.PARTS))
    for line in lines:
        assert ("cases.py" in line) == line.startswith("sanitize")
    if parts != ["speed"]:
        assert "tests/test_gpu.py" in lines[0] and "test_ner" not in lines[0] and "not hypothesis" in lines[0]


def test_make_target():
    for given, wanted in (
        (["PART=tests"], "-m benchmarks.gpu_check tests"),
        (["GPU_PY=py9"], "py9 -m benchmarks.gpu_check"),
    ):
        done = subprocess.run(["make", "-n", "gpu-check", *given], cwd=ROOT, capture_output=True, text=True, check=True)
        assert wanted in done.stdout and "pip" not in done.stdout and "setup.py" not in done.stdout


def test_goes_on_past_what_fails(folder, monkeypatch, capsys):
    """Status 1, the table last, and the JSON holds all of it."""

    def breaks(folder, quick):
        yield Result("sanitize", "memcheck", "skipped", 0.0, "not here")
        raise OSError("disk full")

    def fails(folder, quick):
        yield Result("tests", "pytest", "failed", 1.0, "2 failed")

    def fine(folder, quick):
        yield Result("speed", "report", "ok", 2.0)

    monkeypatch.setattr(gpu_check, "RUN", {"tests": fails, "sanitize": breaks, "speed": fine})
    assert gpu_check.main([]) == 1
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert [line.split()[0] for line in table.splitlines()] == ["part", "tests", "sanitize", "sanitize", "speed"]
    assert "OSError: disk full" in table
    saved = json.loads((folder / "gpu-check.json").read_text())
    assert [r["verdict"] for r in saved["results"]] == ["failed", "skipped", "failed", "ok"]
    monkeypatch.setattr(gpu_check, "RUN", {"tests": fails, "sanitize": breaks, "speed": fine})
    assert gpu_check.main(["speed"]) == 0


def test_run(tmp_path):
    log = tmp_path / "log"
    assert gpu_check.run(python("print('hello')"), log).verdict == "ok"
    failed = gpu_check.run(python("import sys; sys.exit(3)"), log)
    assert failed.verdict == "failed" and failed.note == "status 3" and "hello" in log.read_text()
    assert gpu_check.run(Step("tests", "none", ["/nowhere"], {}, 1.0), log).verdict == "failed"


def test_time_limit_ends_children_too(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(marker)!r}).touch()"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    assert gpu_check.run(python(program, limit=1.0), tmp_path / "log").verdict == "timed out"
    assert time.monotonic() - start < 20
    time.sleep(3.5)
    assert not marker.exists()


def test_tests_part(folder, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "backends", lambda: ["triton", "cuda"])
    programs = {
        "triton": "print('FAILED tests/test_x.py::test_y'); print('=== 1 failed in 2s ==='); exit(1)",
        "cuda": "print('3 passed')",
    }
    monkeypatch.setattr(gpu_check, "test_step", lambda backend, quick: python(programs[backend])._replace(name=backend))
    assert gpu_check.main(["tests"]) == 1
    said = capsys.readouterr().out
    assert "FAILED tests/test_x.py::test_y" in said and "3 passed" in said
    assert [r["verdict"] for r in json.loads((folder / "gpu-check.json").read_text())["results"]] == ["failed", "ok"]


def test_backends():
    assert gpu_check.backends()[0] == "triton"


REFUSES = "echo '========= COMPUTE-SANITIZER'; echo '========= Error: Device not supported. Please refer to the manual.'; exit 1"
FINDS = 'for last; do :; done; case "$last" in *bad*) echo "========= ERROR SUMMARY: 1 error"; exit 86;; esac; exit 0'


@pytest.mark.parametrize(
    ("script", "verdicts", "notes"),
    [
        (REFUSES, ["ok", "skipped", "skipped"], ["2 cases", "does not work here: Error: Device not supported", ""]),
        (FINDS, ["ok", "failed", "failed"], ["2 cases", "bad found errors", "bad found errors"]),
        ("exit 0", ["ok", "ok", "ok"], ["2 cases", "2 cases", ""]),
        (None, ["ok", "skipped"], ["2 cases", "compute-sanitizer is not installed"]),
    ],
)
def test_sanitize_part(script, verdicts, notes, folder, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    if script:
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: str(tool) if script else None)
    monkeypatch.setattr(gpu_check, "case_names", lambda tool, quick: ["good", "bad"])
    real = gpu_check.case_step
    monkeypatch.setattr(
        gpu_check,
        "case_step",
        lambda name, tool, backend="triton", program=None: real(
            name, tool, backend, program or [sys.executable, "-c", f"print('{name}')"]
        ),
    )
    monkeypatch.setattr(gpu_check, "backends", lambda: ["triton"])
    assert gpu_check.main(["sanitize"]) == ("failed" in verdicts)
    results = json.loads((folder / "gpu-check.json").read_text())["results"]
    assert [r["verdict"] for r in results] == verdicts
    for result, note in zip(results, notes, strict=False):
        assert note in result["note"]
    assert (folder / "sanitize.log").read_text().count("print(") == 2 * len([v for v in verdicts if v != "skipped"])


def test_every_backend_is_sanitized(folder, monkeypatch):
    program = "import os; print('on', os.environ['PALM_KERNELS_BACKEND'])"
    real = gpu_check.case_step
    monkeypatch.setattr(
        gpu_check, "case_step", lambda name, tool, backend: real(name, tool, backend, [sys.executable, "-c", program])
    )
    monkeypatch.setattr(gpu_check, "case_names", lambda tool, quick: ["one"])
    monkeypatch.setattr(gpu_check, "backends", lambda: ["triton", "cuda"])
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    assert gpu_check.main(["sanitize"]) == 0
    results = json.loads((folder / "gpu-check.json").read_text())["results"]
    assert [r["name"] for r in results[:2]] == ["triton, without a tool", "cuda, without a tool"]
    said = (folder / "sanitize.log").read_text()
    assert "\non triton\n" in said and "\non cuda\n" in said


def test_sanitizer_sees_every_tensors_bounds():
    step = gpu_check.case_step("swiglu", "memcheck")
    assert step.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and step.command[-1] == "swiglu"
    assert not [n for n in gpu_check.case_names("racecheck", False) if n == "parallel_block"]


def test_without_hypothesis(tmp_path):
    """Property tests are skipped, the others of the file run."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'hypothesis': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "-rs",
        "-p",
        "no:hypothesispytest",
        "-p",
        "no:xdist",
    ]
    command += ["-p", "no:cacheprovider", "tests/test_swiglu.py", "-k", "any_shape or gradcheck"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "1 passed, 1 skipped" in done.stdout and "hypothesis is not installed" in done.stdout, (
        done.stdout + done.stderr
    )


# ---- tune ----
tune = pytest.importorskip("benchmarks.tune")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ENTRY = tune.Entry("dkdv", 128, "bfloat16")


@needs_triton
def test_tiles_are_replaced_for_one_kernel_and_put_back():
    from palm_kernels._triton import attention_tiles

    before = {name: tune.shipped(tune.Entry(name, 128, "bfloat16"), 90) for name in tune.KERNELS}
    with tune.tiles("decode", (1, 2, 3, 4)):
        assert attention_tiles.config("decode", 90, 64, torch.float32) == dict(
            zip(tune.FIELDS, (1, 2, 3, 4), strict=False)
        )
        assert tune.shipped(ENTRY, 90) == before["dkdv"]
    with pytest.raises(ZeroDivisionError), tune.tiles("dkdv", (1, 2, 3, 4)):
        assert attention_tiles.config("dkdv", 90, 64, torch.bfloat16)["BM"] == 1 / 0
    with tune.tiles("dkdv", (32, 64, 8, 2, 32)):
        assert tune.shipped(ENTRY, 90) == (32, 64, 8, 2, 32)
    assert {name: tune.shipped(tune.Entry(name, 128, "bfloat16"), 90) for name in tune.KERNELS} == before


@needs_triton
def test_candidates_fit_the_chip():
    for name in tune.KERNELS:
        for D in (64, 256):
            entry = tune.Entry(name, D, "float32")
            large, small = tune.candidates(entry, 232448), tune.candidates(entry, 166_912)
            assert set(small) <= set(large) and len(large) > len(small) > 0
            assert all(tune._shared_bytes(entry, c) <= 166_912 for c in small)


@needs_triton
def test_measure_and_choose(monkeypatch):
    """Through a clock that knows which tiles are in force."""
    times = {(64, 64, 4, 2): 3.0, (128, 64, 8, 2): 2.0, (64, 128, 8, 3): 2.03}
    monkeypatch.setattr(tune, "problem", lambda entry: lambda: None)
    ms = tune.measure(ENTRY, list(times), lambda call: times[tune.shipped(ENTRY, 90)] / 1e3, rounds=3)
    assert ms == pytest.approx(times)
    assert tune.choose(ms, (64, 64, 4, 2)) == (128, 64, 8, 2)
    assert tune.choose(ms, (64, 128, 8, 3)) == (64, 128, 8, 3)  # not worth a change
    assert tune.choose(ms, (1, 2, 3, 4)) == (128, 64, 8, 2)  # does not run
    text = tune.line(ENTRY, (128, 64, 8, 2), (64, 64, 4, 2), ms)
    assert text == '    ("dkdv", True, 128): (128, 64, 8, 2),  # 2 ms, was 3 ms with (64, 64, 4, 2)'
    assert eval("{" + text + "\n}") == {("dkdv", True, 128): (128, 64, 8, 2)}
    assert tune.line(ENTRY._replace(bias=True), (64, 64, 4, 2), (64, 64, 4, 2), ms).startswith(
        '    ("dkdv+bias", True, 128)'
    )


@needs_triton
def test_try_out(monkeypatch):
    """On the CPU the tiles mean nothing, but the check is the same."""
    monkeypatch.setattr(tune, "WIDTH", 512)
    for name, bias in (("fwd", False), ("dq", True), ("decode", True)):
        assert tune.try_out(tune.Entry(name, 256, "bfloat16", bias), (64, 64, 4, 2), device="cpu") == ""
    monkeypatch.setattr(tune, "check_op", lambda *args, **kwargs: 1 / 0)
    assert tune.try_out(ENTRY, (64, 64, 4, 2), device="cpu") == "ZeroDivisionError: division by zero"


def test_tune_arguments(capsys):
    assert tune.main(["--list", "--kernels", "fwd", "--dims", "64"]) == 0
    assert capsys.readouterr().out.startswith("fwd D=64 bfloat16: ")
    for arguments in (["--dims", "300"], ["--kernels", "all"], ["--rounds", "0"]):
        with pytest.raises(SystemExit) as error:
            tune.main(arguments)
        assert error.value.code == 2
