"""PaLMConfig: the shape of a PaLM (Chowdhery 2022, section 2 and table 1) in Hugging Face's form."""

import dataclasses
import math

from transformers import PreTrainedConfig

_PALM = {"head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 2048, "z_loss": 1e-4}
PRESETS = {
    "palm-tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "vocab_size": 1024,
    },
    "palm-mini": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 48,
        "vocab_size": 4096,
    },
    "palm-small": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "head_dim": 64,
        "vocab_size": 8192,
    },
    "palm-150m": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "head_dim": 128,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
    },
    "palm-8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 16, **_PALM},
    "palm-62b": {"hidden_size": 8192, "num_hidden_layers": 64, "num_attention_heads": 32, **_PALM},
    "palm-540b": {"hidden_size": 18432, "num_hidden_layers": 118, "num_attention_heads": 48, **_PALM},
}
_CHOICES = {
    "norm": ("rms_norm", "layer_norm"),
    "rope_type": ("half", "interleaved"),
    "attention": ("causal", "bidirectional", "prefix"),
}


def _distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and replacements from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


class PaLMConfig(PreTrainedConfig):
    """The fields of a PaLM; `PaLMConfig.preset("palm-8b")` gives the paper's sizes.

    intermediate_size: None means 4 * hidden_size. head_dim: None means hidden_size // num_attention_heads; heads * head_dim need
    not equal hidden_size (in palm-540b it does not).
    logit_scale: factor of the logits, None means 1 / sqrt(hidden_size), computed once and stored.
    norm, norm_eps, norm_offset: "rms_norm" | "layer_norm", scale only; the gain is weight + norm_offset and starts at 1.
    rope_type: "half" (PaLM, Llama) | "interleaved" (GPT-J, Cohere); partial_rotary_factor: the share of head_dim that is rotated.
    attention: "causal" | "bidirectional" | "prefix" (causal, but the first prefix_lengths[b] tokens of a row see each other).
    sliding_window: keys that a query sees, itself included (causal); on each side of it (bidirectional).
    embedding_std: std of the embeddings' init; initializer_factor: kernels start as N(0, initializer_factor / sqrt(n_in)).
    z_loss: factor of (log Z)^2 in the language model's loss. class_weights: one per label, for token classification.
    embedding_dropout, residual_dropout, classifier_dropout: shares of the embeddings, of what a block adds, of a classifier's input that
    training sets to zero; residual_dropout costs the fused block.
    mask_token_id: the row that soft weak masking mixes in where no source token is named.
    """

    model_type = "palm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (the base class reads a list)

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = None  # type: ignore[assignment]
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 512
    norm: str = "rms_norm"
    norm_eps: float = 1e-6
    norm_offset: float = 1.0
    rope_theta: float = 10000.0
    rope_type: str = "half"
    partial_rotary_factor: float = 1.0
    attention: str = "causal"
    sliding_window: int | None = None
    logit_scale: float = None  # type: ignore[assignment]
    z_loss: float = 0.0
    tie_word_embeddings: bool = True
    embedding_std: float = 1.0
    initializer_factor: float = 1.0
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    classifier_dropout: float = 0.0
    class_weights: list | None = None
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    mask_token_id: int | None = 3

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.logit_scale is None:
            self.logit_scale = 1 / math.sqrt(self.hidden_size)
        self.check()
        self._check_spelling(kwargs)
        super().__post_init__(**kwargs)

    def _check_spelling(self, unknown) -> None:
        """An unknown key is kept, as transformers does, unless it looks like a slip of the pen."""
        own = [field.name for field in dataclasses.fields(PaLMConfig)]
        for key in unknown:
            near = None if hasattr(PreTrainedConfig, key) else next((f for f in own if _distance(key, f) <= 2), None)
            if near:
                raise ValueError(f"PaLMConfig: there is no field {key!r}, do you mean {near!r}?")

    def check(self) -> None:
        """ValueError for a field that is none of its choices or does not fit another one.

        A model asks again: what `from_pretrained(..., attention=...)` replaces is set behind the constructor.
        """
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"PaLMConfig: {name} is {getattr(self, name)!r}, need one of {', '.join(choices)}")
        H, K = self.num_attention_heads, self.num_key_value_heads
        if K < 1 or H % K:
            raise ValueError(f"PaLMConfig: num_attention_heads is {H}, need a multiple of num_key_value_heads = {K}")
        if not 1 <= self.head_dim <= 256:
            raise ValueError(f"PaLMConfig: head_dim is {self.head_dim}, need 1 to 256")
        if self.rotary_dim < 2:
            raise ValueError(f"PaLMConfig: partial_rotary_factor {self.partial_rotary_factor} leaves nothing to rotate")
        for name in ("embedding_dropout", "residual_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"PaLMConfig: {name} is {getattr(self, name)}, need a share below 1")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"PaLMConfig: sliding_window is {self.sliding_window}, need at least 1, or None")

    @property
    def rotary_dim(self) -> int:
        """The even number of leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor) // 2 * 2

    @classmethod
    def preset(cls, name: str, **overrides) -> "PaLMConfig":
        """`PaLMConfig.preset("palm-8b", attention="bidirectional")`: a size of PRESETS with fields replaced."""
        if name not in PRESETS:
            raise ValueError(f"PaLMConfig.preset: {name!r} is none of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})
