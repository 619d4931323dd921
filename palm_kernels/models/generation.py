"""A prompt that many rows begin with, held and read once."""

import torch
from torch import Tensor
from transformers import DynamicCache

from ..ops.attention import attention, merge_attention


class SharedPrefix(DynamicCache):
    """A cache whose first tokens are one prompt's, at batch 1, for every row of any batch (a few-shot prompt).

    `SharedPrefix.of(model, ids)` runs the prompt once. Rows then begin with those very tokens: `model.generate(rows, cache=prefix.fresh(),
    attention_mask=...)` computes what follows them. Padding stands behind the prompt. Not for sliding windows or prefix attention.
    """

    def __init__(self, prefix: list[tuple[Tensor, Tensor]], config):
        super().__init__(config=config)
        self.prefix, self.config = prefix, config  # keys and values [1,K,S,D] by layer

    @classmethod
    @torch.no_grad()
    def of(cls, model, input_ids: Tensor) -> "SharedPrefix":
        """The prompt input_ids [1,S] or [S] through the model (PaLMForCausalLM or PaLMModel)."""
        config = model.config
        if config.sliding_window is not None or config.attention != "causal":
            raise ValueError(
                f"SharedPrefix: needs causal attention without a window, the config has attention={config.attention!r}, "
                f"sliding_window={config.sliding_window}"
            )
        ids = input_ids.view(1, -1) if input_ids.dim() == 1 else input_ids
        if ids.shape[0] != 1 or ids.shape[1] == 0:
            raise ValueError(f"SharedPrefix: the prompt has shape {list(ids.shape)}, need [1,S] or [S] with S >= 1")
        cache = DynamicCache(config=config)
        trunk = getattr(model, "model", model)
        trunk(input_ids=ids, use_cache=True, past_key_values=cache)
        return cls([(layer.keys, layer.values) for layer in cache.layers], config)  # type: ignore

    def fresh(self) -> "SharedPrefix":
        """The same prompt with nothing behind it, for another batch."""
        return SharedPrefix(self.prefix, self.config)

    @property
    def prefix_length(self) -> int:
        return self.prefix[0][0].shape[2]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix_length + super().get_seq_length(layer_idx)


def attend_shared(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], key_bias: Tensor | None) -> Tensor:
    """Attention of q [B,T,H,D] to a prompt's keys and values [1,K,S,D], and causally to their own k and v [B,T',K,D]; no gradients.

    All rows' queries meet the prompt as one row of B T: it is read once.
    """
    shared_k, shared_v = (t.transpose(1, 2) for t in prefix)
    B, T, H, D = q.shape
    out, lse = attention(q.reshape(1, B * T, H, D), shared_k, shared_v, return_lse=True)
    shared = out.view(B, T, H, D), lse.view(H, B, T).transpose(0, 1)
    own = attention(q, k, v, causal=True, key_bias=key_bias, return_lse=True)
    return merge_attention([shared, own])[0]  # type: ignore
