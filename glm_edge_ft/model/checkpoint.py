"""A model without its weights: where it comes from, and its config, tokenizer and stop ids.

Also where the embedded models are. Light on purpose: a model's name is checked before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

# Real GLM-Edge checkpoints, small enough to ship with the code; their makers are in `data/embedded`.
EMBEDDED_MODELS: dict[str, Path] = {
    name: Path(__file__).resolve().parent / "embedded" / name for name in ("glm-edge-nano", "glm-edge-v-nano")
}


@dataclass(frozen=True)
class ModelLocation:
    """Where a model comes from.

    Attributes:
        name: the MODEL argument as written.
        source: an absolute path of a folder, or a hub id when `is_local` is false.
        is_local: whether `source` is a folder on this machine.
        adapter: folder of an adapter that goes onto the model. Its tokenizer and stop ids go before the model's.
    """

    name: str
    source: str
    is_local: bool
    adapter: Path | None = None

    @property
    def tokenizer_folders(self) -> list[ModelLocation]:
        """Where tokenizer and stop ids may be, the first choice first."""
        adapter = self.adapter
        return [self] if adapter is None else [ModelLocation(self.name, str(adapter), is_local=True), self]


@dataclass(frozen=True)
class Checkpoint:
    """Everything of a model but its weights.

    Attributes:
        config: of a vision model, a `GlmEdgeVConfig`.
        stop_ids: the token ids on which generation stops, as generation config, config and tokenizer say.
        folder: the folder of its small files: the model's folder, or a hub id's folder in the cache.
    """

    location: ModelLocation
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]
    folder: Path

    @property
    def is_vision(self) -> bool:
        """Whether this is a GLM-Edge-V."""
        return self.config.to_dict().get("vision_config") is not None
