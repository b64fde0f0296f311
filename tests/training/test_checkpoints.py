"""RESUME and wholeness: what is taken, what is refused, what is said; a checkpoint is whole or invisible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glm_edge_ft.errors import Problem, RunStopped, UserError
from glm_edge_ft.training.checkpoints import (
    ResumePlan,
    find_checkpoints,
    publish,
    remove_old_checkpoints,
    resolve_resume,
    set_aside,
    set_aside_earlier_run,
    staging_folder,
)

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def fill(folder: Path, step: int) -> Path:
    """Write what a checkpoint of a Trainer holds, without a manifest."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(3)}, folder / "adapter_model.safetensors")
    (folder / "optimizer.pt").write_bytes(b"optimizer")
    (folder / "scheduler.pt").write_bytes(b"scheduler")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
    return folder


def save(output: Path, step: int) -> Path:
    """Write a checkpoint as this project does."""
    return publish(fill(staging_folder(output) / f"checkpoint-{step}", step), output)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return an output folder with the whole checkpoints 2, 4 and 10."""
    for step in (10, 2, 4):
        save(tmp_path / "output", step)
    return tmp_path / "output"


def test_checkpoints_are_ordered_by_their_number(output: Path) -> None:
    """10 comes after 4, whatever the names and times say; other folders are none."""
    (output / "checkpoint-x").mkdir()
    (output / "checkpoint-7").write_text("a file", encoding="utf-8")
    assert [(found.step, found.defect) for found in find_checkpoints(output)] == [(2, ""), (4, ""), (10, "")]


@pytest.mark.parametrize(
    ("word", "step"),
    [
        *((word, 10) for word in ("yes", "YES", "y", "true")),
        *((word, 4) for word in ("4", "checkpoint-4", " 4 ")),
        *((word, None) for word in (None, "", "no", "No", "n", "N", "false")),
    ],
)
def test_resume_takes_the_newest_the_named_or_none(output: Path, word: str | None, step: int | None) -> None:
    """R1, R2: without a word about others when the newest is whole; `no` without a word at all."""
    path = output / f"checkpoint-{step}" if step else None
    assert resolve_resume(word, output) == ResumePlan(path, f"continuing from {path}" if path else "")


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lost_a_file_is_passed_over(output: Path, name: str) -> None:
    """R1: killed while saving, or copied in part: `yes` goes on from the one before and says so."""
    (output / "checkpoint-10" / name).unlink()
    plan = resolve_resume("yes", output)
    assert plan.path == output / "checkpoint-4"
    assert plan.notice.endswith(f"passed over checkpoint-10 ({name} is missing)")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_cut_file_is_found(tmp_path: Path, name: str, with_manifest: bool) -> None:
    """R1: by the manifest's sizes, and where there is none by what the file itself says or by being empty."""
    folder = save(tmp_path, 2) if with_manifest else fill(tmp_path / "checkpoint-2", 2)
    content = (folder / name).read_bytes()
    keep = 0 if name.endswith(".pt") else len(content) - 1
    (folder / name).write_bytes(content[:keep])
    (found,) = find_checkpoints(tmp_path)
    assert found.defect.startswith(name)
    assert resolve_resume("yes", tmp_path).path is None


def test_a_checkpoint_without_manifest_is_taken_when_all_is_there(tmp_path: Path) -> None:
    """As plain transformers writes it."""
    fill(tmp_path / "checkpoint-2", 2)
    assert resolve_resume("2", tmp_path).path == tmp_path / "checkpoint-2"


def refusal(word: str, output: Path) -> Problem:
    """Return the problem that RESUME is refused for."""
    with pytest.raises(UserError) as caught:
        resolve_resume(word, output)
    (problem,) = caught.value.problems
    assert problem.where == f"RESUME {word}"
    return problem


def test_weights_that_are_missing_altogether_are_said(tmp_path: Path) -> None:
    """A folder that holds only the state."""
    (fill(tmp_path / "checkpoint-2", 2) / "adapter_model.safetensors").unlink()
    assert refusal("2", tmp_path).what.endswith("checkpoint-2 is not whole: its weights are missing")


def test_a_renamed_checkpoint_is_not_whole(output: Path) -> None:
    """Its state says another step than its name."""
    (output / "checkpoint-10").rename(output / "checkpoint-77")
    assert "checkpoint-77 is not whole: its state says step 10" in refusal("77", output).what


def test_a_checkpoint_of_the_model_alone_cannot_be_continued_from(tmp_path: Path) -> None:
    """`save_only_model` leaves no optimizer: going on from it would restart the learning rate in silence."""
    staged = fill(staging_folder(tmp_path) / "checkpoint-2", 2)
    for name in ("optimizer.pt", "scheduler.pt"):
        (staged / name).unlink()
    publish(staged, tmp_path)
    assert refusal("2", tmp_path).what.endswith("is not whole: optimizer.pt is missing")


@pytest.mark.parametrize("step", [99, 10])
def test_a_number_that_is_not_there_or_not_whole_is_refused_with_the_list(output: Path, step: int) -> None:
    """R1, R2: it is not silently replaced by another, and only the whole ones are offered."""
    broken = output / "checkpoint-10"
    (broken / "optimizer.pt").unlink()
    problem = refusal(str(step), output)
    absent = f"there is no checkpoint-99 in {output}"
    assert problem.what == (absent if step == 99 else f"{broken} is not whole: optimizer.pt is missing")
    assert problem.fix == "whole checkpoints: 2, 4"


@pytest.mark.parametrize("word", ["latest", "-1", "4.0", "yes please", "./output/checkpoint-4"])
def test_other_words_are_refused(output: Path, word: str) -> None:
    """R2: neither yes, no nor a number."""
    assert refusal(word, output).what == "is neither yes, no nor a checkpoint number"


def test_a_random_state_is_no_part_of_wholeness(tmp_path: Path) -> None:
    """R6: the run says that it is not bit-exact, and goes on."""
    staged = fill(staging_folder(tmp_path) / "checkpoint-2", 2)
    (staged / "rng_state.pth").write_bytes(b"random")
    folder = publish(staged, tmp_path)
    (folder / "rng_state.pth").write_bytes(b"")
    assert resolve_resume("2", tmp_path).path == folder


def test_yes_says_where_an_earlier_run_was_set_aside(output: Path) -> None:
    """A fresh start moved the checkpoints; `yes` then finds none, and names them."""
    set_aside_earlier_run(output)
    plan = resolve_resume("yes", output)
    assert plan.path is None
    assert f"(those of an earlier run are in {output / 'earlier' / '1'})" in plan.notice


def test_yes_before_any_checkpoint_is_a_fresh_start_with_a_notice(tmp_path: Path) -> None:
    """R2."""
    plan = resolve_resume("yes", tmp_path / "nothing")
    assert plan.path is None
    assert plan.notice == f"there is no checkpoint in {tmp_path / 'nothing'} yet: starting from the beginning"


def test_publishing_replaces_a_checkpoint_of_the_same_step(output: Path) -> None:
    """A run resumed from before it writes it anew."""
    (output / "checkpoint-10" / "extra").write_text("old", encoding="utf-8")
    save(output, 10)
    assert not (output / "checkpoint-10" / "extra").exists()
    assert [found.step for found in find_checkpoints(output)] == [2, 4, 10]
    assert not staging_folder(output).exists()


def left(output: Path) -> list[tuple[int, str]]:
    """Return the steps that are there, with what is wrong with them."""
    return [(found.step, found.defect) for found in find_checkpoints(output)]


@pytest.mark.fault(by_default=True)
def test_old_checkpoints_go_by_their_step_not_by_their_time(output: Path) -> None:
    """A clock that was moved back; nothing half removed stays."""
    for step, time in ((2, 3e9), (4, 2e9), (10, 1e9)):
        os.utime(output / f"checkpoint-{step}", (time, time))
    remove_old_checkpoints(output, 2, None)
    assert left(output) == [(4, ""), (10, "")]
    assert not staging_folder(output).exists()


def test_the_only_whole_checkpoint_is_never_removed_for_a_broken_one(output: Path) -> None:
    """R1: resumed from 4 since 10 is broken; after step 5 a limit of one leaves 5, and 10 counts for nothing."""
    (output / "checkpoint-10" / "optimizer.pt").write_bytes(b"")
    save(output, 5)
    remove_old_checkpoints(output, 1, None)
    assert left(output) == [(5, ""), (10, "optimizer.pt is empty")]


def test_broken_ones_that_are_older_go_first(output: Path) -> None:
    """What a process that was killed while it removed a checkpoint left behind, in earlier versions."""
    (output / "checkpoint-4" / "trainer_state.json").unlink()
    remove_old_checkpoints(output, 2, None)
    assert left(output) == [(2, ""), (10, "")]


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [2, 10]), (2, [2, 10]), (3, [2, 4, 10]), (None, [2, 4, 10]), (0, [2, 4, 10])]
)
def test_the_best_checkpoint_stays(output: Path, limit: int | None, kept: list[int]) -> None:
    """C8: beside the newest one, also where the limit has room for one alone."""
    remove_old_checkpoints(output, limit, 2)
    assert [step for step, _ in left(output)] == kept


def test_a_checkpoint_that_is_not_what_was_written_gets_no_name(tmp_path: Path) -> None:
    """R1: its weights were cut on the way to the disk."""
    staged = fill(staging_folder(tmp_path) / "checkpoint-2", 2)
    weights = staged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(
        RunStopped, match=r"checkpoint-2 could not be written whole \(adapter_model.safetensors is cut or damaged"
    ):
        publish(staged, tmp_path)
    assert left(tmp_path) == []


def test_a_staged_checkpoint_is_invisible(output: Path) -> None:
    """R1: what is being written counts for nothing."""
    fill(staging_folder(output) / "checkpoint-12", 12)
    assert [found.step for found in find_checkpoints(output)] == [2, 4, 10]


def test_later_checkpoints_are_set_aside_together(output: Path) -> None:
    """Those after the one that is resumed from; each time into a new folder."""
    assert set_aside(output, output / "checkpoint-2") == output / "earlier" / "1"
    assert sorted(path.name for path in (output / "earlier/1").iterdir()) == ["checkpoint-10", "checkpoint-4"]
    assert set_aside(output, output / "checkpoint-2") is None
    save(output, 6)
    assert set_aside(output, output / "checkpoint-2") == output / "earlier" / "2"


def test_a_folder_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    """No run was there: a config.json of something else stays where it is."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert set_aside_earlier_run(tmp_path) is None
    save(tmp_path, 2)
    set_aside_earlier_run(tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert not (tmp_path / "checkpoint-2").exists()


def test_the_module_needs_nothing_heavy() -> None:
    """RESUME is checked before torch is imported."""
    program = (
        "import sys, glm_edge_ft.training.checkpoints; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
