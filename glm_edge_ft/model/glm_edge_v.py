"""GLM-Edge-V on current transformers: its GLM and its SigLIP, composed under the key names of the released checkpoints.

    GlmEdgeVForCausalLM
        model                       GlmEdgeVModel: transformers' GlmModel, and
            vision
                vit.model.vision_model      SiglipVisionModel without its pooling head
                adapter                     patches to vectors of the language model: conv, linear_proj, boi, eoi
        lm_head

An image is 672 x 672 pixels, cut into 48 x 48 patches; the adapter makes 24 x 24 vectors of them, puts boi before and
eoi after, and these 578 vectors replace 578 placeholder tokens of the row. Positions are plain and attention is causal
over image tokens too. Nothing else differs from GLM, so a row without image is computed exactly as by `GlmForCausalLM`.

The released remote code does not run on transformers 5, and no remote code is needed here. Sources: THUDM/GLM-Edge
(modelling code and key names), GLM-4V (activation and norm of the adapter), llama.cpp (vision graph).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, GlmForCausalLM, GlmModel
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from glm_edge_ft.distributed import launch
from glm_edge_ft.model.checkpoint import ModelLocation
from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig, read_glm_edge_v_config
from glm_edge_ft.model.glm_edge_v_vision import GlmEdgeVAdapter, GlmEdgeVVision
from glm_edge_ft.model.weight_files import fetch_weights, load_strict

# The tower's pooling head is stored in checkpoints and never computed; the others are counted up anew on every start.
UNUSED_KEYS = [r"vision_model\.head\.", r"embeddings\.position_ids$", r"rotary_emb\.inv_freq$"]
NO_SPLIT_MODULES = ["GlmDecoderLayer", "SiglipEncoderLayer", "SiglipVisionEmbeddings", "GlmEdgeVAdapter"]


class GlmEdgeVModel(GlmModel):
    """`GlmModel` that puts the vectors of images in the place of their placeholders."""

    config: GlmEdgeVConfig
    _no_split_modules = NO_SPLIT_MODULES

    def __init__(self, config: GlmEdgeVConfig) -> None:
        super().__init__(config)
        if config.boi_token_id is None:
            raise ValueError("a vision model needs boi_token_id in its config, the id of the image placeholder")
        self.placeholder_id = config.boi_token_id
        self.vision = GlmEdgeVVision(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GlmEdgeVAdapter):
            for boundary in (module.boi, module.eoi):
                init.normal_(boundary, mean=0.0, std=self.config.initializer_range)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As `GlmModel.forward`; images and their placeholders as in `GlmEdgeVForCausalLM.forward`."""
        if pixel_values is not None or image_features is not None:
            if input_ids is None:
                raise ValueError("images need input_ids: the placeholders are found by their id")
            inputs_embeds, input_ids = self.merge_images(input_ids, pixel_values, image_features), None
        elif input_ids is not None and input_ids.shape[1] > 1:  # a single token is a step of generation
            self.count_images(input_ids, images=0)
            if self._is_vision_shared():
                zero = self._blank_image()  # first, as in merge_images: all processes gather weights in one order
                inputs_embeds = self.embed_tokens(input_ids) + zero
                input_ids = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _is_vision_shared(self) -> bool:
        """Whether other processes wait until this one has run its vision part, so that no batch may leave it out.

        They do where each holds a share of its weights (ZeRO-3), and where its gradients are averaged.
        """
        if not torch.distributed.is_initialized() or launch().world_size == 1:
            return False
        is_trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.vision.parameters())
        return is_trained or is_deepspeed_zero3_enabled()

    def _image_shape(self) -> tuple[int, int, int]:
        tower: Any = self.vision.vit.model.vision_model.config
        return tower.num_channels, tower.image_size, tower.image_size

    def _blank_image(self) -> torch.Tensor:
        """Return 0, computed from a black image: nothing is added, and all gradients of the vision part are 0."""
        return self.vision(torch.zeros(1, *self._image_shape(), device=self.device)).sum() * 0.0

    def merge_images(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the input embeddings `(batch, length, hidden)` with each image's vectors in its placeholders' place.

        Images are taken in the order of their placeholders, row by row. `image_features` are vectors that were computed
        before, `(images, tokens_per_image, hidden)`, and win over pixels. Raises ValueError as `count_images`, and for
        pixels or vectors of another size.
        """
        if image_features is None:
            assert pixel_values is not None
            images = self.flatten_images(pixel_values)
            self.count_images(input_ids, images=len(images))
            image_features = self.vision(images)
        else:
            size = (self.config.tokens_per_image, self.config.hidden_size)
            if tuple(image_features.shape[1:]) != size:
                shape = f"(images, {size[0]}, {size[1]})"
                raise ValueError(f"image_features must be {shape}, but have the shape {tuple(image_features.shape)}")
            self.count_images(input_ids, images=len(image_features))
        embeddings = self.embed_tokens(input_ids)
        is_placeholder = input_ids.eq(self.placeholder_id).unsqueeze(-1).to(embeddings.device)
        return embeddings.masked_scatter(is_placeholder, image_features.to(embeddings))

    def flatten_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return `(images, channels, side, side)` for that shape or the released `(samples, images, tiles, ...)`.

        Raises ValueError when channels and sides are not those of the checkpoint.
        """
        expected = self._image_shape()
        if pixel_values.dim() < 4 or tuple(pixel_values.shape[-3:]) != expected:
            raise ValueError(f"pixel_values must end in {expected}, but have the shape {tuple(pixel_values.shape)}")
        return pixel_values.reshape(-1, *expected)

    def count_images(self, input_ids: torch.Tensor, images: int) -> list[int]:
        """Return how many images each row's placeholders stand for.

        Raises ValueError, with both numbers, when the placeholders of the batch are not those of `images` images, or
        those of one row are no whole number of images.
        """
        size = self.config.tokens_per_image
        counts: list[int] = input_ids.eq(self.placeholder_id).sum(dim=1).tolist()
        token = f"image placeholders (id {self.placeholder_id})"
        if sum(counts) != images * size:
            raise ValueError(
                f"the batch has {sum(counts)} {token}, but {images} images give {images * size} vectors, {size} each"
            )
        for row, count in enumerate(counts):
            if count % size:
                raise ValueError(f"row {row} of the batch has {count} {token}, which is no multiple of {size}")
        return [count // size for count in counts]


class GlmEdgeVForCausalLM(GlmForCausalLM):
    """GLM-Edge-V with its language-model head."""

    config: GlmEdgeVConfig
    model: GlmEdgeVModel
    _no_split_modules = NO_SPLIT_MODULES
    _keys_to_ignore_on_load_unexpected = UNUSED_KEYS
    _can_compile_fullgraph = False  # the number of placeholders is read on the host

    def __init__(self, config: GlmEdgeVConfig) -> None:
        super(GlmForCausalLM, self).__init__(config)  # past GlmForCausalLM, which would build a GlmModel first
        self.model = GlmEdgeVModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `GlmForCausalLM.forward`, with images.

        Args:
            input_ids: `(batch, length)`. Each image stands in it as `tokens_per_image` (578) times `boi_token_id`.
            pixel_values: `(images, 3, 672, 672)`, or the released `(samples, images, tiles, 3, 672, 672)`, in any
                floating format; images in the order of their placeholders over the batch. None: no row has an image,
                and the vision part is not run. Needed only where the placeholders are fed: with a cache, once.
            image_features: `(images, tokens_per_image, hidden)`, what `model.vision` made of the pixels before; in
                place of `pixel_values`, where the vision part does not change.

        Raises:
            ValueError: the placeholders are not those of the images, or pixels or vectors have another size.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,  # handed on to GlmEdgeVModel, as are the vectors, with the keyword arguments
            image_features=image_features,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as `PreTrainedModel.save_pretrained`, under the names that the modules have: those of the release.

        transformers knows a renaming for SigLIP models of its own, and under ZeRO-3 would apply it to the tower.
        """
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat rows for beams and samples, and the images of each row with it.

        transformers repeats each image on its own, which mixes up rows with two images or more.
        """
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_features")}
        images = {name: of_batch for name, of_batch in images.items() if of_batch is not None}
        if input_ids is not None and expand_size > 1:
            for name, of_batch in images.items():
                flat = self.model.flatten_images(of_batch) if name == "pixel_values" else of_batch
                of_rows = flat.split(self.model.count_images(input_ids, images=len(flat)))
                images[name] = torch.cat([copy for row in of_rows for copy in [row] * expand_size])
        expand = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, model_kwargs = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return input_ids, {**model_kwargs, **images}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Leave image features out once the cache has them, as transformers does with pixels."""
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if updated.get("use_cache", True):
            updated.pop("image_features", None)
        return updated


def load_glm_edge_v(source: str | Path, dtype: torch.dtype, **options: Any) -> GlmEdgeVForCausalLM:
    """Load a vision checkpoint, released or saved by this toolkit, in `dtype`; no remote code is run.

    Args:
        source: a folder, or a hub id.
        dtype: the format of its weights.
        options: further ones of `from_pretrained`.

    Raises:
        UserError: the config is not that of a vision model, or the weights are not exactly those that it describes.
    """
    is_local = Path(source).is_dir()
    folder = fetch_weights(ModelLocation(str(source), str(source), is_local))
    config = read_glm_edge_v_config(folder)
    load: Any = GlmEdgeVForCausalLM.from_pretrained
    model: Any = load_strict(f"MODEL {source}", load, folder, config=config, dtype=dtype, **options)
    return model
