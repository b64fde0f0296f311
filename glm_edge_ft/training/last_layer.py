"""The feed-forward block of the last layer, computed only for tokens whose hidden states the loss reads.

Keys and values of every token are read by later tokens, layer after layer. The output of the last layer's feed-forward
block is read by the loss alone, and most rows have tokens that are not supervised: questions, images, padding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.glm.modeling_glm import GlmDecoderLayer


class LastGlmDecoderLayer(GlmDecoderLayer):
    """A GLM layer whose feed-forward block can skip tokens; it can be checkpointed like its parent."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, selected_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the output at the selected positions, `(1, selected, hidden)`; without them at all positions.

        Args:
            hidden_states: `(batch, length, hidden)`.
            args, kwargs: as the parent takes them.
            selected_positions: indices into the `batch x length` tokens, `(selected,)` int64.
        """
        if selected_positions is None:
            return super().forward(hidden_states, *args, **kwargs)
        update, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        selected = (hidden_states + update).flatten(0, 1).index_select(0, selected_positions).unsqueeze(0)
        output: torch.Tensor = selected + self.mlp(self.post_attention_layernorm(selected))
        return output


def select_supervised_positions(decoder: Any) -> bool:
    """Let a GLM decoder take `selected_positions`; return False, with nothing changed, for other decoders.

    A decoder passes its keyword arguments to all layers, and these to attention functions, which ignore unknown ones.
    """
    layers = getattr(decoder, "layers", None)
    if not layers or any(type(layer) not in (GlmDecoderLayer, LastGlmDecoderLayer) for layer in layers):
        return False
    layers[decoder.config.num_hidden_layers - 1].__class__ = LastGlmDecoderLayer
    return True
