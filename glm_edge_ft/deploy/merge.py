"""`python -m glm_edge_ft merge`: an adapter into its base model, as a folder that needs neither of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glm_edge_ft.checks.environment import quiet_libraries
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.deploy.merging import check_adapter_kind, check_not_quantized, load_merged
from glm_edge_ft.deploy.opening import open_checkpoint
from glm_edge_ft.deploy.source import Source, find_source, quantization_of_run
from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.files import atomic_path, can_be_made
from glm_edge_ft.training.deepspeed import skip_deepspeed_import

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint

Format = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class MergeRequest:
    """One command line, as given; without `dtype` the weights get the format of the base model's."""

    checkpoint: str
    out_dir: Path
    base: str | None = None
    dtype: Format | None = None
    max_shard_size: str = "5GB"


def merge(request: MergeRequest) -> None:
    """Write the merged model, whole or not at all, with all that is needed beside it.

    Raises UserError when there is nothing to merge, when the adapter cannot be merged or does not fit its base model,
    and when OUT_DIR is not empty or cannot be made.
    """
    source = _check(request)
    quiet_libraries()
    skip_deepspeed_import()
    checkpoint = open_checkpoint(source)
    check_not_quantized(source, checkpoint)
    model = load_merged(checkpoint, quantization_of_run(source))
    _cast(model, checkpoint, request.dtype)
    _save(model, checkpoint, request)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    show(f"merged model: {request.out_dir} ({parameters:,} parameters, {str(model.dtype).removeprefix('torch.')})")


def _check(request: MergeRequest) -> Source:
    problems = ProblemList()
    where, out = f"OUT_DIR {request.out_dir}", request.out_dir
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        problems.add(where, f"{what}, and nothing is written over", "name a folder that is not there yet")
    elif not can_be_made(out):
        problems.add(where, "cannot be made", "name a folder of yours")
    try:
        source = find_source(request.checkpoint, request.base)
        _check_kind(source)
    except UserError as error:
        problems.extend(error)
    problems.raise_if_any()
    return source


def _check_kind(source: Source) -> None:
    if source.adapter is None:
        raise UserError.single(
            f"MODEL {source.name}", "is a whole model: there is nothing to merge", "use the folder as it is"
        )
    check_adapter_kind(source)


def _cast(model: PreTrainedModel, checkpoint: Checkpoint, wanted: Format | None) -> None:
    import torch

    stored = getattr(checkpoint.config, "dtype", None)
    if wanted is None and not isinstance(stored, torch.dtype):
        show_notice("the base model's config.json does not say its number format: float32 is written; see --dtype")
    dtype: torch.dtype = (
        getattr(torch, wanted) if wanted else stored if isinstance(stored, torch.dtype) else torch.float32
    )
    model.to(dtype)  # type: ignore[arg-type]


def _save(model: PreTrainedModel, checkpoint: Checkpoint, request: MergeRequest) -> None:
    """Write the folder, so that it appears whole or not at all."""
    from glm_edge_ft.model.saved_folder import complete_saved_folder

    with atomic_path(request.out_dir) as staged:
        model.save_pretrained(staged, max_shard_size=request.max_shard_size)
        checkpoint.tokenizer.save_pretrained(staged)
        complete_saved_folder(checkpoint, staged)
