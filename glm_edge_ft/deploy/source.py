"""MODEL_OR_CHECKPOINT: an embedded model, a hub id, the folder of a model, run, checkpoint or adapter.

Needs the file system alone, so that a wrong name shows at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from glm_edge_ft.errors import UserError
from glm_edge_ft.files import expand_home
from glm_edge_ft.model.checkpoint import ModelLocation
from glm_edge_ft.model.loading import locate_model
from glm_edge_ft.model.saved_adapter import ADAPTER_CONFIG, SavedAdapter, read_adapter
from glm_edge_ft.training.checkpoints import RUN_RECORD, find_checkpoints

_SHOWN = 8
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_GIVE_BASE = "give it: --base MODEL"


@dataclass(frozen=True)
class Source:
    """What MODEL_OR_CHECKPOINT came to.

    Attributes:
        name: as written.
        location: the model, or an adapter's base model with the adapter's folder.
        adapter: what is known of the adapter; None for a whole model.
        record: the `run.json` of the run that wrote it, or None.
        step: the N of a `checkpoint-N`, or None.
        base_is_given: whether `--base` named the base model.
    """

    name: str
    location: ModelLocation
    adapter: SavedAdapter | None = None
    record: Path | None = None
    step: int | None = None
    base_is_given: bool = False


def find_source(name: str, base: str | None = None) -> Source:
    """Return what MODEL_OR_CHECKPOINT names; an adapter's base model is found by itself unless `base` names it.

    Raises UserError when nothing of the kind is there, with the checkpoints that are; when the base model of an adapter
    is not on this machine; and for a `base` beside a whole model.
    """
    folder = expand_home(name)
    if not folder.is_dir():
        _refuse_absent(name, folder)
        return _whole_model(Source(name, locate_model(name)), base)
    record = next((path for path in _record_places(folder) if path.is_file()), None)
    number = _CHECKPOINT.fullmatch(folder.name)
    step = int(number[1]) if number else None
    has_adapter, has_model = ((folder / file).is_file() for file in (ADAPTER_CONFIG, "config.json"))
    if not has_adapter and not has_model:
        raise UserError.single(f"MODEL {name}", "the folder holds neither a model nor an adapter", _instead(folder))
    if has_model:  # with an adapter beside it, this refuses the folder
        return _whole_model(Source(name, locate_model(name), None, record, step), base)
    adapter = read_adapter(folder.absolute())
    location = locate_model(base) if base is not None else _find_base(name, adapter, record)
    location = replace(location, adapter=adapter.folder)
    return Source(name, location, adapter, record, step, base_is_given=base is not None)


def _whole_model(source: Source, base: str | None) -> Source:
    if base is not None:
        what = f"is given, but {source.name} is a whole model"
        raise UserError.single(f"--base {base}", what, "leave --base out; it belongs to an adapter")
    return source


def _record_places(folder: Path) -> list[Path]:
    beside = [folder / RUN_RECORD]
    return [*beside, folder.absolute().parent / RUN_RECORD] if _CHECKPOINT.fullmatch(folder.name) else beside


def _refuse_absent(name: str, folder: Path) -> None:
    """Refuse a folder that is not there, where the one above it shows that a path was meant, not a hub id."""
    above = folder.parent
    if str(above) == "." or not above.is_dir() or folder.is_file():
        return
    found = list(_usable_folders(above))
    if found or _CHECKPOINT.fullmatch(folder.name):
        raise UserError.single(f"MODEL {name}", "there is no such folder", _list(found, above))


def _instead(folder: Path) -> str:
    found = list(_usable_folders(folder))
    if not found and (folder.parent / RUN_RECORD).is_file():  # a folder inside of a run's, such as predictions/
        return _list(list(_usable_folders(folder.parent)), folder.parent)
    return _list(found, folder)


def _list(found: list[Path], folder: Path) -> str:
    if not found:
        return f"no checkpoint was found in {folder} either; give a model's folder, a run's output folder, or a hub id"
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"found there: {', '.join(map(str, found[:_SHOWN]))}{more}"


def _usable_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders with a model or an adapter in them: this one, those below it, and their checkpoints."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not _CHECKPOINT.fullmatch(path.name))
    for place in (folder, *below):
        if any((place / file).is_file() for file in (ADAPTER_CONFIG, "config.json")):
            yield place
        yield from (checkpoint.path for checkpoint in find_checkpoints(place))


def _find_base(name: str, adapter: SavedAdapter, record: Path | None) -> ModelLocation:
    """Return an adapter's base model: as its config names it, else as the run's record does; a folder before a hub id.

    The config names an embedded model by its folder in the checkout that trained it, the record by its name.
    """
    names = [text for text in (adapter.base, _recorded_model(record)) if text]
    hub_id = None
    for text in names:
        try:
            location = locate_model(text)
        except UserError:
            continue
        if location.is_local:
            return location
        hub_id = hub_id or location
    if hub_id is not None:
        return hub_id
    if not names:
        raise UserError.single(f"MODEL {name}", "its adapter_config.json does not name its base model", _GIVE_BASE)
    what = f"its base model is not here any more: {' or '.join(dict.fromkeys(names))}"
    raise UserError.single(f"MODEL {name}", what, _GIVE_BASE)


def _recorded_model(record: Path | None) -> str:
    content = read_record(record) if record is not None else {}
    return str(content.get("model") or "")


def quantization_of_run(source: Source) -> Literal["nf4"] | None:
    """Return the form in which the run of an adapter kept its base model, as its record says; None: plain numbers."""
    if source.adapter is None or source.record is None:
        return None
    config = read_record(source.record).get("config")
    return "nf4" if isinstance(config, dict) and config.get("quantization") == "nf4" else None


def read_record(record: Path) -> dict[str, Any]:
    """Return the content of a `run.json`; empty where it cannot be read."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
