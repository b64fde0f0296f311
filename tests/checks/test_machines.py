"""Machines that differ in checkpoint or data; folders that are not shared: see tests/test_distributed.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft.checks.machines import MachineState, compare_machines
from glm_edge_ft.errors import Problem, UserError

FIRST = MachineState("one", "checkpoint-4", {"train": [1204, 7], "val": [5, 3]}, sees_folder=True)


@pytest.mark.parametrize(
    ("changes", "places", "text"),
    [
        ({}, [], ""),
        ({"resume": None}, ["RESUME"], "machine two found no checkpoint in out, machine one checkpoint-4"),
        (
            {"rows": {"train": [1203, 8], "val": [5, 4]}},
            ["DATA_DIR: train", "DATA_DIR: val"],
            "1,203 rows on machine two, 1,204 on machine one",
        ),
    ],
)
def test_machines_that_differ_are_refused(changes: dict[str, Any], places: list[str], text: str) -> None:
    """R3, K1, T3: a network folder may show the newest checkpoint late; other rows would be other steps."""
    problems: tuple[Problem, ...] = ()
    try:
        compare_machines([FIRST, replace(FIRST, machine="two", **changes)], Path("out"))
    except UserError as error:
        problems = error.problems
    assert [problem.where for problem in problems] == places
    assert text in "".join(problem.what for problem in problems)
