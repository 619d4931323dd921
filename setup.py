"""Builds palm_kernels/_cpu.so and, where nvcc is found, palm_kernels/_cuda.so, by a ninja file written here.

torch is needed for its headers and link names only; the libraries use its stable ABI and hold no Python symbols, so one wheel serves
every Python and torch 2.11 and later. Without a C++ compiler, or with PALM_KERNELS_NATIVE=0, the pure Python package is installed.
Environment: CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST ("8.0+PTX;9.0a"), MAX_JOBS, PALM_KERNELS_CUDA=0 (leave CUDA out).
"""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11: see Decisions in CONTRIBUTING.md
ARCHITECTURES = "8.0+PTX;9.0a"  # 9.0a: wgmma and TMA; the PTX serves chips that are newer than both
NVCC_FLAGS = "-std=c++17 -O3"
STEMS = ("attention", "attention_decode", "cross_entropy", "decode_linear", "norm", "peak", "rotary")
STEMS += ("soft_weak_embedding", "swiglu")
X86 = {  # instruction set: vector bytes, flags
    "v2": (16, "-march=x86-64-v2"),
    "v3": (32, "-march=x86-64-v3"),
    "v4": (64, "-march=x86-64-v4 -mprefer-vector-width=512"),
    "v4_bf16": (64, "-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16"),
}
PAIRS = {  # v4_bf16 with bf16 attention of its own: by the dot instruction, by the tile unit
    "v4_dot": X86["v4_bf16"],
    "v4_amx": (64, X86["v4_bf16"][1] + " -mamx-tile -mamx-bf16"),
}
PAIRS_STEMS = ("attention_bf16", "attention_decode_bf16", "peak")
ON_X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = X86 if ON_X86 else {"native": (16, "")}


def find_nvcc():
    """(nvcc, CUDA's root), or None. nvcc on PATH may be a wrapper script, so it is asked where it lives."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if os.environ.get("PALM_KERNELS_CUDA") == "0" or not os.path.exists(nvcc):
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.+)", said)
    return (nvcc, pathlib.Path(top[1].strip()).resolve()) if top else None


def torch_folders():
    """(g++ flags of torch's headers, folder of its libraries)."""
    try:
        import torch
    except ImportError:
        sys.exit("palm_kernels: install torch>=2.11 first, then `pip install --no-build-isolation .`")
    folder = pathlib.Path(torch.__file__).parent
    return f"-isystem {folder}/include -isystem {folder}/include/torch/csrc/api/include", folder / "lib"


def architecture_flags():
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, such as "8.0+PTX;9.0a"; what is older than 8.0 has no bfloat16 and is left out."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ") or ARCHITECTURES
    found = re.findall(r"(\d+)\.(\d[af]?)(\+PTX)?", wanted)
    archs = {major + minor: ("sm", "compute") if ptx else ("sm",) for major, minor, ptx in found if int(major) >= 8}
    if not archs:
        sys.exit(f"palm_kernels: TORCH_CUDA_ARCH_LIST={wanted!r} names nothing like 8.0, 8.0+PTX or 9.0a")
    flags = [f"-gencode arch=compute_{a},code={code}_{a}" for a, codes in archs.items() for code in codes]
    return " ".join(flags + ["-DPALM_SM90A=1"] * ("90a" in archs))


def ninja_file(out):
    """The text of build.ninja; every object has a depfile, so a touched header rebuilds what includes it."""
    include, torch_lib = torch_folders()
    isas = " ".join(f"X({isa})" for isa in ISAS)
    lines = [
        f"cflags = -O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math "
        f"-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas -Wno-uninitialized -Wno-maybe-uninitialized {TARGET}",
        f"rule cxx\n  command = {os.environ.get('CXX', 'g++')} $cflags $flags -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = $out",
        f"rule link\n  command = {os.environ.get('CXX', 'g++')} -shared $in -o $out -L{torch_lib} $libs "
        "-Wl,-z,defs\n  description = $out",
    ]

    def compile(source, name, flags, rule="cxx"):
        lines.append(f"build {name}.o: {rule} {ROOT}/csrc/{source}\n  flags = {flags}")
        return f"{name}.o"

    objects = [compile("cpu/bindings.cpp", "cpu_bindings", f"{include} '-DPALM_ISAS(X)={isas}'")]
    objects.append(compile("cpu/memory.cpp", "cpu_memory", ""))
    for stem in STEMS:
        for isa, (width, flags) in ISAS.items():
            objects.append(compile(f"cpu/{stem}.cpp", f"cpu_{stem}_{isa}", f"{flags} -DISA={isa} -DVB={width}"))
    for stem in PAIRS_STEMS if ON_X86 else ():
        for isa, (width, flags) in PAIRS.items():
            objects.append(compile(f"cpu/{stem}.cpp", f"cpu_{stem}_{isa}", f"{flags} -DISA={isa} -DVB={width}"))
    libs = "-lpthread -Wl,--no-as-needed -ltorch_cpu -lc10"
    lines.append(f"build {out}/_cpu.so: link {' '.join(objects)}\n  libs = {libs}")
    if cuda := find_nvcc():
        nvcc, home = cuda
        lines.append(
            f"rule nvcc\n  command = {nvcc} {NVCC_FLAGS} -Xcompiler -fPIC -Xcompiler -fvisibility=hidden $flags "
            "-MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n  description = $out"
        )
        objects = [compile("cuda/bindings.cpp", "cuda_bindings", f"{include} -I{home}/include")]
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects.append(compile(f"cuda/{path.name}", f"cuda_{path.stem}", architecture_flags(), "nvcc"))
        libs = f"-L{home}/lib64 -L{home}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -Wl,--as-needed "
        libs += "-lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,ALL"
        lines.append(f"build {out}/_cuda.so: link {' '.join(objects)}\n  libs = {libs}")
    else:
        print("palm_kernels: nvcc not found, CUDA library left out")
    return "\n".join(lines) + "\n"


class Build(build_ext):
    """Writes the ninja file and runs it; the libraries land in the package folder."""

    def run(self):
        editable = self.inplace or getattr(self, "editable_mode", False)
        out = (ROOT if editable else pathlib.Path(self.build_lib).resolve()) / "palm_kernels"
        if os.environ.get("PALM_KERNELS_NATIVE") == "0" or not shutil.which(os.environ.get("CXX", "g++")):
            print("palm_kernels: no C++ compiler, installing the pure Python package")
            return
        work = ROOT / "build" / "ninja"
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(out))
        ninja = shutil.which("ninja") or str(pathlib.Path(sys.executable).with_name("ninja"))
        subprocess.check_call([ninja, "-C", str(work), "-j", os.environ.get("MAX_JOBS", str(os.cpu_count()))])

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """Names the wheel py3-none-<platform>: it depends on the machine, not on the Python."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":  # tests/emulator imports this file
    setup(
        ext_modules=[Extension("palm_kernels._native", [])],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    )
