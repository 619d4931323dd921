"""Registration and selection: one functional op per schema, one backend per call, never a silent slow path.

A backend is a namespace with out-variant functions named after the ops: `torch.ops.palm_kernels_cpu`, `torch.ops.palm_kernels_cuda`,
the modules `palm_kernels._triton.<stem>`. `define` turns one into the functional op `palm_kernels::<name>`, which is what autograd
functions, torch.compile and opcheck see; `public` routes a public function to `reference` when that is in force.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import math
import os
import pathlib
import platform
import sys

import torch
from torch import Tensor

KERNELS = {  # public op: (stem, backend function) pairs that serve it
    "attention": (("attention", "attention_fwd"), ("attention", "attention_bwd")),
    "attention_varlen": (("attention", "attention_varlen_fwd"), ("attention", "attention_varlen_bwd")),
    "attention_decode": (("attention", "attention_decode"),),
    "rotary": (("rotary", "rotary"),),
    "rms_norm": (("norm", "rms_norm_fwd"), ("norm", "rms_norm_bwd")),
    "layer_norm": (("norm", "layer_norm_fwd"), ("norm", "layer_norm_bwd")),
    "cross_entropy": (("cross_entropy", "cross_entropy_fwd"), ("cross_entropy", "cross_entropy_bwd")),
    "linear_cross_entropy": (("cross_entropy", "linear_cross_entropy_rows"),),
    "soft_weak_embedding": (
        ("soft_weak_embedding", "soft_weak_embedding_fwd"),
        ("soft_weak_embedding", "soft_weak_embedding_bwd"),
    ),
    "swiglu": (("swiglu", "swiglu_fwd"), ("swiglu", "swiglu_bwd")),
    "swiglu_packed": (("swiglu", "swiglu_fwd"), ("swiglu", "swiglu_bwd")),
    "decode_linear": (("decode_linear", "decode_linear"),),
}
KERNELS["parallel_block"] = tuple(
    k for op in ("attention", "rotary", "rms_norm", "layer_norm", "swiglu") for k in KERNELS[op]
)
CPU_ONLY = ("decode_linear",)  # where torch serves a GPU as well
ORDER = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # device type: backends, first choice first
CUDA_ORDER_REASON = "neither is measured on a GPU yet; Triton compiles for the very chip it meets"
NAMES = ("auto", "cpu", "triton", "cuda", "reference")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
LEAST_KEPT = 2**20  # bytes from which an output takes kept memory: malloc keeps what is smaller
BUILD = "pip install --no-build-isolation -e ."

_library = torch.library.Library("palm_kernels", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)
_load_errors: dict[str, str] = {}  # backend: why its library is not there
_forced = "auto"


def simulated(backend: str) -> bool:
    """Whether the backend, when forced, serves CPU tensors too: Triton's interpreter, or tests/emulator's library of the CUDA kernels."""
    if backend == "triton":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return backend == "cuda" and bool(os.environ.get("PALM_KERNELS_CUDA_LIBRARY"))


def _library_path(backend: str) -> pathlib.Path:
    other = os.environ.get("PALM_KERNELS_CUDA_LIBRARY") if backend == "cuda" else None
    return pathlib.Path(other or pathlib.Path(__file__).parent / f"_{backend}.so")


def _load_library(backend: str) -> None:
    path = _library_path(backend)
    if not path.exists():
        _load_errors[backend] = f"{path.name} is not built: run `{BUILD}`"
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        _load_errors[backend] = f"{path.name} does not load: {str(error).splitlines()[0]}"


def _check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend: {name!r} is none of {', '.join(NAMES)}")
    return name


class backend(contextlib.ContextDecorator):
    """`with pk.backend("reference"):` forces one backend; "auto" chooses by device. Also PALM_KERNELS_BACKEND.

    Sets one plain module global, so autograd's threads and torch.compile see it. Backward uses the one in force when it runs.
    """

    def __init__(self, name: str):
        self.name = _check_name(name)
        self.before: list[str] = []

    def __enter__(self):
        global _forced
        self.before.append(_forced)
        _forced = self.name
        return self

    def __exit__(self, *_):
        global _forced
        _forced = self.before.pop()


def _function(backend: str, stem: str, name: str):
    """The backend's out-variant `name`, or None where it has none."""
    if backend in _load_errors:
        return None
    if backend == "triton":
        module = f"palm_kernels._triton.{stem}"
        return importlib.util.find_spec(module) and getattr(importlib.import_module(module), name, None)
    packet = getattr(getattr(torch.ops, f"palm_kernels_{backend}"), name, None)
    return packet and packet.default


def dtypes(backend: str) -> tuple:
    """What every op of a backend takes: the supports predicate (shape limits that all backends share are contract checks)."""
    return (*HALF_AND_SINGLE, torch.float64) if backend == "cpu" else HALF_AND_SINGLE


def _on_its_device(function):
    """Triton launches on the current device: make the first tensor's current."""

    @functools.wraps(function)
    def call(*args):
        with torch.cuda.device(args[0].device):
            return function(*args)

    return call


def _with_tf32(function):
    """CUDA functions whose last argument is tf32 follow torch's setting for float32 products."""
    if function._schema.arguments[-1].name != "tf32":
        return function
    return lambda *args: function(*args, torch.backends.cuda.matmul.fp32_precision == "tf32")


@functools.cache
def _find(stem: str, name: str, device: str, dtype: torch.dtype, forced: str):
    for choice in ORDER.get(device, ()) if forced == "auto" else (forced,):
        served = choice in ORDER.get(device, ()) or simulated(choice)
        function = _function(choice, stem, name) if served else None
        if function and dtype in dtypes(choice):
            if choice == "cuda":
                return _with_tf32(function)
            return _on_its_device(function) if choice == "triton" and device == "cuda" else function
    return None


def served(stem: str, name: str, x: Tensor) -> bool:
    """Whether some backend serves such tensors (never the reference)."""
    return _find(stem, name, x.device.type, x.dtype, _forced) is not None


def select(stem: str, name: str, device: torch.device, dtype: torch.dtype):
    """The backend function that serves this call, or NotImplementedError with the way out."""
    if function := _find(stem, name, device.type, dtype, _forced):
        return function
    asked = "" if _forced == "auto" else f" by backend {_forced!r}"
    reasons = "; ".join(_load_errors.get(b, "") for b in ORDER.get(device.type, ()) if b in _load_errors)
    raise NotImplementedError(
        f"{name.removesuffix('_fwd').removesuffix('_bwd')}: not served{asked} for {dtype} on {device.type}"
        + (f" ({reasons})" if reasons else "")
        + f"; build the kernels with `{BUILD}`, or use `with palm_kernels.backend('reference'):`"
    )


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is strided; every other stride is the kernels' to honour."""
    return x if x.is_contiguous() or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _is_floating(a) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def empty(like: Tensor, shape, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape, dtype=dtype); on the CPU, large floating outputs lie in memory kept from call to call (csrc/cpu/memory.h).

    Every output and buffer of the ops is made here. A fake `like`, of a subclass of its own, gives a fake.
    """
    if _keeps_memory and type(like) in _PLAIN and like.is_cpu:
        dtype = dtype or like.dtype
        if dtype.is_floating_point and math.prod(shape) * dtype.itemsize >= LEAST_KEPT:
            out = torch.ops.palm_kernels_cpu.empty(shape, dtype, dtype.itemsize)
            if torch.are_deterministic_algorithms_enabled() and torch._C._get_deterministic_fill_uninitialized_memory():
                out.fill_(math.nan)  # as torch.empty does then
            return out
    return like.new_empty(shape, dtype=dtype)


def empty_statistic(like: Tensor, shape) -> Tensor:
    """empty in float32, beside float64 in float64: lse, rstd and their like."""
    return empty(like, shape, torch.float64 if like.dtype == torch.float64 else torch.float32)


def release_memory() -> int:
    """Return the memory that the CPU kernels keep for their next large outputs to the system; gives its bytes (0: nothing was kept).

    Kept are up to a quarter of the machine's memory, or PALM_KERNELS_CPU_CACHE bytes ("512M", "2G"; "0" keeps nothing), and the
    kernel takes what it needs of it by itself. Memory that a tensor still uses is not touched.
    """
    return torch.ops.palm_kernels_cpu.drop_memory() if _keeps_memory else 0


def define(stem: str, schema: str, allocate, *, kernel=None, spread=None, check=None, body=None):
    """Register the functional op `palm_kernels::<schema>` and return it.

    allocate(*args) gives the outputs, a Tensor or a tuple, by `empty` with computable shapes: it is also the fake. The backend's
    out-variant `kernel` (default: the schema's name) is called with (*args, *outputs), or with spread(*args, *outputs); its first
    floating tensor names the device and dtype. check(row, *args) raises for the bad row that a kernel reports (-1: none).
    body(*args), where given, replaces all that (ops composed of others' raw ops and torch's GEMMs).
    """
    name = schema.split("(", 1)[0]
    kernel = kernel or name
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    op = getattr(torch.ops.palm_kernels, name).default
    places = [i for i, a in enumerate(op._schema.arguments) if "Tensor" in str(a.type)]

    def run(*args):
        for i in places:
            a = args[i]
            if a is not None and not a.is_contiguous() and (b := last_contiguous(a)) is not a:
                args = (*args[:i], b, *args[i + 1 :])
        outs = allocate(*args)
        out_args = outs if isinstance(outs, tuple) else (outs,)
        passed = spread(*args, *out_args) if spread else (*args, *out_args)
        first = passed[0] if passed[0].is_floating_point() else next(filter(_is_floating, passed))
        bad = select(stem, kernel, first.device, first.dtype)(*passed)
        if check is not None and bad is not None and bad >= 0:
            check(bad, *args)
        return outs

    torch.library.register_fake(f"palm_kernels::{name}", allocate, lib=_library)
    _library.impl(name, body or run, "CompositeExplicitAutograd")
    return op


class _FlopFormulas(importlib.abc.MetaPathFinder):
    """Registers the formulas when somebody first imports torch.utils.flop_counter: it imports triton, so this package must not."""

    MODULE = "torch.utils.flop_counter"

    def __init__(self):
        self.formulas: list[tuple] = []

    def find_spec(self, fullname, path, target=None):
        if fullname != self.MODULE:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                for op, formula in self.formulas:
                    module.register_flop_formula(op)(formula)

            spec.loader.exec_module = exec_module
        return spec


_flop_formulas = _FlopFormulas()
sys.meta_path.insert(0, _flop_formulas)


def flops(op, formula) -> None:
    """Let FlopCounterMode count the functional op: formula(*args, out_shape) gets a shape for each tensor, like torch's own."""
    _flop_formulas.formulas.append((op.overloadpacket, formula))
    if module := sys.modules.get(_flop_formulas.MODULE):
        module.register_flop_formula(op.overloadpacket)(formula)


def public(function):
    """A public op: under backend "reference" its namesake in reference.py runs instead, differentiated by autograd."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if _forced == "reference":
            from . import reference

            return getattr(reference, function.__name__)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call must go through the autograd.Function; if not, the raw op is called (and costs half as much)."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True  # under a transform the Function raises torch's own error
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_double_backward(op: str) -> None:
    """First line of every backward: its formulas are kernels, which autograd cannot differentiate again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(f"{op}: double backward (create_graph=True) is not supported")


def _served(backend: str, op: str) -> bool:
    return all(_function(backend, stem, name) is not None for stem, name in KERNELS[op])


def describe() -> str:
    """The text of `info()`."""
    from . import __version__

    lines = [f"palm_kernels {__version__}, torch {torch.__version__}, {platform.machine()} {platform.system()}"]
    if "cpu" in _load_errors:
        lines.append(f"cpu: {_load_errors['cpu']}")
    else:
        ops = torch.ops.palm_kernels_cpu
        lines.append(f"cpu: instruction set {ops.isa()} of {ops.isas()}, {torch.get_num_threads()} threads")
        kept, limit = (f"{size / 2**20:.0f} MiB" for size in (ops.memory_kept(), ops.memory_limit()))
        lines.append(f"cpu: {kept} kept for large outputs, at most {limit} (PALM_KERNELS_CPU_CACHE)")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    loaded = f"{_library_path('cuda') if simulated('cuda') else 'library'} loaded"
    lines.append(f"cuda: {_load_errors.get('cuda', loaded)}; {devices} devices visible")
    lines.append(f"backend in force: {_forced}")
    lines.append(f"order of choice on cuda: {', '.join(ORDER['cuda'])} ({CUDA_ORDER_REASON})\n")
    lines.append(f"{'op':24}{'cpu':24}{'triton':20}cuda")
    for op in KERNELS:
        cells = [" ".join(_SHORT[d] for d in dtypes(b)) if _served(b, op) else "-" for b in ("cpu", "triton", "cuda")]
        lines.append(f"{op:24}{cells[0]:24}{cells[1]:20}{cells[2]}")
    return "\n".join(lines)


def info() -> None:
    """Print what is built, for which devices and instruction sets, and which backend serves which op in which dtypes."""
    print(describe())


for _backend in ("cpu", "cuda"):
    _load_library(_backend)
_keeps_memory = "cpu" not in _load_errors and torch.ops.palm_kernels_cpu.memory_limit() > 0
if importlib.util.find_spec("triton") is None:
    _load_errors["triton"] = "triton is not installed: `pip install triton`"
backend(os.environ.get("PALM_KERNELS_BACKEND", "auto")).__enter__()
