"""What stands on PaLM's trunk: language models, causal and masked, and classifiers of tokens, sequences and spans.

A head is a PaLMPreTrainedModel with a PaLMModel called `model` and a loss of its own; the trunk knows nothing of heads.
Letters: B batch, T tokens, C model dim, V vocabulary, L labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from ..nn import why_not_plain
from ..ops.cross_entropy import cross_entropy, linear_cross_entropy
from ..ops.decode_linear import decode_linear, reads_once
from .configuration import PaLMConfig
from .decoding import static_room
from .modeling import _CACHE, PaLMModel, PaLMPreTrainedModel


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x); by decode_linear where nothing forbids it and x [...,C] has few rows."""
    few = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")) and reads_once(x, x.shape[:-1].numel())
    if few and why_not_plain("", linear, nn.Linear, x) is None and x.dtype == linear.weight.dtype:
        return decode_linear(x, linear.weight, bias=linear.bias)
    return linear(x)


def _check_labels(name: str, labels: Tensor, shape) -> None:
    if labels.shape != shape:
        raise ValueError(f"{name}: labels have shape {list(labels.shape)}, need [B,T] = {list(shape)}")


class _LanguageModel(PaLMPreTrainedModel):
    """The trunk with a language-model head, tied to the embeddings unless the config says otherwise."""

    shift = 0  # the label of column t + shift is predicted from column t
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own attribute)

    def __init__(self, config: PaLMConfig):
        super().__init__(config)
        self.model = PaLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _output(self, loss, logits, outputs):
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prefix_lengths: Tensor | None = None,
        strength: Tensor | None = None,
        source_ids: Tensor | None = None,
        kappa: float = 0.0,
        return_logits: bool | None = None,
        **kwargs,
    ):
        """Logits [B,T,V] = logit_scale * lm_head(hidden), and with labels [B,T] (unshifted, -100 ignored) the loss.

        The loss is the mean over labelled tokens (or the sum / num_items_in_batch) of the negative log-likelihood + z_loss (log Z)^2.
        In training mode labels give logits=None, and only labelled rows meet the head; return_logits=True asks for both.
        shift_labels [B,T] beside labels: labels that are shifted already, for rows that are cut into parts (context parallelism).
        logits_to_keep: the last so many positions, or the positions of a 1-D tensor. The rest as in PaLMModel.
        """
        num_items, shifted = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if labels is None else bool(use_cache),
            prefix_lengths=prefix_lengths,
            strength=strength,
            source_ids=source_ids,
            kappa=kappa,
            return_dict=True,
            **kwargs,
        )
        hidden_BTC = outputs.last_hidden_state
        logits = None
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            kept = hidden_BTC[:, keep] if isinstance(keep, Tensor) or logits_to_keep else hidden_BTC
            logits = _product(self.lm_head, kept)
        loss = None
        if labels is not None:
            whole = logits is not None and logits.shape[1] == hidden_BTC.shape[1]
            loss = self._loss(hidden_BTC, logits if whole else None, labels, shifted, num_items)
        scale = self.config.logit_scale
        return self._output(loss, logits if logits is None or scale == 1 else logits * scale, outputs)

    def _loss(self, hidden_BTC, logits_BTV, labels_BT, shifted_BT, num_items):
        """The loss, from the unscaled logits where they are there and else without ever holding them."""
        targets = labels_BT if shifted_BT is None else shifted_BT
        _check_labels(type(self).__name__, targets, hidden_BTC.shape[:2])
        if shifted_BT is None and self.shift:
            targets = F.pad(labels_BT[:, self.shift :], (0, self.shift), value=-100)
        keywords = {
            "z_loss": self.config.z_loss,
            "logit_scale": self.config.logit_scale,
            "reduction": "mean" if num_items is None else "sum",
        }
        head = self.lm_head
        if logits_BTV is None and why_not_plain("lm_head", head, nn.Linear, hidden_BTC):
            logits_BTV = head(hidden_BTC)  # LoRA, a quantised head: only the module knows its product
        if logits_BTV is None:
            loss = linear_cross_entropy(hidden_BTC, head.weight, targets, linear_bias=head.bias, **keywords)
        else:
            loss = cross_entropy(logits_BTV, targets, **keywords)
        return loss if num_items is None else loss / num_items


class PaLMForCausalLM(_LanguageModel, GenerationMixin):
    """The next token of each: the label of column t + 1 is predicted from column t. `generate` continues a text."""

    shift = 1

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        """The mask [B,S], as long as a static cache has room, so that no step of `generate` has a shape of its own; theirs would be 4-D."""
        room = static_room(kwargs.get("cache", kwargs.get("past_key_values")))
        if attention_mask is None or room is None:
            return attention_mask
        return F.pad(attention_mask, (0, room - attention_mask.shape[1]), value=1)

    def _output(self, loss, logits, outputs) -> CausalLMOutputWithPast:
        cache = {_CACHE: outputs.get(_CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **cache)


class PaLMForMaskedLM(_LanguageModel):
    """The token that stood where a mask stands: the label of column t is predicted from column t. Wants config.attention "bidirectional".

    With few labels a row (masked prediction) the head and the loss cost as many rows as there are labels.
    """

    def _output(self, loss, logits, outputs) -> MaskedLMOutput:
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class _Classifier(PaLMPreTrainedModel):
    """The trunk with a linear classifier `score`; `_logits_and_loss` says of what, `output` is what `forward` returns."""

    output: type

    def __init__(self, config: PaLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = PaLMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore
        weights = config.class_weights
        if weights is not None and len(weights) != config.num_labels:
            raise ValueError(f"{type(self).__name__}: {len(weights)} class_weights for {config.num_labels} labels")
        self.post_init()

    def _logits_and_loss(self, hidden_BTC, attention_mask, labels, num_items):
        raise NotImplementedError

    def _score(self, hidden: Tensor) -> Tensor:
        """Logits in float32 (float64 beside float64)."""
        logits = self.score(self.dropout(hidden))
        return logits if logits.dtype == torch.float64 else logits.float()

    def _cross_entropy(self, logits: Tensor, labels: Tensor, num_items) -> Tensor:
        """The class-weighted mean, or the sum / num_items."""
        weights = self.config.class_weights
        weight = None if weights is None else torch.tensor(weights, dtype=logits.dtype, device=logits.device)
        loss = cross_entropy(logits, labels, weight=weight, reduction="mean" if num_items is None else "sum")
        return loss if num_items is None else loss / num_items  # type: ignore

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        prefix_lengths: Tensor | None = None,
        strength: Tensor | None = None,
        source_ids: Tensor | None = None,
        kappa: float = 0.0,
        **kwargs,
    ):
        """Logits in float32, and with labels the loss: see the class. With num_items_in_batch it is the sum divided by it.

        The rest as in PaLMModel.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            prefix_lengths=prefix_lengths,
            strength=strength,
            source_ids=source_ids,
            kappa=kappa,
            return_dict=True,
            **kwargs,
        )
        logits, loss = self._logits_and_loss(outputs.last_hidden_state, attention_mask, labels, num_items)
        return self.output(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class PaLMForTokenClassification(_Classifier):
    """A label for each token (named entities): logits [B,T,L], labels [B,T] with -100 ignored, class-weighted mean cross entropy."""

    output = TokenClassifierOutput

    def _logits_and_loss(self, hidden_BTC, attention_mask, labels, num_items):
        logits = self._score(hidden_BTC)
        return logits, None if labels is None else self._cross_entropy(logits, labels, num_items)


class PaLMForSequenceClassification(_Classifier):
    """A label for each row: logits [B,L] from its last token, or from the mean of its tokens where attention is bidirectional.

    labels: [B] classes (class-weighted cross entropy), [B] numbers where there is one label or config.problem_type is "regression"
    (squared error), [B,L] of 0 and 1 where it is "multi_label_classification" (binary cross entropy). Padding counts for nothing;
    without attention_mask there is none.
    """

    output = SequenceClassifierOutput

    def _pool(self, hidden_BTC: Tensor, attention_mask: Tensor | None) -> Tensor:
        B, T, _ = hidden_BTC.shape
        if attention_mask is None:
            keep_BT = torch.ones(B, T, dtype=torch.bool, device=hidden_BTC.device)
        else:
            keep_BT = attention_mask[:, -T:] != 0
        if self.config.attention == "bidirectional":
            weights_BT1 = (keep_BT / keep_BT.sum(1, keepdim=True).clamp(min=1))[..., None].to(hidden_BTC.dtype)
            return (hidden_BTC * weights_BT1).sum(1)
        last_B = (keep_BT * torch.arange(1, T + 1, device=keep_BT.device)).argmax(1)
        return hidden_BTC[torch.arange(B, device=last_B.device), last_B]

    def _logits_and_loss(self, hidden_BTC, attention_mask, labels, num_items):
        logits_BL = self._score(self._pool(hidden_BTC, attention_mask))
        if labels is None:
            return logits_BL, None
        kind = self.config.problem_type or ("regression" if self.num_labels == 1 else "single_label_classification")
        if kind == "single_label_classification":
            return logits_BL, self._cross_entropy(logits_BL, labels.view(-1), num_items)
        if labels.numel() != logits_BL.numel():
            raise ValueError(
                f"PaLMForSequenceClassification: labels have shape {list(labels.shape)}, {kind} needs {list(logits_BL.shape)}"
            )
        labels = labels.view_as(logits_BL).to(logits_BL.dtype)
        loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        if num_items is None:
            return logits_BL, loss(logits_BL, labels)
        return logits_BL, loss(logits_BL, labels, reduction="sum") / (num_items * self.num_labels)


class PaLMForQuestionAnswering(PaLMPreTrainedModel):
    """The span of the context that answers a question: a start and an end logit [B,T] for each token."""

    def __init__(self, config: PaLMConfig):
        super().__init__(config)
        self.model = PaLMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        strength: Tensor | None = None,
        source_ids: Tensor | None = None,
        kappa: float = 0.0,
        **kwargs,
    ):
        """start_logits, end_logits [B,T] in float32, and with start_positions and end_positions [B] the mean of their cross entropies.

        A position outside [0,T) (an answer that the window does not hold) or on padding is left out, and padding is no candidate for
        the others. The rest as in PaLMModel.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            prefix_lengths=prefix_lengths,
            strength=strength,
            source_ids=source_ids,
            kappa=kappa,
            return_dict=True,
            **kwargs,
        )
        logits_BT2 = self.qa_outputs(self.dropout(outputs.last_hidden_state))
        logits_BT2 = logits_BT2 if logits_BT2.dtype == torch.float64 else logits_BT2.float()
        if (start_positions is None) != (end_positions is None):
            raise ValueError("PaLMForQuestionAnswering: start_positions and end_positions go together, one is missing")
        loss = None
        if start_positions is not None and end_positions is not None:
            T = logits_BT2.shape[1]
            targets = torch.stack((start_positions.view(-1), end_positions.view(-1)))
            targets = torch.where((targets >= 0) & (targets < T), targets, -100)
            scores = logits_BT2.permute(2, 0, 1)  # [2,B,T]
            if attention_mask is not None:  # else the loss of a row would change with the padding beside it
                padded_BT = attention_mask[:, -T:] == 0
                scores = scores.masked_fill(padded_BT, torch.finfo(scores.dtype).min)
                targets = targets.masked_fill(padded_BT.gather(1, targets.T.clamp(min=0)).T, -100)
            halves = [
                cross_entropy(s, t, reduction="mean" if num_items is None else "sum")
                for s, t in zip(scores, targets, strict=True)
            ]
            loss = (halves[0] + halves[1]) / 2  # type: ignore
            loss = loss if num_items is None else loss / num_items
        start_logits, end_logits = (logits.contiguous() for logits in logits_BT2.unbind(-1))
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=outputs.hidden_states
        )
