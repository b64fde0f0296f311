"""Keys by which data files say what is learned: `loss` here, other names in other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from glm_edge_ft.data.parts import shown
from glm_edge_ft.errors import ProblemList

LEARNED_KEYS = ("loss", "train", "training", "trainable", "weight", "loss_mask", "loss_scale", "loss_weight")
"""True or 1: learned; false or 0: not. OpenAI and Mistral write `weight`, axolotl `train`, ms-swift `loss`."""
_INVERTED = ("masked",)  # torchtune: true is not learned
_DETAILS = ("train_detail", "training_detail")  # axolotl: parts of a turn by their characters
DECISION_KEYS = frozenset((*LEARNED_KEYS, *_INVERTED, *_DETAILS))
"""Every key that `read_learned` reads; none of them is for the chat template."""


def read_learned(where: str, turn: Mapping[str, Any], role: str | None, problems: ProblemList) -> bool | None:
    """Return whether a turn says that it is learned; None where it says nothing.

    Args:
        where: the place of the turn.
        turn: its keys. A null says nothing.
        role: who speaks; None if that is unknown.
        problems: takes values that cannot be honoured, and turns that are no replies but say that they are learned.
    """
    if DECISION_KEYS.isdisjoint(turn):
        return None
    said: dict[str, bool] = {}
    for key in sorted(DECISION_KEYS & turn.keys()):
        value = turn[key]
        if value is None or (key in _DETAILS and value == []):
            continue
        if key in _DETAILS:
            problems.add(where, f"{key!r} marks parts of a turn", "a turn is learned whole or not at all: write 'loss'")
        elif isinstance(value, bool | int | float) and value in (0, 1):
            said[key] = bool(value) is not (key in _INVERTED)
        elif isinstance(value, int | float):
            what = f"{key!r} is {value}: weights other than 0 and 1 are not supported"
            problems.add(where, what, "write 0 or 1, or repeat the row")
        else:
            problems.add(where, f"{key!r} must be true or false, it is {shown(value)}", "write false to leave it out")
    if len(set(said.values())) > 1:
        problems.add(where, f"{' and '.join(map(repr, said))} contradict each other", "keep one of them")
    learned = all(said.values()) if said else None
    if learned and role is not None and role != "assistant":
        key = next(iter(said))
        what = f"{key!r}: {json.dumps(turn[key])} on a {role} message"
        problems.add(where, what, "only assistant turns are learned: remove the key")
    return learned
