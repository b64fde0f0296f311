"""The last layer's feed-forward part, for the tokens whose hidden states are used.

Keys and values of every token are read by others, layer after layer. What a token's feed-forward part in the last layer
gives is read by nobody but the loss, and most rows have tokens that are not supervised: questions, images, padding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.glm.modeling_glm import GlmDecoderLayer


class LastGlmDecoderLayer(GlmDecoderLayer):
    """A layer of GLM whose feed-forward part can leave tokens out; as its parent it can be checkpointed."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, selected_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return what the parent does at the used tokens, `(1, used, hidden)`; without them for all tokens.

        Args:
            hidden_states: `(batch, length, hidden)`.
            args, kwargs: as the parent takes them.
            selected_positions: positions among all `batch x length` tokens, `(used,)` int64.
        """
        if selected_positions is None:
            return super().forward(hidden_states, *args, **kwargs)
        update, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        used = (hidden_states + update).flatten(0, 1).index_select(0, selected_positions).unsqueeze(0)
        output: torch.Tensor = used + self.mlp(self.post_attention_layernorm(used))
        return output


def select_supervised_positions(decoder: Any) -> bool:
    """Let the decoder take `selected_positions` of `LastGlmDecoderLayer`; return whether its layers are of that class.

    Without the argument nothing changes. Keyword arguments of a decoder are handed to all its layers, and from there to
    functions of attention, which leave those alone that they do not know.
    """
    layers = getattr(decoder, "layers", None)
    if not layers or any(type(layer) not in (GlmDecoderLayer, LastGlmDecoderLayer) for layer in layers):
        return False
    layers[decoder.config.num_hidden_layers - 1].__class__ = LastGlmDecoderLayer
    return True
