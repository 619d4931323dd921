"""`make cuda-check`: compiles csrc/cuda for sm_80 and sm_90a with ptxas -v, writes a table of resources, fails where a budget is broken."""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

from compiler import ROOT, SHARED_PER_SM, SYSTEM_SHARED, TOOLS

import setup as build  # the flags of the real build
from benchmarks.tables import markdown_table, write

RESULTS = ROOT / "benchmarks/results/cuda-resources/README.md"
ARCHS = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}
OPCODES = {
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "LDSM": r"\bLDSM\b",
    "LDGSTS": r"\bLDGSTS\b",
    "UTMALDG": r"\bUTMALDG\b",
    "USETMAXREG": r"\bUSETMAXREG\b",
    "LDG.128": r"\bLDG\.E\S*\.128\b",
    "STG.128": r"\bSTG\.E\S*\.128\b",
    "local": r"\b(?:LDL|STL)\b",
}
# What must stand in the machine code of the kernels whose name matches (of every architecture, or of the one named).
EXPECTED = (
    (r"^(swiglu_\w+|rotary_kernel|norm_(fwd|bwd)_kernel)<((bf16|f16), 8|float, 4)\b", "", ("LDG.128", "STG.128")),
    (r"^norm_bwd_kernel<((bf16|f16), 8|float, \d), true", "", ("LDGSTS",)),
    (r"^cross_entropy_(rows|bwd)_kernel", "", ("LDG.128", "STG.128")),
    (r"^soft_weak_embedding_(fwd|pieces|long|segments)_kernel<((bf16|f16), 8|float, 4)>", "", ("LDG.128", "STG.128")),
    (r"^soft_weak_embedding_slope_kernel<((bf16|f16), 8|float, 4)>", "", ("LDG.128",)),
    (r"^attention_(fwd|dq|dkdv|dk|dv|decode)_kernel<(\w+<)?(bf16|f16)", "", ("HMMA", "LDSM", "LDGSTS")),
    (r"^attention_(fwd|dq|dkdv|dk|dv|decode)_kernel<(\w+<)?float", "", ("HMMA", "LDGSTS")),
    (r"^attention_hopper_kernel", "sm_90a", ("HGMMA", "UTMALDG", "USETMAXREG")),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture, from ptxas's report and the machine code."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int  # bytes, stores and loads
    shared: int  # static
    counts: dict[str, int]

    def broken_budgets(self) -> list[str]:
        missing = [
            op
            for pattern, arch, ops in EXPECTED
            if re.search(pattern, self.name) and arch in ("", self.arch)
            for op in ops
            if not self.counts[op]
        ]
        limit = SHARED_PER_SM[int(self.arch[3:5])] - SYSTEM_SHARED
        rules = (
            (self.stack == 0, f"a stack frame of {self.stack} bytes"),
            (self.spills == 0, f"{self.spills} bytes of spills"),
            (self.counts["local"] == 0, f"{self.counts['local']} LDL and STL"),
            (self.shared <= limit, f"{self.shared} bytes of shared memory, the chip has {limit}"),
            (not missing, f"no {', '.join(missing)}"),
        )
        return [f"{self.name} {self.arch}: {what}" for holds, what in rules if not holds]


def demangled(names: list[str]) -> dict[str, str]:
    """Short C++ names: no namespace, no parameters, the number formats as the sources write them."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {}
    for name, full in zip(names, said.splitlines(), strict=True):
        text = re.sub(r"^void |palm::cuda::|\(anonymous namespace\)::", "", full)
        text = re.sub(r"\((?:unsigned )?(?:int|long|bool)\)", "", text.partition("(palm::")[0])
        text = re.sub(r"\((?!anonymous)[^()]*\)$", "", text)
        short[name] = text.replace("__nv_bfloat16", "bf16").replace("__half", "f16")
    return short


def code_of(cubin: pathlib.Path) -> dict[str, str]:
    """The machine code of each kernel."""
    text = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def read(cubin: pathlib.Path, arch: str) -> list[Kernel]:
    log = cubin.with_suffix(".log").read_text()
    found = re.findall(
        r"Compiling entry function '(\w+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        log,
        flags=re.S,
    )
    names, code = demangled([entry[0] for entry in found]), code_of(cubin)
    kernels = []
    for name, stack, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        counts = {op: len(re.findall(pattern, code[name])) for op, pattern in OPCODES.items()}
        sizes = int(registers), int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0
        kernels.append(Kernel(names[name], arch, *sizes, counts))
    return kernels


def compile_all(sources: list[pathlib.Path], folder: pathlib.Path) -> tuple[list[Kernel], list[str]]:
    """Every kernel of every source and architecture, and ptxas's and nvcc's warnings (C75..: about wgmma, that it waits)."""
    nvcc, _ = build.find_nvcc() or sys.exit("cuda-check: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    folder.mkdir(parents=True, exist_ok=True)
    command = f"{nvcc} {build.NVCC_FLAGS} -DPALM_SM90A=1 -Xptxas -v -cubin $flags -MMD -MF $out.d $in -o $out"
    lines = [
        f"rule cubin\n  command = {command} > $log 2>&1 || (cat $log; false)\n  depfile = $out.d\n  deps = gcc\n  description = $out"
    ]
    work = [(s, arch, folder / f"{s.stem}.{arch}.cubin") for s in sources for arch in ARCHS]
    for source, arch, cubin in work:
        lines.append(
            f"build {cubin}: cubin {source}\n  flags = -gencode {ARCHS[arch]}\n  log = {cubin.with_suffix('.log')}"
        )
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = shutil.which("ninja") or str(pathlib.Path(sys.executable).with_name("ninja"))
    if subprocess.run([ninja, "-C", str(folder), "-j", os.environ.get("MAX_JOBS", str(os.cpu_count()))]).returncode:
        sys.exit("cuda-check: nvcc failed")
    kernels = [k for _, arch, cubin in work for k in read(cubin, arch)]
    logs = {cubin.name: cubin.with_suffix(".log").read_text() for _, _, cubin in work}
    warnings = [
        f"{name}: {line}"
        for name, log in logs.items()
        for line in log.splitlines()
        if re.search(r"(?i)warning|\(C75\d\d\)", line)
    ]
    return kernels, warnings


def table(kernels: list[Kernel]) -> str:
    ops = [op for op in OPCODES if op != "local"]
    rows = [[k.name, k.arch, str(k.registers), *(str(k.counts[op] or "") for op in ops)] for k in kernels]
    return markdown_table([["kernel", "arch", "registers", *ops], *rows])


def report(kernels: list[Kernel], failures: list[str], command: str) -> str:
    nvcc, _ = build.find_nvcc()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.findall(r"release \S+ (V\S+)", said)[0]
    broken = "\n".join(f"- {failure}" for failure in failures) or "No stack, no spills, no local memory, no warning."
    return (
        f"# What the CUDA kernels take, from their machine code\n\n`{command}`: {len(kernels)} kernels, nvcc {version}. Registers a "
        f"thread; the other columns are instructions in the code. tests/aot/README.md says what is asked of them.\n\n{broken}\n\n"
        f"{table(kernels)}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make cuda-check ARGS=...", description=__doc__)
    parser.add_argument("--only", default="", help="regular expression: files of csrc/cuda; no table is written")
    options = parser.parse_args()
    sources = [s for s in sorted((ROOT / "csrc/cuda").glob("*.cu")) if re.search(options.only, s.name)]
    kernels, failures = compile_all(sources, ROOT / "build/cuda-check")
    kernels.sort(key=lambda k: (k.name, k.arch))
    failures += [broken for k in kernels for broken in k.broken_budgets()]
    if options.only:
        print(table(kernels))
    else:
        write(RESULTS, report(kernels, failures, "make cuda-check"))
    print(f"{len(kernels)} kernels, {len(failures)} budgets broken", *failures, sep="\n  ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
