"""One PaLM of 38.8 M parameters under four roofs: ours, PaLM-pytorch, Hugging Face's Cohere, with the same weights.

All compute the same function: layer norm without bias, one key head, rotary positions, SwiGLU, tied embeddings, no logit scale.
Cohere rotates pairs (2i, 2i + 1) where we rotate (i, i + D/2), so its rows of q and k are ours in another order.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import palm_kernels as pk

from .common import BOTH, FORWARD, Bench, Plan, Provider, Work, compiled, describe_case
from .gate import compare, verdict

SIZES = {"C": 512, "H": 8, "D": 64, "layers": 6, "V": 32000}
STEP, GENERATE, NEW = "train step", "generate", 32  # NEW: tokens that generate makes
COLD = 5e8  # bytes of copies that decoding reads in turn
Weights = dict[str, Tensor]


class Built(NamedTuple):
    """A model, its weights by their own names, its loss on ids [B,T]. compiles: its loss is under torch.compile."""

    model: nn.Module
    weights: Weights
    loss: Callable[[Tensor], Tensor]


def palm_config(C: int, H: int, D: int, layers: int, V: int):
    from palm_kernels.models import PaLMConfig

    return PaLMConfig(
        hidden_size=C,
        num_attention_heads=H,
        head_dim=D,
        num_hidden_layers=layers,
        vocab_size=V,
        norm="layer_norm",
        norm_eps=1e-5,
        norm_offset=0.0,
        logit_scale=1.0,
        embedding_std=0.02,
        max_position_embeddings=4096,
        eos_token_id=None,
    )


def palm(sizes: dict, weights: Weights | None = None, dtype=torch.float32) -> Built:
    """Ours; without weights, freshly drawn ones."""
    from palm_kernels.models import PaLMForCausalLM

    model = PaLMForCausalLM(palm_config(**sizes)).to(dtype)
    _load(model, weights or {})
    model.train()
    return Built(model, dict(model.named_parameters()), lambda ids: model(input_ids=ids, labels=ids).loss)


@torch.no_grad()
def _load(model: nn.Module, weights: Weights) -> None:
    own = dict(model.named_parameters())
    assert not weights or own.keys() == weights.keys(), own.keys() ^ weights.keys()
    for name, value in weights.items():
        own[name].copy_(value)


def _blocks(weights: Weights, H: int, D: int, layers: int, **_):
    """(layer, norm, [q, k, v, gate, up], [attention's and the feed-forward's half of out_proj]) of our weights."""
    for i in range(layers):
        norm, w_in, w_out = (weights[f"model.layers.{i}.{n}.weight"] for n in ("norm", "in_proj", "out_proj"))
        width = w_out.shape[1] - H * D
        yield i, norm, w_in.split([H * D, D, D, width, width]), w_out.split([H * D, width], 1)


def as_palm_pytorch(weights: Weights, sizes: dict) -> Weights:
    """Ours, or their gradients, under PaLM-pytorch's names."""
    found = {"0.weight": weights["model.embed_tokens.weight"]}
    for i, norm, (q, k, v, gate, up), (attended, fed) in _blocks(weights, **sizes):
        block = {"norm.gamma": norm, "fused_attn_ff_proj.weight": torch.cat((q, k, v, up, gate))}
        block |= {"attn_out.weight": attended, "ff_out.1.weight": fed}
        found |= {f"{i + 1}.fn.{name}": w for name, w in block.items()}
    return {**found, f"{sizes['layers'] + 1}.gamma": weights["model.norm.weight"]}


def as_cohere(weights: Weights, sizes: dict) -> Weights:
    """Ours, or their gradients, under Cohere's names."""

    def pairs(w: Tensor) -> Tensor:
        return w.view(-1, 2, sizes["D"] // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    found = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}
    for i, norm, (q, k, v, gate, up), (attended, fed) in _blocks(weights, **sizes):
        block = {"input_layernorm": norm, "self_attn.q_proj": pairs(q), "self_attn.k_proj": pairs(k)}
        block |= {"self_attn.v_proj": v, "self_attn.o_proj": attended}
        block |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": fed}
        found |= {f"model.layers.{i}.{name}.weight": w for name, w in block.items()}
    return {**found, "model.norm.weight": weights["model.norm.weight"]}


def palm_pytorch(sizes: dict, weights: Weights, dtype=torch.float32) -> Built:
    from palm_pytorch import PaLM

    model = PaLM(
        dim=sizes["C"], num_tokens=sizes["V"], depth=sizes["layers"], dim_head=sizes["D"], heads=sizes["H"]
    ).to(dtype)
    _load(model, as_palm_pytorch(weights, sizes))

    def loss(ids):
        return F.cross_entropy(model(ids).flatten(0, 1), F.pad(ids[:, 1:], (0, 1), value=-100).flatten())

    return Built(model, dict(model.named_parameters()), loss)


def cohere(sizes: dict, weights: Weights, dtype=torch.float32) -> Built:
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        hidden_size=sizes["C"],
        num_attention_heads=sizes["H"],
        num_key_value_heads=1,
        num_hidden_layers=sizes["layers"],
        vocab_size=sizes["V"],
        intermediate_size=4 * sizes["C"],
        logit_scale=1.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = CohereForCausalLM(config).to(dtype)
    _load(model, as_cohere(weights, sizes))
    return Built(
        model, dict(model.named_parameters()), lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
    )


RENAMED = {palm: lambda weights, sizes: weights, palm_pytorch: as_palm_pytorch, cohere: as_cohere}


def under_compile(build: Callable) -> Callable:
    """A peer's builder whose loss is compiled, behind one call that fills the caches of masks and positions."""

    def built(sizes: dict, weights: Weights, dtype=torch.float32) -> Built:
        found, loss = build(sizes, weights, dtype), None

        def compiled_loss(ids):
            nonlocal loss
            if loss is None:
                with torch.no_grad():
                    found.loss(ids)
                loss = compiled(found.loss)
            return loss(ids)

        return found._replace(loss=compiled_loss)

    built.compiles, built.of = True, build
    return built


def sizes_of(pairs: float, C: int, H: int, D: int, layers: int, V: int) -> tuple[int, float]:
    """(weights that a token meets, flops of the attention forward for `pairs` of a query and a visible key a layer and head)."""
    return layers * C * ((H + 2) * D + 8 * C + H * D + 4 * C) + V * C, 4 * pairs * layers * H * D


def _loss_and_gradients(built: Built, ids: Tensor) -> tuple[list[Tensor], Weights]:
    loss = built.loss(ids)
    grads = torch.autograd.grad(loss, list(built.weights.values()))
    return [loss], dict(zip(built.weights, grads, strict=True))


def _train_step(built: Built, ids: Tensor) -> Callable:
    optimizer = torch.optim.AdamW(built.weights.values(), lr=1e-5, fused=True)

    def call():
        optimizer.zero_grad()
        built.loss(ids).backward()
        optimizer.step()

    return call


def plan_train(bench: Bench, case: dict, providers: Sequence[Provider]) -> Plan:
    """Loss and gradients on the same weights; the train step adds torch's fused AdamW for everyone."""
    ids = torch.randint(1, SIZES["V"], (case["B"], case["T"]))
    drawn = palm(SIZES).weights
    with pk.backend("reference"):
        truth, yardstick = (_loss_and_gradients(palm(SIZES, drawn, d), ids) for d in (torch.float64, torch.float32))
    models: dict[str, Built] = {}

    def check(p: Provider):
        models[p.name] = p.call(SIZES, drawn)
        rename = RENAMED[getattr(p.call, "of", p.call)]
        with pk.backend(p.backend):
            loss, grads = _loss_and_gradients(models[p.name], ids)
        compare("loss", loss, yardstick[0], truth[0], torch.float32, 1.0)
        theirs = [rename(found, SIZES) for found in (yardstick[1], truth[1])]
        compare(
            "gradient", [grads[n] for n in theirs[0]], *(t.values() for t in theirs), torch.float32, 1 / ids.numel()
        )

    verdicts = {p.name: verdict(functools.partial(check, p)) for p in providers}
    fit = {name: models[name] for name, v in verdicts.items() if v["status"] == "ok"}
    tokens = ids.numel()
    weights, attention = sizes_of(tokens * (ids.shape[1] + 1) / 2, **SIZES)
    work = Work(6 * tokens * weights + 3.5 * attention, 3 * 4 * weights, tokens)

    modes = {
        BOTH: lambda built: functools.partial(_loss_and_gradients, built, ids),
        STEP: lambda b: _train_step(b, ids),
    }
    prepared = {m: (lambda make=make: {n: make(b) for n, b in fit.items()}, work) for m, make in modes.items()}
    training = {n: (functools.partial(b.loss, ids), list(b.weights.values())) for n, b in fit.items()}
    return Plan(verdicts, prepared, training, describe_case(case))


class Decoder:
    """A model and a cache that holds a prompt: `step` gives the logits behind one more token, and forgets it again."""

    def __init__(self, model: nn.Module, prompt: Tensor, kind: str, longest: int):
        from transformers import DynamicCache, StaticCache

        from palm_kernels.models.modeling import _CACHE

        self.model, self.prompt, self.token = model.eval(), prompt[:, :-1], prompt[:, -1:]
        static = {"max_cache_len": longest}
        cache = StaticCache(config=model.config, **static) if kind == "static" else DynamicCache(config=model.config)
        self.cache, self.keywords = cache, {_CACHE: cache, "use_cache": True}
        self.generating = {"cache_implementation": "static"} if kind == "static" else {}
        with torch.no_grad():
            model(input_ids=self.prompt, logits_to_keep=1, **self.keywords)

    @torch.no_grad()
    def step(self) -> Tensor:
        logits = self.model(input_ids=self.token, **self.keywords).logits
        self.cache.crop(-1)
        return logits

    def generate(self) -> Tensor:
        ids = torch.cat((self.prompt, self.token), 1)
        mask = torch.ones_like(ids)
        return self.model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **self.generating)


def plan_decode(bench: Bench, case: dict, providers: Sequence[Provider]) -> Plan:
    """Logits of one token behind a prompt. In turn over half a GB of copies, so that no cache holds the weights."""
    dtype, prompt = case["dtype"], torch.randint(1, SIZES["V"], (case["B"], case["past"] + 1))
    drawn = {n: w.to(dtype) for n, w in palm(SIZES).weights.items()}
    with pk.backend("reference"), torch.no_grad():
        truth, yardstick = (
            palm(SIZES, drawn, d).model.eval()(input_ids=prompt, logits_to_keep=1).logits
            for d in (torch.float64, dtype)
        )
    decoders: dict[str, Sequence[Decoder]] = {}
    tokens = case["B"]
    weights, attention = sizes_of(tokens * case["past"], **SIZES)
    flops, size = (
        2 * tokens * weights + attention,
        dtype.itemsize * (weights + 2 * tokens * case["past"] * SIZES["D"] * SIZES["layers"]),
    )

    def check(p: Provider):
        def made():
            return Decoder(p.call(SIZES, drawn, dtype).model, prompt, case["cache"], case["longest"])

        with pk.backend(p.backend):
            try:
                first = made()
            except ValueError as error:
                raise NotImplementedError(f"{case['cache']} cache: {error}") from error
            compare("logits", [first.step()], [yardstick], [truth], dtype, 0.0)
            compare("logits again", [first.step()], [yardstick], [truth], dtype, 0.0)
            decoders[p.name] = [first, *(made() for _ in range(int(COLD // size)))]

    verdicts = {p.name: verdict(functools.partial(check, p)) for p in providers}

    def prepare(what: Callable) -> dict[str, Callable]:
        turns = {n: itertools.cycle(found) for n, found in decoders.items() if verdicts[n]["status"] == "ok"}
        return {n: (lambda turn=turn: what(next(turn))) for n, turn in turns.items()}

    works = {FORWARD: Work(flops, size, tokens), GENERATE: Work(NEW * flops, NEW * size, NEW * tokens)}
    calls = {FORWARD: Decoder.step, GENERATE: Decoder.generate}
    modes = {mode: (functools.partial(prepare, what), works[mode]) for mode, what in calls.items()}
    return Plan(verdicts, modes, {}, describe_case(case))
