"""What passes between the rooms of a run: the request, its plan, and all that training needs but the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, Seq2SeqTrainingArguments

    from glm_edge_ft.config import RunConfig
    from glm_edge_ft.data.dataset import EncodedDataset
    from glm_edge_ft.data.encoding import ConversationEncoder
    from glm_edge_ft.data.image_check import ImageCheck
    from glm_edge_ft.model.checkpoint import Checkpoint, ModelLocation
    from glm_edge_ft.model.memory import MemoryEstimate
    from glm_edge_ft.model.precision import Precision
    from glm_edge_ft.training.checkpoints import ResumePlan


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
