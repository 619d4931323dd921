"""The machine under the numbers: its name, the peaks it reaches when a small program asks for nothing else, its memory."""

import contextlib
import ctypes
import gc
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

import torch

import palm_kernels  # loads torch.ops.palm_kernels_cpu


def _cpuinfo(key: str) -> str:
    path = pathlib.Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.+)$", path.read_text(), re.M) if path.exists() else None
    return found[1].strip() if found else ""


def require_gpu(command: str) -> None:
    """Ends the process with status 2 and one sentence where there is no GPU that the kernels run on."""
    why = ""
    if not torch.cuda.is_available():
        why = f"torch {torch.__version__} of {sys.executable} sees no CUDA device"
    elif torch.cuda.get_device_capability() < (8, 0):
        why = f"{torch.cuda.get_device_name()} is older than sm_80"
    if why:
        print(f"{command}: {why}; it needs an NVIDIA GPU from sm_80 and a torch with CUDA", file=sys.stderr)
        raise SystemExit(2)


def _nvidia_smi(*keys: str) -> dict:
    """What the driver says, as found: nothing is ever set. Empty where nvidia-smi cannot be had."""
    index = torch.cuda.current_device()
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", f"--id={index}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {k.replace(".", "_"): v for k, v in zip(keys, said.strip().splitlines()[0].split(", "), strict=False)}


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **_nvidia_smi("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit"),
    }


def describe(device: str) -> dict:
    """What a reader needs to know about the machine; "name" is the folder of its results."""
    cpu = _cpuinfo("model name") or platform.machine()
    ops = torch.ops.palm_kernels_cpu
    facts = {
        "cpu": cpu,
        "cpu_family_model": f"{_cpuinfo('cpu family')}/{_cpuinfo('model')}",  # clouds hide the model name
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "instruction_set": ops.isa() if hasattr(ops, "isa") else None,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        **(_gpu() if device == "cuda" else {"gpu": None}),
    }
    plain = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", cpu, flags=re.I)
    name = facts["gpu"] or f"{plain} {facts['cpu_family_model']} {facts['cores']} cores"
    return {"name": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), **facts}


def cpu_clock(call) -> float:
    """Seconds of one call, what it returns not yet freed."""
    start = time.perf_counter()
    result = call()
    taken = time.perf_counter() - start
    del result
    return taken


def gpu_clock(cuda=torch.cuda, flush=None):
    """seconds(call) between two events on the current stream. A write of 256 MiB before it empties the L2 cache; then the GPU idles
    for a millisecond while Python launches the call, so that what is measured are kernels and not launches, unless they take longer.
    """
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda") if flush is None else flush

    def seconds(call) -> float:
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        flush.zero_()
        cuda._sleep(2_000_000)  # cycles, near 2 GHz
        start.record()
        result = call()
        end.record()
        cuda.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    return seconds


def _fastest(call, device: str, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls after one unmeasured: a peak is a best, not a median. A long one stands alone."""
    clock = gpu_clock() if device == "cuda" else cpu_clock
    first = clock(call)
    return first if first > 2 else min(clock(call) for _ in range(repeats))


def _unit(unit: str, repeats: int) -> float | None:
    """GFLOP/s of every thread's "fma", bf16 "dot" or bf16 "tile" unit together; None where there is none to ask."""
    if not hasattr(torch.ops.palm_kernels_cpu, "peak"):
        return None
    out = torch.empty(torch.get_num_threads())
    length = 500_000 if unit == "tile" else 2_000_000  # about 5 ms
    flop = torch.ops.palm_kernels_cpu.peak(length, unit, out)
    seconds = _fastest(lambda: torch.ops.palm_kernels_cpu.peak(length, unit, out), "cpu", repeats)
    return flop * out.numel() / seconds / 1e9 if flop > 0 else None


def _gemm(dtype: torch.dtype, device: str, size: int, repeats: int) -> float:
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), device, repeats) / 1e9


def measure_peaks(device: str, size: int = 2048, megabytes: int = 256, repeats: int = 9) -> dict:
    """GFLOP/s of the units and of torch's square GEMM; GB/s of a copy (bytes read plus bytes written) and of a read."""
    peaks = {"fma_fp32": None, "dot_bf16": None, "tile_bf16": None}
    if device == "cpu":
        peaks = {name: _unit(name.split("_")[0], repeats) for name in peaks}
    size, megabytes = (4 * size, 4 * megabytes) if device == "cuda" else (size, megabytes)
    peaks["gemm_fp32"] = _gemm(torch.float32, device, size, repeats)
    peaks["gemm_bf16"] = _gemm(torch.bfloat16, device, size, repeats)
    x = torch.ones(megabytes * 2**18, device=device)
    y = torch.empty_like(x)
    peaks["copy"] = 2 * x.nbytes / _fastest(lambda: y.copy_(x), device, repeats) / 1e9
    peaks["read"] = x.nbytes / min(_fastest(f, device, repeats) for f in (x.sum, lambda: torch.dot(x, x))) / 1e9
    return peaks


def arithmetic(peaks: dict, kind: str) -> float:
    """GFLOP/s of the fastest way to "fp32" or "bf16" products: a unit's or torch's GEMM."""
    return max(value or 0.0 for name, value in peaks.items() if name.endswith(f"_{kind}"))


def bound(peaks: dict, flops: float, moved: float, dtype: torch.dtype, bandwidth: str) -> tuple[float, str]:
    """Seconds that the peaks allow for this work, and what limits it: "flops" or "bytes"."""
    kinds = ("fp32", "bf16") if dtype == torch.bfloat16 else ("fp32",)
    calculating = flops / 1e9 / max(arithmetic(peaks, kind) for kind in kinds)
    moving = moved / 1e9 / peaks[bandwidth]
    return max((calculating, "flops"), (moving, "bytes"))


def release() -> None:
    """Gives back what torch keeps of the GPU's memory; a broken context, in which nothing works any more, is left as it is."""
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def saved_memory(forward, inputs) -> float:
    """MiB that forward leaves for backward beside its inputs and outputs: the storages that its graph holds."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = forward()
    known = {t.untyped_storage().data_ptr() for t in (*inputs, *(outs if isinstance(outs, tuple) else (outs,)))}
    return sum(size for at, size in held.items() if at not in known) / 2**20


def training_memory(forward, inputs) -> dict[str, float]:
    """On a GPU, MiB that forward leaves for backward beside its outputs, and that backward holds at its height, gradients included."""
    leaves = [t for t in inputs if t.requires_grad]
    gc.collect()
    before = torch.cuda.memory_allocated()
    outs = forward()
    outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o.requires_grad]
    saved = torch.cuda.memory_allocated() - before - sum(o.nbytes for o in outs)
    douts = [torch.randn_like(o) for o in outs]
    backward = peak_memory(lambda: torch.autograd.grad(outs, leaves, douts, allow_unused=True), "cuda")
    return {"saved_mib": saved / 2**20, "backward_mib": backward}


def _status_mb(key: str) -> float:
    line = next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def peak_memory(call, device: str, collect: bool = True) -> float | None:
    """MiB that one call held at its height beyond what was there before: outputs, gradients, saved tensors, C++ scratch.

    On the CPU by the kernel's high-water mark of resident memory, after the allocators gave back what they kept; None without it.
    """
    if collect:  # takes a tenth of a second
        gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        palm_kernels.release_memory()
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = _status_mb("VmRSS")
        call()
        return max(0.0, _status_mb("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None
