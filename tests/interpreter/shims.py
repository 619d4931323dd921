"""Repairs of Triton's interpreter, for tests only: bfloat16 that is right, bounds and assertions that are checked.

The stock interpreter (3.6 to 3.9) keeps bfloat16 as uint16: float32 -> bfloat16 truncates, arithmetic and tl.dot work on the bit
patterns without an error. It reads and writes wherever a pointer leads, and skips device_assert. `install` gives: casts that round
to nearest even and exact bfloat16 dots with float32 sums, like the tensor core up to order; TypeError for any other arithmetic on
bfloat16 (kernels upcast first); tf32 dots that round their operands; IndexError where an unmasked lane leaves every argument's
storage; NaN in masked lanes without `other`; device_assert and 32-bit overflow checks that raise AssertionError.
"""

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as I

B = I.InterpreterBuilder
_storages: list[tuple[int, int]] = []  # of the running kernel's arguments: first byte, one past the last


def to_float(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x):
    """Round to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def to_tf32(x):
    """cvt.rna.tf32.f32: to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _refuse(what):
    raise TypeError(f"{what} on bfloat16 in a kernel: upcast with .to(tl.float32)")


def _casts(old_cast=B.cast_impl, old_fp_to_fp=B.create_fp_to_fp):
    def cast_impl(self, src, dst_type):
        s, d = src.dtype.scalar, dst_type.scalar
        if s == tl.bfloat16 and d != tl.bfloat16:
            wide = I.TensorHandle(to_float(src.data), tl.float32)
            return wide if d == tl.float32 else old_cast(self, wide, dst_type)
        if d == tl.bfloat16 and s != tl.bfloat16:
            return I.TensorHandle(to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return old_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        scalars = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 in scalars and all(s.primitive_bitwidth >= 16 for s in scalars):
            return cast_impl(self, src, dst_type)
        return old_fp_to_fp(self, src, dst_type, rounding_mode)

    B.cast_impl, B.create_fp_to_fp = cast_impl, create_fp_to_fp
    if not hasattr(B, "get_bf16"):  # 3.6
        B.get_bf16 = lambda self, v: I.TensorHandle(to_bfloat16(np.array([v])), tl.bfloat16)


def _arithmetic(old_dot=B.create_dot, old_rmw=B.create_atomic_rmw, old_check=I.ReduceScanOpInterface.check_tensor):
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _is_bfloat16(a):
            a, b = (I.TensorHandle(to_float(x.data), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision == I._ir.INPUT_PRECISION.TF32:
            a, b = (I.TensorHandle(to_tf32(x.data), tl.float32) for x in (a, b))
        return old_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def refusing(old, operands):
        def call(self, *args):
            op = args[-1]
            if any(_is_bfloat16(x) for x in args[:operands]) and op not in (
                np.bitwise_and,
                np.bitwise_or,
                np.bitwise_xor,
            ):
                _refuse(getattr(op, "__name__", "arithmetic"))
            return old(self, *args)

        return call

    def create_atomic_rmw(self, op, ptr, val, *rest):
        if _is_bfloat16(val):
            _refuse("an atomic")
        return old_rmw(self, op, ptr, val, *rest)

    def check_tensor(self, inputs):
        if any(isinstance(x, tl.core.tensor) and x.dtype.scalar == tl.bfloat16 for x in inputs):
            _refuse("a reduction")
        return old_check(self, inputs)

    B.create_dot, B.create_atomic_rmw = create_dot, create_atomic_rmw
    B.binary_op, B.unary_op, B.create_fma = (
        refusing(B.binary_op, 2),
        refusing(B.unary_op, 1),
        refusing(B.create_fma, 3),
    )
    I.ReduceScanOpInterface.check_tensor = check_tensor


def _add_storage(x):
    if isinstance(x, tuple):
        for item in x:
            _add_storage(item)
    elif hasattr(x, "data_ptr"):
        storage = I._unwrap_tensor(x).untyped_storage()
        _storages.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))


def _check_bounds(what, ptrs, mask):
    size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    shape = np.broadcast_shapes(ptrs.data.shape, mask.data.shape)
    wanted = np.broadcast_to(mask.data, shape).astype(bool)
    first = np.broadcast_to(ptrs.data, shape)[wanted].astype(np.int64)
    inside = np.zeros(first.shape, bool)
    for lo, hi in _storages:
        inside |= (first >= lo) & (first + size <= hi)
    if not inside.all():
        place = I.interpreter_builder.grid_idx
        raise IndexError(
            f"{what}: {int((~inside).sum())} of {inside.size} lanes outside every argument, program {place}"
        )


def _unknown(kind):
    """What a masked lane without `other` holds: anything, so NaN (bfloat16 as bits), or a number that is no index."""
    return 0x7FC0 if kind.scalar == tl.bfloat16 else np.nan if kind.scalar.is_floating() else 77


def _bounds():
    old_init, old_load = I.GridExecutor._init_args_hst, B.create_masked_load
    old_store, old_rmw, old_semantic = B.create_masked_store, B.create_atomic_rmw, TritonSemantic.load
    has_other = False

    def _init_args_hst(self, args, kwargs):
        host = old_init(self, args, kwargs)
        _storages.clear()
        _add_storage((*host[0], *host[1].values()))
        return host

    def semantic_load(self, ptr, mask, other, *rest):  # it drops an `other` that is one element and 0: `if other`
        nonlocal has_other
        has_other = other is not None
        return old_semantic(self, ptr, mask, other, *rest)

    def create_masked_load(self, ptrs, mask, other, *rest):
        _check_bounds("load", ptrs, mask)
        if other is None and not has_other:
            kind = ptrs.get_element_ty()
            other = I.TensorHandle(np.full(ptrs.data.shape, _unknown(kind), dtype=I._get_np_dtype(kind)), kind)
        return old_load(self, ptrs, mask, other, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        _check_bounds("store", ptrs, mask)
        return old_store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self, op, ptr, val, mask, *rest):
        _check_bounds("atomic", ptr, mask)
        return old_rmw(self, op, ptr, val, mask, *rest)

    I.GridExecutor._init_args_hst, TritonSemantic.load = _init_args_hst, semantic_load
    B.create_masked_load, B.create_masked_store, B.create_atomic_rmw = (
        create_masked_load,
        create_masked_store,
        create_atomic_rmw,
    )


def _assertions():
    def create_assert(self, condition, message):
        holds = getattr(condition, "data", condition)
        assert np.all(holds), message

    B.create_assert = create_assert
    I.interpreter_builder.options = type(I.interpreter_builder.options)(debug=True)


_installed = False


def install():
    global _installed
    if _installed:
        return
    _installed = True
    _casts()
    _arithmetic()
    _bounds()
    _assertions()
