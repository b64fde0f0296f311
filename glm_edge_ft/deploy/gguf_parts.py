"""The files of an exported model: the language part, and of a vision model its vision part as llama.cpp's `mmproj`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glm_edge_ft.deploy import gguf_vision, gguf_weights
from glm_edge_ft.deploy.gguf_vision import add_vision_settings, plan_vision_tensors
from glm_edge_ft.deploy.gguf_vocabulary import Vocabulary, add_vocabulary
from glm_edge_ft.deploy.gguf_weights import PlannedTensor, add_settings, plan_tensors, read_arrays, write_tensors

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Part:
    """One file.

    Attributes:
        path: where it goes.
        architecture: its `general.architecture`.
        type: its `general.type`.
        name: its `general.name`.
        kind: the number format of its matrices.
        plan: from a model, with or without numbers, to the file's tensors.
        add_keys: writes the keys that belong to the architecture.
    """

    path: Path
    architecture: str
    type: str
    name: str
    kind: GGMLQuantizationType
    plan: Callable[[PreTrainedModel, GGMLQuantizationType], list[PlannedTensor]]
    add_keys: Callable[[GGUFWriter], None]

    def size(self, model: PreTrainedModel) -> int:
        """Return the bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.plan(model, self.kind))

    def write(self, model: PreTrainedModel, path: Path) -> None:
        """Write the file to `path`. Raises UserError for numbers that its format cannot hold."""
        import gguf

        writer = gguf.GGUFWriter(None, self.architecture)
        writer.add_type(self.type)
        writer.add_name(self.name)
        writer.add_file_type(_file_type(self.kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.add_keys(writer)
        planned = self.plan(model, self.kind)
        write_tensors(writer, path, planned, read_arrays(model.state_dict(), planned))


def language_part(path: Path, name: str, checkpoint: Checkpoint, vocabulary: Vocabulary, type_name: str) -> Part:
    """Return the file that holds tokenizer, template and the language model."""

    def add_keys(writer: GGUFWriter) -> None:
        add_settings(writer, checkpoint.config)
        add_vocabulary(writer, vocabulary)

    return Part(path, gguf_weights.ARCHITECTURE, "model", name, _kind(type_name), plan_tensors, add_keys)


def vision_part(path: Path, name: str, checkpoint: Checkpoint, type_name: str) -> Part:
    """Return the file that holds tower and adapter. Raises UserError for an image processor that cannot be read."""
    from glm_edge_ft.model.loading import load_image_processor

    image_processor = load_image_processor(checkpoint.location)

    def add_keys(writer: GGUFWriter) -> None:
        add_vision_settings(writer, checkpoint.config, image_processor)

    return Part(path, gguf_vision.ARCHITECTURE, "mmproj", name, _kind(type_name), plan_vision_tensors, add_keys)


def _kind(type_name: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[type_name.upper()]


def _file_type(kind: GGMLQuantizationType) -> int:
    from gguf import LlamaFileType

    return int(LlamaFileType["ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"])
