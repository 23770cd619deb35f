"""The last encoder layer, of which a head that reads each first token needs no other row.

Keys and values are needed of all tokens; queries, and all that follows attention, of the first tokens alone. That is exact, and
shrinks most matrix products of the layer to a row per example. Here each family's layer is written once more for that, out of
its own modules; it is not recomputed by gradient checkpointing, having little to keep.

Legend: b examples; n rows of t tokens, as a micro-batch is laid out (padded n = b, packed n = 1); d features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from accel_trainer.attention import attend
from accel_trainer.dropout import ForwardPass
from accel_trainer.model import encoder_layers, is_stock_encoder

# Each takes a layer, hidden states (n, t, d), those of the first tokens (b, 1, d), the mask of these, and what else the model
# hands to its layers; and returns what the layer makes of the first tokens, (b, 1, d).


def bert(layer: Any, hidden: Tensor, first: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
    """BERT, RoBERTa, XLM-RoBERTa and ELECTRA."""
    part = layer.attention.self
    query, key, value = part.query(first), part.key(hidden), part.value(hidden)
    seen = _seen(part, part.num_attention_heads, query, key, value, mask, dropout=part.dropout.p)
    output: Tensor = layer.feed_forward_chunk(layer.attention.output(seen, first))
    return output


def distilbert(layer: Any, hidden: Tensor, first: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
    """DistilBERT."""
    part = layer.attention
    query, key, value = part.q_lin(first), part.k_lin(hidden), part.v_lin(hidden)
    seen = _seen(part, part.n_heads, query, key, value, mask, dropout=part.dropout.p)
    x = layer.sa_layer_norm(part.out_lin(seen) + first)
    output: Tensor = layer.output_layer_norm(layer.ffn(x) + x)
    return output


def albert(layer: Any, hidden: Tensor, first: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
    """ALBERT."""
    part = layer.attention
    query, key, value = part.query(first), part.key(hidden), part.value(hidden)
    seen = _seen(part, part.num_attention_heads, query, key, value, mask, dropout=part.attention_dropout.p)
    x = part.LayerNorm(first + part.output_dropout(part.dense(seen)))
    output: Tensor = layer.full_layer_layer_norm(layer.ff_chunk(x) + x)
    return output


def modernbert(
    layer: Any,
    hidden: Tensor,
    first: Tensor,
    mask: Tensor | None,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> Tensor:
    """ModernBERT, whose queries, keys and values come of one matrix and are turned by their places."""
    part = layer.attn
    weight, bias, d = part.Wqkv.weight, part.Wqkv.bias, part.Wqkv.in_features
    query = linear(layer.attn_norm(first), weight[:d], None if bias is None else bias[:d])
    key, value = linear(layer.attn_norm(hidden), weight[d:], None if bias is None else bias[d:]).chunk(2, -1)
    cos, sin = position_embeddings
    heads = d // part.head_dim
    query, key = _turned(query, heads, cos[:, :1], sin[:, :1]), _turned(key, heads, cos, sin)
    window = part.sliding_window
    seen = _seen(part, heads, query, key, value, mask, dropout=part.attention_dropout, sliding_window=window)
    x = first + part.out_drop(part.Wo(seen))
    output: Tensor = x + layer.mlp(layer.mlp_norm(x))
    return output


def _turned(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., "RoFormer", 2021) of x (n, t, d), with cos and sin (1, t, d of a head)."""
    wide = x.unflatten(-1, (heads, -1)).float()
    low, high = wide.chunk(2, -1)
    turned: Tensor = wide * cos.unsqueeze(2) + torch.cat([-high, low], -1) * sin.unsqueeze(2)
    return turned.to(x.dtype).flatten(2)


def _seen(
    module: nn.Module, heads: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> Tensor:
    """What attention returns for the first tokens, (b, 1, d): query (b, 1, d), key and value (n, t, d)."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return attend(module, query, key, value, mask, **named)[0].flatten(2)


FIRST_TOKEN_LAYERS: dict[str, Callable[..., Tensor]] = {
    "albert": albert,
    "bert": bert,
    "distilbert": distilbert,
    "electra": bert,
    "modernbert": modernbert,
    "roberta": bert,
    "xlm-roberta": bert,
}


def reads_first_token_only(model: PreTrainedModel) -> bool:
    """Whether the head of a classifier is known to read nothing but each example's first token."""
    pooling = getattr(model.config, "classifier_pooling", "cls")  # ModernBERT's may be the mean
    return is_stock_encoder(model) and model.config.model_type in FIRST_TOKEN_LAYERS and pooling == "cls"


def _last(model: PreTrainedModel) -> tuple[nn.Module | None, int]:
    """The module of the last layer, and how many times a forward pass calls it."""
    if model.config.model_type != "albert":
        layers = encoder_layers(model)
        return (None if layers is None else layers[-1]), 1
    encoder: Any = model.base_model.encoder
    count, groups = model.config.num_hidden_layers, encoder.albert_layer_groups
    used = [int(i / (count / len(groups))) for i in range(count)]  # as the family counts; there may be more groups
    return groups[used[-1]].albert_layers[-1], used.count(used[-1])


class LastLayer:
    """What replaces the `forward` of a model's last layer: its output is each example in a row of its own.

    That is its first token only, (b, 1, d), or where the head reads more, the padded example, (b, longest, d).
    """

    def __init__(
        self, layer: nn.Module, compute: Callable[..., Tensor] | None, calls: int, within: ForwardPass
    ) -> None:
        self.layer, self.compute, self.calls, self.within = layer, compute, calls, within

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The stock layer's `forward`, but for what it returns."""
        packing = self.within.packing
        is_last = self.within.call("last layer") >= self.calls - 1
        if is_last and self.compute is not None:
            return self._of_first(*arguments, **named)
        output = type(self.layer).forward(self.layer, *arguments, **named)
        if not is_last or packing is None:
            return output
        return packing.pad(output) if isinstance(output, Tensor) else (packing.pad(output[0]), *output[1:])

    def _of_first(self, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **handed: Any) -> Tensor:
        packing = self.within.packing
        first = hidden[:, :1] if packing is None else hidden[0].index_select(0, packing.starts).unsqueeze(1)
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        assert self.compute is not None
        return self.compute(self.layer, hidden, first, mask, **handed)


def install(model: PreTrainedModel, forward_pass: ForwardPass) -> bool:
    """Let the last layer of a model return each example in a row of its own; whether it was found.

    It is set on the layer itself, so that a copy of the model has its own, and nothing of it is saved.
    """
    layer, calls = _last(model)
    if layer is not None:
        compute = FIRST_TOKEN_LAYERS[model.config.model_type] if reads_first_token_only(model) else None
        layer.forward = LastLayer(layer, compute, calls, forward_pass)
    return layer is not None
