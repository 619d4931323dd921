"""What only a GPU can show of every op: streams, graphs, no waiting for the device, device assertions, many repeats, torch.compile.

`make gpu-check PART=tests` runs this and the tests marked `kernel` with PALM_KERNELS_TEST_DEVICE=cuda.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from cases import CASES
from helpers import INTERPRETED, ON_CPU_KERNELS, assert_close, check_op, make_douts, name_of, randn, rms, run

import palm_kernels as pk
from palm_kernels import dispatch, reference

ON_GPU = torch.get_default_device().type == "cuda"
every_case = pytest.mark.parametrize("name", CASES)
BF16 = torch.bfloat16


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not ON_GPU, reason="needs PALM_KERNELS_TEST_DEVICE=cuda and a GPU")(test))


@pytest.fixture
def plain():
    """Without deterministic algorithms and poisoned memory, as users run: both launch work of their own."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


def same_bits(ours, theirs):
    for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))


def within_budget(case, ours, douts):
    """Outputs and gradients that were had in whatever way, held to the one error budget."""
    spec = getattr(reference, case.op)
    truth = run(spec, case.args, case.kwargs, douts, to=torch.float64)
    yardstick = run(spec, case.args, case.kwargs, douts)
    dtype = next(t.dtype for t in case.tensors() if t.is_floating_point())
    for kind, a, b, c in zip(("output", "gradient"), ours, yardstick, truth, strict=True):
        for i, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            assert_close(x, y, z, dtype, what=f"{case.op} {kind} {i}")


def check(case, ours, eager, douts):
    within_budget(case, ours, douts)
    if case.exact:
        same_bits(ours, eager)


@pytest.mark.kernel
@every_case
@pytest.mark.parametrize("dtype", [BF16] if INTERPRETED else [torch.float32, BF16], ids=name_of)
def test_case_is_right(name, dtype):
    case = CASES[name](dtype)
    check_op(case.op, *case.args, **case.kwargs)


@on_gpu
@every_case
def test_other_stream(name):
    """Work on a stream that first waits, then writes the inputs: whatever ran on another stream would read zeros."""
    case = CASES[name](BF16)
    douts = make_douts(case.run()[0])
    expected = case.run(douts)
    floats = [t.detach() for t in case.tensors() if t.is_floating_point()]
    values = [t.clone() for t in floats]
    for t in floats:
        t.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        for t, value in zip(floats, values, strict=True):
            t.copy_(value)
        ours = case.run(douts)
    stream.synchronize()
    check(case, ours, expected, douts)


@on_gpu
@every_case
def test_cuda_graph(name, plain):
    """Forward and backward captured once, replayed on other values."""
    case = CASES[name](BF16)
    douts = make_douts(case.run()[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            case.run(douts)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(douts)
    for old, new in zip(case.tensors(), CASES[name](BF16).tensors(), strict=True):
        old.detach().copy_(new.detach())
    graph.replay()
    torch.cuda.synchronize()
    check(case, captured, case.run(douts), douts)


@on_gpu
@every_case
def test_never_waits_for_the_device(name, plain):
    case = CASES[name](BF16)
    douts = make_douts(case.run()[0])
    case.run(douts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(douts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@every_case
def test_compiles_with_inductor(name, plain):
    case = CASES[name](BF16)
    douts = make_douts(case.run()[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args, **kwargs: case.function(*args, **kwargs), fullgraph=True)
    within_budget(case, case.run(douts, compiled), douts)


@on_gpu
@every_case
def test_second_device(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    with torch.device("cuda:1"):
        torch.manual_seed(0)
        case = CASES[name](BF16)
        assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in case.tensors())
        douts = make_douts(case.run()[0])
        within_budget(case, case.run(douts), douts)


@on_gpu
@every_case
def test_float64_is_refused(name):
    case = CASES[name](torch.float64)
    with pytest.raises(NotImplementedError, match="not served"):
        case.function(*case.args, **case.kwargs)


@on_gpu
@every_case
@pytest.mark.parametrize("backends", [("triton", "cuda"), ("cuda", "triton")], ids="-then-".join)
def test_backward_on_another_backend(name, backends):
    case = CASES[name](BF16)
    missing = [b for b in backends if not dispatch._served(b, case.op)]
    if missing:
        pytest.skip(f"{case.op} has no kernel in backend {missing[0]}")
    with pk.backend(backends[0]):
        outs = case.function(*case.args, **case.kwargs)
        outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = [t for t in case.tensors() if t.requires_grad]
    if not leaves:
        pytest.skip("has no backward")
    douts = make_douts(outs)
    with pk.backend(backends[1]):
        pairs = [(o, d) for o, d in zip(outs, douts, strict=True) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], leaves, [d for _, d in pairs])
    within_budget(case, (outs, grads), douts)


@on_gpu
@pytest.mark.parametrize("D", [64, 256])
def test_attention_backward_repeats_1000_times(D):
    q, k, v = (randn(2, 300, heads, D, dtype=BF16) for heads in (8, 1, 1))
    bias = randn(2, 300)
    out = pk.attention(q, k, v, causal=True, key_bias=bias)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, (q, k, v, bias), dout, retain_graph=True)
    different = torch.zeros(len(first), dtype=torch.int64)
    for _ in range(1000):
        again = torch.autograd.grad(out, (q, k, v, bias), dout, retain_graph=True)
        different += torch.stack([(a != b).any() for a, b in zip(first, again, strict=True)])
    assert different.tolist() == [0, 0, 0, 0] and all(g.isfinite().all() for g in first)


@pytest.mark.kernel
@pytest.mark.skipif(ON_CPU_KERNELS, reason="the CPU's kernels have no tf32")
def test_tf32_only_where_torch_allows_it():
    q, k, v = (randn(1, 40 if INTERPRETED else 200, heads, 128, grad=False) for heads in (4, 1, 1))
    truth = reference.attention(q.double(), k.double(), v.double(), causal=True)
    matmul = torch.backends.cuda.matmul
    before, errors = matmul.fp32_precision, {}
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            errors[precision] = rms(pk.attention(q, k, v, causal=True).double() - truth) / rms(truth)
    finally:
        matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 5e-3, errors


WRONG = {  # op: call with data that only the device can see
    "cross_entropy": "pk.cross_entropy(torch.randn(4, 9), torch.tensor([0, 9, 1, 2]))",
    "linear_cross_entropy": "pk.linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 8), torch.tensor([0, 9, 1, 2]))",
    "linear_cross_entropy max_kept": "pk.linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 8), torch.arange(4), max_kept=2)",
    "soft_weak_embedding id": "pk.soft_weak_embedding(torch.tensor([0, 7]), torch.randn(7, 8), torch.rand(2))",
    "soft_weak_embedding strength": "pk.soft_weak_embedding(torch.tensor([0, 6]), torch.randn(7, 8), torch.tensor([0.5, 1.5]))",
    "soft_weak_embedding source": "pk.soft_weak_embedding(torch.tensor([0, 6]), torch.randn(7, 8), torch.full((2,), 0.5), "
    "source_ids=torch.tensor([0, 7]))",
    "rotary": "pk.rotary(torch.randn(1, 3, 8), *pk.rotary_tables(5, 8), positions=torch.tensor([0, 1, 5]))",
    "attention_varlen": "pk.attention_varlen(*torch.randn(3, 5, 1, 16), *[torch.tensor([0, 3, 6], dtype=torch.int32)] * 2)",
    "attention_decode": "pk.attention_decode(torch.randn(1, 1, 2, 16), *torch.randn(2, 1, 8, 16), "
    "cache_lengths=torch.tensor([9], dtype=torch.int32))",
}


@on_gpu
@pytest.mark.parametrize("wrong", WRONG)
def test_device_assertion(wrong):
    """In a process of its own, because an assertion ends the CUDA context."""
    lines = ["import torch, palm_kernels as pk", "torch.set_default_device('cuda')", WRONG[wrong]]
    program = "\n".join([*lines, "torch.cuda.synchronize()", "print('nothing was found')"])
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode and "device-side assert" in said and f"{wrong.split()[0]}: " in said, said[-3000:]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_data_is_wrong(wrong):
    """The calls above fail on the CPU for the reason they are there for."""
    if ON_GPU:
        pytest.skip("a ValueError on the CPU")
    with pytest.raises(ValueError, match=rf"^{wrong.split()[0]}: "):
        eval(WRONG[wrong], {"torch": torch, "pk": pk})


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=name_of)
def test_model_trains(dtype):
    pytest.importorskip("transformers")
    from palm_kernels.models import PaLMConfig, PaLMForCausalLM

    model = PaLMForCausalLM(PaLMConfig.preset("palm-tiny")).to(device="cuda", dtype=dtype)
    ids = torch.randint(4, model.config.vocab_size, (2, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    model.eval()
    longer = model.generate(ids[:, :8], attention_mask=torch.ones_like(ids[:, :8]), max_new_tokens=4, do_sample=False)
    assert longer.shape == (2, 12)
