"""The types that pass through a run (RunRequest, Plan, Prepared), and what training and `evaluate` build of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glm_edge_ft.console import show_notice, show_notice_once
from glm_edge_ft.distributed import is_main_process

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, Seq2SeqTrainingArguments

    from glm_edge_ft.config import RunConfig
    from glm_edge_ft.data.collator import PackedCollator, PaddedCollator, VisionCollator
    from glm_edge_ft.data.dataset import EncodedDataset
    from glm_edge_ft.data.encoding import ConversationEncoder
    from glm_edge_ft.data.feature_cache import ImageFeatures
    from glm_edge_ft.data.image_check import ImageCheck
    from glm_edge_ft.data.pixels import PixelNormalizer
    from glm_edge_ft.model.checkpoint import Checkpoint, ModelLocation
    from glm_edge_ft.model.memory import MemoryEstimate
    from glm_edge_ft.model.precision import Precision
    from glm_edge_ft.training.checkpoints import ResumePlan
    from glm_edge_ft.training.replies import EvaluationData, GenerationContext


@dataclass(frozen=True)
class RunRequest:
    """One command line, as given; `takes_images` tells finetune_vision.py from finetune.py."""

    data_dir: Path
    model: str
    config: Path
    resume: str | None = None
    overrides: tuple[str, ...] = ()
    check: bool = False
    preview: int | None = None
    json_path: Path | None = None
    takes_images: bool = False


@dataclass(frozen=True)
class Plan:
    """A command line that makes sense: config read, files there, MODEL found, RESUME resolved.

    Attributes:
        trains: whether the model is trained; otherwise it is used as it is.
    """

    request: RunRequest
    config: RunConfig
    location: ModelLocation
    resume: ResumePlan
    output_dir: Path
    data_files: dict[str, Path]
    trains: bool = True


@dataclass(frozen=True)
class Prepared:
    """All that training needs but the weights.

    Attributes:
        datasets: encoded rows by split, `train` and, where the config names them, `val` and `test`.
        parameters: (trainable, all) parameter counts with the adapter in place.
        quantized: number of those that are kept in 4 bits.
        keeps_vision: whether the model has a vision part that is not trained.
        image_processor: of a vision model, for runs that take images; else None.
        image_check: what is known of the images; None where there are none or they were not opened.
    """

    plan: Plan
    checkpoint: Checkpoint
    precision: Precision
    encoder: ConversationEncoder
    datasets: dict[str, EncodedDataset]
    parameters: tuple[int, int]
    quantized: int
    memory: MemoryEstimate
    training_arguments: Seq2SeqTrainingArguments
    generation_config: GenerationConfig
    keeps_vision: bool
    image_processor: Any
    image_check: ImageCheck | None


def load_evaluations(prepared: Prepared) -> dict[str, EvaluationData]:
    """Return the data to evaluate on by split: rows for the loss, prompts for generation."""
    from glm_edge_ft.data.dataset import load_prompts
    from glm_edge_ft.training.replies import EvaluationData

    evaluations: dict[str, EvaluationData] = {}
    generates = prepared.plan.config.training_args.get("predict_with_generate", False)
    for split in ("val", "test"):
        if split in prepared.datasets:
            rows, path = prepared.datasets[split], prepared.plan.data_files[split]
            prompts = load_prompts([path], prepared.encoder) if generates else []
            if prepared.image_check is not None:
                prompts, notices = prepared.image_check.of_prompts(prompts)
                for notice in notices:
                    show_notice(f"{split}: {notice}")
            evaluations[split] = EvaluationData(rows=rows, lengths=rows.lengths.tolist(), prompts=prompts)
    return evaluations


def build_collator(
    prepared: Prepared,
    form: Literal["left", "right", "packed"],
    images: ImageFeatures | PixelNormalizer | None = None,
) -> PaddedCollator | PackedCollator | VisionCollator:
    """Return what makes a batch: ids, and in vision runs the pixels of its images, where they are needed.

    `form` says on which side rows are padded, or that they are packed. `images` completes the batches
    (`complete_images`); without it they are complete.
    """
    from glm_edge_ft.data.collator import PackedCollator, PaddedCollator, VisionCollator
    from glm_edge_ft.data.feature_cache import ImageFeatures
    from glm_edge_ft.data.pixels import can_emit_uint8

    pad_token_id = prepared.checkpoint.tokenizer.pad_token_id
    text = PackedCollator() if form == "packed" else PaddedCollator(pad_token_id, form)
    if prepared.image_processor is None:
        return text
    skip = show_notice_once if prepared.plan.config.on_bad_image == "skip" else None
    store = images.store if isinstance(images, ImageFeatures) else None
    emit_uint8 = images is not None and can_emit_uint8(prepared.image_processor)
    return VisionCollator(text, prepared.image_processor, store, skip, emit_uint8)


def build_generation_context(
    prepared: Prepared, images: ImageFeatures | PixelNormalizer | None = None
) -> GenerationContext:
    """Return what evaluation needs to generate: greedy unless the config says otherwise, up to a stop id."""
    from glm_edge_ft.data.collator import PromptCollator
    from glm_edge_ft.data.prompts import clean_prediction
    from glm_edge_ft.model.adapters import generate
    from glm_edge_ft.model.decoding import start_continuous_batch
    from glm_edge_ft.training.replies import GenerationContext

    tokenizer, settings = prepared.checkpoint.tokenizer, prepared.encoder.images

    def shorten_images(text: str) -> str:  # one placeholder for each image is enough to read
        if settings is None:
            return text
        placeholder = str(tokenizer.convert_ids_to_tokens(settings.placeholder_id))
        return text.replace(placeholder * settings.placeholders_per_image, placeholder)

    def generate_from(model: Any, **inputs: Any) -> torch.Tensor:
        return generate(model, **(images.add_image_features(inputs) if images else inputs))

    return GenerationContext(
        generate=generate_from,
        collate=PromptCollator(build_collator(prepared, "left", images)),
        loader_processes=prepared.training_arguments.dataloader_num_workers if prepared.image_processor else 0,
        clean=functools.partial(clean_prediction, prepared.encoder),
        decode=lambda ids: shorten_images(str(tokenizer.decode(list(ids)))),
        warn=show_notice,
        options={"generation_config": prepared.generation_config},
        add_image_features=images.add_image_features if images else dict,
        start_continuous_batch=start_continuous_batch,
        scoring_processes=prepared.plan.config.data_config.num_proc,
        show_progress=is_main_process() and not prepared.training_arguments.disable_tqdm,
    )


def complete_images(prepared: Prepared, model: Any) -> ImageFeatures | PixelNormalizer | None:
    """Return what adds to batches what the loader's processes leave out of images; None where they are complete.

    That is the features that a frozen vision part computes once, where images are seen again, else the normalization.
    They are not kept under ZeRO-3, which shares the vision part among processes.
    """
    import torch
    from transformers.integrations import is_deepspeed_zero3_enabled

    from glm_edge_ft.data.feature_cache import open_image_features
    from glm_edge_ft.data.pixels import pixel_normalizer

    processor, device = prepared.image_processor, prepared.training_arguments.device
    normalizer = pixel_normalizer(processor, device)
    if processor is None or is_deepspeed_zero3_enabled() or not prepared.plan.config.cache_image_features:
        return normalizer
    if any(parameter.requires_grad for parameter in model.model.vision.parameters()):
        return normalizer
    dtype = getattr(torch, prepared.precision.compute)
    return open_image_features(model, images_seen_again(prepared), processor, dtype, device, normalizer) or normalizer


def images_seen_again(prepared: Prepared) -> list[str]:
    """Return the images that the run needs more than once: in epochs, or in an evaluation by loss and by replies."""
    args, datasets = prepared.training_arguments, prepared.datasets
    rows = len(datasets["train"])
    again = {
        "train": args.max_steps * rows_per_step(args) > rows if args.max_steps > 0 else args.num_train_epochs > 1,
        "val": args.eval_strategy != "no" or args.eval_on_start,
        "test": args.predict_with_generate,
    }
    seen = [datasets[split] for split in datasets if again[split]]
    return list(dict.fromkeys(path for data in seen for index in range(len(data)) for path in data.images(index)))


def rows_per_step(args: Seq2SeqTrainingArguments) -> int:
    """Return how many rows all processes together take in one optimizer step."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size
