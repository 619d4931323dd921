"""The kernels of `launches.QUICK`, compiled for sm_80 and sm_90, keep their budgets; broken kernels are seen to break them."""

import dataclasses
import os
import pathlib
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

sys.path.append(str(pathlib.Path(__file__).parents[2]))
import broken
import check
from compiler import ARCHS, compile_launches, count_launches
from launches import CASES, QUICK, STEM_OF

MOST_KERNELS = 120


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", QUICK)
def test_budgets(name, arch):
    kernels = compile_launches(arch, CASES[name].call)
    assert kernels
    assert [sentence for k in kernels for sentence in k.broken_budgets()] == []
    if name.startswith(("attention_fwd", "attention_bwd", "attention_varlen")):
        assert any(k.products for k in kernels)


def test_every_launcher_is_compiled_and_quickly():
    assert {CASES[name].launcher for name in QUICK} == set(STEM_OF)
    assert sum(count_launches(arch, CASES[name].call) for name in QUICK for arch in ARCHS) <= MOST_KERNELS


def test_reader_sees_spills_and_products_without_tensor_cores():
    (kernel,) = compile_launches(90, broken.spills)
    assert kernel.stack > 0 and kernel.spills > 0 and kernel.dots == 1
    said = "\n".join(kernel.broken_budgets())
    assert "a stack of" in said and "LDL and STL" in said and "1 products with 0 HGMMA and 0 HMMA" in said


@pytest.mark.parametrize("arch", ARCHS)
def test_reader_sees_narrow_accesses(arch):
    (kernel,) = compile_launches(arch, broken.narrow)
    said = "\n".join(kernel.broken_budgets())
    assert "0 16-byte loads, 4 expected" in said and "0 16-byte stores, 4 expected" in said


def test_table_groups_what_flags_alone_divide():
    (kernel, *_) = compile_launches(80, CASES["swiglu_fwd bf16 block"].call)
    told = "CAUSAL={} D=64 BM=32 PREC={} q:bf16 lse:fp32 v:bf16{}"
    group = [
        dataclasses.replace(kernel, name="a.f", configuration=told.format(True, "tf32", ""), registers=90, spills=1),
        dataclasses.replace(kernel, name="a.f", configuration=told.format(False, "ieee", " ids:i64"), registers=70),
    ]
    other = dataclasses.replace(group[0], configuration=told.format(True, "tf32", "").replace("BM=32", "BM=64"))
    rows = [dict(zip(check.GROUP_COLUMNS, row, strict=True)) for row in check.table([*group, other])["a.f"]]
    assert [(row["tiles"], row["kernels"]) for row in rows] == [
        ("D=64 BM=32 bf16 fp32", 2),
        ("D=64 BM=64 bf16 fp32", 1),
    ]
    assert rows[0]["registers"] == (70, 90) and rows[0]["spills"] == 1
    assert check.cell(rows[0]["registers"]) == "70-90" and check.cell(rows[1]["registers"]) == "90"


def test_limits_of_the_chip():
    (good, *_) = compile_launches(80, CASES["swiglu_fwd bf16 block"].call)

    def said(**changes):
        return "\n".join(dataclasses.replace(good, **changes).broken_budgets())

    assert not said() and not said(shared=166912) and not said(warps=8, registers=255)
    assert "166913 bytes of shared memory, the chip has 166912" in said(shared=166913)
    assert "255 registers a thread with 16 warps" in said(warps=16, registers=255)
    assert not said(arch=90, shared=232448) and "the chip has 232448" in said(arch=90, shared=232449)
    assert "a grid of" in said(grid=(1, 65536))


def test_occupancy():
    (good, *_) = compile_launches(80, CASES["swiglu_fwd bf16 block"].call)

    def blocks(**changes):
        return dataclasses.replace(good, **changes).blocks

    assert blocks(warps=8, registers=32, shared=0) == 8 and blocks(warps=8, registers=33, shared=0) == 6
    assert blocks(warps=4, registers=255, shared=0) == 2 and blocks(warps=8, registers=255, shared=0) == 1
    assert blocks(warps=1, registers=16, shared=0) == 32 and blocks(warps=4, registers=16, shared=81920) == 2
