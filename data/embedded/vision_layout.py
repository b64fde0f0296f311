"""What `glm-edge-v-nano` is made of besides its weights: chat template, config, image processor.

Geometry, field names and template are those of the released vision checkpoints; only the widths are small. The text
part and the tokenizer are those of `glm-edge-nano`.
"""

from __future__ import annotations

from typing import Any

from transformers import GlmConfig, PreTrainedTokenizerBase

from data.embedded.layout import token_id
from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig

IMAGE_TOKEN = "<|begin_of_image|>"
IMAGE_END_TOKEN = "<|end_of_image|>"

# As the released template: system turns are left out, content is a list of parts, an image is 578 placeholders, and
# what looks like line breaks are the two characters backslash and n.
VISION_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] in ['user', 'assistant'] -%}"
    "<|{{ message['role'] }}|>\\n"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- for _ in range(578) -%}<|begin_of_image|>{%- endfor -%}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}\\n{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>\\n{%- endif -%}"
)

VISION_FIELDS: dict[str, Any] = {
    "hidden_size": 64,
    "image_size": 672,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
}

PREPROCESSOR_FIELDS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "MllamaImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_tiles": 1,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 672, "width": 672},
}


def vision_nano_config(text: GlmConfig, tokenizer: PreTrainedTokenizerBase) -> GlmEdgeVConfig:
    """Return the configuration of `glm-edge-v-nano`: the text part's, and that of a small tower of true geometry."""
    kept = {
        name: value
        for name, value in text.to_dict().items()
        if name not in {"architectures", "model_type", "transformers_version", "dtype"}
    }
    return GlmEdgeVConfig(
        **kept,
        vision_config=VISION_FIELDS,
        boi_token_id=token_id(tokenizer, IMAGE_TOKEN),
        eoi_token_id=token_id(tokenizer, IMAGE_END_TOKEN),
    )
