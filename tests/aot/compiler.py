"""Compiles what a launcher launches, for a chip that is not there, and reads the machine code.

Triton's driver is a fake, and `kernel[grid](...)` compiles the very specialisation that the launch would run. The launchers get tensors
on the "meta" device, so one that looks at data or waits for the device raises.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import subprocess
import tempfile
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHS = (80, 90)
SHARED_PER_SM = {80: 167936, 90: 233472}
SYSTEM_SHARED = 1024  # bytes a block that the system keeps for itself; cuobjdump counts them on sm_90
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
ENVIRONMENT = {
    "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(ROOT / "build/triton-aot")),
    "TRITON_DEFAULT_FP_FUSION": "1",  # the default up to 3.9, which warns that it will change
}
OPCODES = {
    "HGMMA": r"\bHGMMA\b",
    "HMMA": r"\bHMMA\b",
    "LDGSTS": r"\bLDGSTS\b",
    "UTMALDG": r"\bUTMALDG\b",
    "wide_loads": r"\b(?:LDG|LDGSTS)\.E\S*\.128\b",
    "wide_stores": r"\bSTG\.E\S*\.128\b",
    "spills": r"\b(?:LDL|STL)\b",
}


class FakeDriver:
    """What Triton asks of a GPU before it launches."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 1000 + self.arch  # kernels are kept by device number: no two chips may share one

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel as its machine code shows it. Bytes are a block's, counts are instructions in the code."""

    hash: str
    name: str  # module.function
    configuration: str  # constexpr arguments, types of the pointers
    arch: int
    grid: tuple[int, ...]
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    dots: int  # products that the source asks for
    wgmma_dots: int  # those that sm_90 has a warpgroup instruction for: 16-bit, at least 64 rows
    tile_loads: (
        int  # 16-byte accesses a thread of the source's floating-point tiles: a value a row and indices are free
    )
    tile_stores: int
    wide_loads: int  # 16-byte accesses in the code, from global memory to registers or shared memory
    wide_stores: int
    spills: int
    HGMMA: int
    HMMA: int
    LDGSTS: int
    UTMALDG: int
    case: str = ""

    @property
    def blocks(self) -> int:
        """Blocks that an SM holds at once, by registers (four banks, given out 8 a thread), shared memory, and warps."""
        warps = 4 * (16384 // (32 * 8 * max(1, math.ceil(self.registers / 8))))
        shared = SHARED_PER_SM[self.arch] // (128 * math.ceil(self.shared / 128) + SYSTEM_SHARED)
        return min(warps // self.warps, shared, 64 // self.warps, 32)

    @property
    def occupancy(self) -> float:
        return self.blocks * self.warps / 64

    @property
    def products(self) -> str:
        return " ".join(f"{name} {n}" for name, n in (("HGMMA", self.HGMMA), ("HMMA", self.HMMA)) if n)

    def broken_budgets(self) -> list[str]:
        """A sentence for each thing that a kernel must not be shipped with."""
        limit = SHARED_PER_SM[self.arch] - SYSTEM_SHARED
        served = self.HGMMA if self.arch == 90 and self.wgmma_dots else self.HGMMA + self.HMMA
        # one block gathers what others left: its time is latency; a packed sequence's bias begins anywhere
        narrow = math.prod(self.grid) == 1 or self.name == "attention_tiles._present_tiles"
        wide_loads, wide_stores = self.wide_loads >= self.tile_loads, self.wide_stores >= self.tile_stores
        rules = (
            (self.stack == 0, f"a stack of {self.stack} bytes"),
            (self.spills == 0, f"{self.spills} LDL and STL"),
            (self.shared <= limit, f"{self.shared} bytes of shared memory, the chip has {limit}"),
            (self.blocks > 0, f"{self.registers} registers a thread with {self.warps} warps"),
            (served or not self.dots, f"{self.dots} products with {self.HGMMA} HGMMA and {self.HMMA} HMMA"),
            (wide_loads or narrow, f"{self.wide_loads} 16-byte loads, {self.tile_loads} expected"),
            (wide_stores or narrow, f"{self.wide_stores} 16-byte stores, {self.tile_stores} expected"),
            (all(n <= most for n, most in zip(self.grid, MOST_BLOCKS, strict=False)), f"a grid of {self.grid}"),
        )
        return [f"{self.name} [{self.configuration}] sm_{self.arch}: {what}" for holds, what in rules if not holds]


def _tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _tile_accesses(ttir: str, access: str, threads: int) -> int:
    total = 0
    for sizes, bits in re.findall(rf"tt\.{access} .*: tensor<((?:\d+x)+)!tt\.ptr<b?f(\d+)>", ttir):
        total += math.prod(map(int, sizes.rstrip("x").split("x"))) * int(bits) // (128 * threads)
    return total


def _configuration(function: JITFunction, source) -> str:
    """`BF=4096 gate:bf16`: constexpr parameters with their values, and for each type the first pointer to it."""
    constants = [f"{p.name}={source.constants.get((p.num,))}" for p in function.params if p.is_constexpr]
    pointers: dict[str, str] = {}
    for name, kind in source.signature.items():
        if str(kind).startswith("*"):
            pointers.setdefault(kind.removeprefix("*"), name)
    return " ".join([*constants, *(f"{name}:{kind}" for kind, name in pointers.items())])


def read(function: JITFunction, compiled, arch: int, grid: tuple[int, ...]) -> Kernel:
    """The resources of a CompiledKernel, from its cubin (no driver needed) and its Triton IR."""
    cubin, ttir, meta = compiled.asm["cubin"], compiled.asm["ttir"], compiled.metadata
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", _tool("cuobjdump", "-res-usage", cubin=cubin))
    if usage is None:
        raise RuntimeError(f"{function.__name__}: cuobjdump finds no resource usage in the cubin")
    registers, stack, static = map(int, usage.groups())
    code = _tool("nvdisasm", "-c", cubin=cubin)
    products = re.findall(r"\btt\.dot .*: tensor<\d+x\d+x[a-z]+(\d+)> .*-> tensor<(\d+)x", ttir)
    return Kernel(
        hash=compiled.hash,
        name=f"{function.__module__.rpartition('.')[2]}.{function.__name__}",
        configuration=_configuration(function, compiled.src),
        arch=arch,
        grid=grid,
        warps=meta.num_warps,
        stages=meta.num_stages,
        registers=registers,
        stack=stack,
        shared=meta.shared + max(0, static - SYSTEM_SHARED),
        dots=len(products),
        wgmma_dots=sum(int(rows) >= 64 and bits == "16" for bits, rows in products),
        tile_loads=_tile_accesses(ttir, "load", 32 * meta.num_warps),
        tile_stores=_tile_accesses(ttir, "store", 32 * meta.num_warps),
        **{name: len(re.findall(pattern, code)) for name, pattern in OPCODES.items()},
    )


@contextlib.contextmanager
def _instead_of_launches(arch: int, take):
    """Within, on what looks like an sm_<arch>, `kernel[grid](*args, **options)` is take(kernel, grid, args, options)."""

    def run(function, *args, grid, warmup, **options):
        take(function, grid, args, options)

    before = driver._active
    with mock.patch.dict(os.environ, ENVIRONMENT), mock.patch.object(JITFunction, "run", run):
        driver.set_active(FakeDriver(arch))
        try:
            yield
        finally:
            driver.set_active(before)


def compile_launches(arch: int, launcher, *args) -> list[Kernel]:
    """The kernels that launcher(*args) launches on sm_<arch>, each once."""
    kernels = {}
    compile_or_launch = JITFunction.run

    def take(function, grid, args, options):
        compiled = compile_or_launch(function, *args, grid=grid, warmup=True, **options)
        kernels.setdefault(compiled.hash, (function, compiled, arch, grid))

    with _instead_of_launches(arch, take):
        launcher(*args)
        return [read(*entry) for entry in kernels.values()]


def count_launches(arch: int, launcher, *args) -> int:
    """How many launches launcher(*args) makes on sm_<arch>; nothing is compiled."""
    launches = []
    with _instead_of_launches(arch, lambda *launch: launches.append(launch)):
        launcher(*args)
    return len(launches)
