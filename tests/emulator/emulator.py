"""Compiles csrc/cuda with g++ into a library that runs the kernels on CPU tensors: `python tests/emulator/emulator.py [--sanitize]`.

PALM_KERNELS_CUDA_LIBRARY=<the printed path> PALM_KERNELS_BACKEND=cuda then serves them. The CUDA toolkit gives headers only.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import setup as build  # noqa: E402  (the flags of the real build)

FLAGS = "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -DPALM_EMULATE -DPALM_SM90A=1 -Wall -Wextra -Wno-unknown-pragmas"
SANITIZE = "-fsanitize=address -fno-omit-frame-pointer"


def why_not() -> str:
    """Why nothing can be emulated here, or ''."""
    if build.find_nvcc() is None:
        return "no CUDA toolkit, whose headers the emulator needs"
    return "" if shutil.which("g++") else "no g++"


def ninja(folder: pathlib.Path, lines: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    tool = shutil.which("ninja") or str(pathlib.Path(sys.executable).with_name("ninja"))
    done = subprocess.run([tool, "-C", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-6000:])


def rules(sanitize: bool) -> list[str]:
    _, home = build.find_nvcc()
    flags = f"{FLAGS} -I{ROOT}/tests/emulator -I{home}/include" + (f" {SANITIZE}" if sanitize else "")
    return [
        f"rule cxx\n  command = g++ -x c++ {flags} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ -shared {SANITIZE if sanitize else ''} $in -o $out $libs",
    ]


def sources() -> list[pathlib.Path]:
    return sorted([*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "csrc/cuda/bindings.cpp"])


def library(folder: pathlib.Path, *, sanitize: bool = False) -> pathlib.Path:
    """Build folder/_emulated.so from this tree and return it."""
    torch_include, torch_lib = build.torch_folders()
    lines, objects = rules(sanitize), []
    for source in sources():
        extra = f"{build.TARGET} {torch_include}" if source.suffix == ".cpp" else ""
        objects.append(f"{source.stem}.o")
        lines.append(f"build {source.stem}.o: cxx {source}\n  flags = {extra}")
    ninja(folder, [*lines, link_line(objects, torch_lib)])
    return folder / "_emulated.so"


def link_line(objects: list[str], torch_lib: pathlib.Path) -> str:
    return f"build _emulated.so: link {' '.join(objects)}\n  libs = -L{torch_lib} -Wl,--no-as-needed -ltorch_cpu -lc10"


def changed(folder: pathlib.Path, file: str, old: str, new: str) -> pathlib.Path:
    """A copy of the sources in `folder` with `old`, which stands once in csrc/cuda/<file>, replaced by `new`."""
    text = (ROOT / "csrc/cuda" / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} has {text.count(old)} times {old!r}")
    for part in ("csrc", "tests/emulator"):
        shutil.copytree(ROOT / part, folder / part, dirs_exist_ok=True)
    (folder / "csrc/cuda" / file).write_text(text.replace(old, new))
    return folder


def planted(folder: pathlib.Path, file: str, old: str, new: str, compiled: str, *, sanitize: bool) -> pathlib.Path:
    """The library of changed sources; compiled: the .cu that shows the change."""
    whole = default(sanitize).parent
    changed(folder, file, old, new)
    others = [str(whole / f"{source.stem}.o") for source in sources() if source.stem != compiled]
    # first, because of inline functions that several objects hold the linker takes the first
    line = link_line([f"{compiled}.o", *others], build.torch_folders()[1])
    ninja(folder, [*rules(sanitize), f"build {compiled}.o: cxx {folder}/csrc/cuda/{compiled}.cu", line])
    return folder / "_emulated.so"


def probes(
    name: str = "probes", *, on_gpu: bool, arch: str = "-arch=native", tree: pathlib.Path = ROOT
) -> pathlib.Path:
    """Build <name>.cu, the C functions that a test calls."""
    folder, source = tree / "build" / "probes", tree / "tests" / "emulator" / f"{name}.cu"
    out = folder / f"{name}{'_gpu' if on_gpu else ''}.so"
    if on_gpu:
        folder.mkdir(parents=True, exist_ok=True)
        nvcc, _ = build.find_nvcc()
        options = ["-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC", arch, "-DPALM_SM90A=1"]
        subprocess.run([nvcc, *options, str(source), "-o", str(out)], check=True)
    else:
        lines = [f"build {name}.o: cxx {source}", f"build {name}.so: link {name}.o"]
        ninja(folder, [*rules(False), *lines])
    return out


def preloaded() -> dict[str, str]:
    """Environment for a process that loads a sanitized library."""
    found = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
        for n in ("libasan.so", "libstdc++.so.6")
    ]
    return {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}


def default(sanitize: bool = False) -> pathlib.Path:
    """The library of this tree, built where it is out of date."""
    return library(ROOT / "build" / ("emulator_asan" if sanitize else "emulator"), sanitize=sanitize)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sanitize", action="store_true", help="with AddressSanitizer (run under LD_PRELOAD of libasan)"
    )
    print(default(parser.parse_args().sanitize))
