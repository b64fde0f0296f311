"""Whether a checkpoint of so many processes can go on in a run of so many others."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_edge_ft.checks.processes import Processes, note_processes, plan_processes, read_processes, write_processes
from glm_edge_ft.checks.resume import compare_models, compare_processes, note_versions
from glm_edge_ft.model.checkpoint import ModelLocation
from glm_edge_ft.model.weight_files import weights_fingerprint

CHECKPOINT = Path("output/checkpoint-4")
ZERO_2 = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}


def refusal(before: Processes, now: Processes, is_adapter: bool = True) -> str:
    """Return the one problem that stands against going on, or "" where nothing does."""
    problems = compare_processes(CHECKPOINT, before, now, is_adapter)
    assert len(problems) <= 1
    return str(problems[0]) if problems else ""


def test_an_optimizer_in_another_form_is_refused_with_the_ways_out() -> None:
    """R5: ZeRO to none, none to ZeRO, ZeRO-2 to ZeRO-3, with both values and what to write."""
    none, two, three = Processes(2, None, {}), Processes(2, 2, {}), Processes(2, 3, {})
    assert refusal(two, none) == (
        "training_args.deepspeed: output/checkpoint-4 was written by 2 processes with ZeRO-2, this run works without "
        "DeepSpeed, which stores the optimizer in another form\n"
        "    -> name a file of stage 2, or start afresh (RESUME no)"
    )
    assert refusal(none, three, is_adapter=False) == (
        "training_args.deepspeed: output/checkpoint-4 was written by 2 processes without DeepSpeed, this run works "
        "with ZeRO-3, which stores the optimizer in another form\n"
        "    -> leave the key out, or start afresh (RESUME no), or from its weights: MODEL output/checkpoint-4, "
        "another output_dir, no RESUME"
    )
    assert "written by 2 processes with ZeRO-2, this run works with ZeRO-3" in refusal(two, three)
    assert "name a file of stage 3" in refusal(three, two)


def test_deepspeed_needs_the_number_of_processes_that_wrote_the_checkpoint() -> None:
    """R5: each holds a part of the optimizer."""
    assert refusal(Processes(2, 3), Processes(4, 3)) == (
        "number of processes: output/checkpoint-4 was written by 2 processes with ZeRO-3, each with its part of the "
        "optimizer; this run has 4\n"
        "    -> start it with 2 (torchrun --nproc_per_node, --nnodes), or start afresh (RESUME no)"
    )
    assert refusal(Processes(2, 3), Processes(2, 3)) == ""


def test_a_setting_that_cuts_the_optimizer_otherwise_is_refused() -> None:
    """R5: sorted or not, the parts have the same size, and would be read into the wrong weights without a word."""
    before = plan_processes(2, ZERO_2)
    now = plan_processes(2, {"zero_optimization": {"stage": 2}})
    assert "zero_optimization.round_robin_gradients is false, but output/checkpoint-4 was written with true" in refusal(
        before, now
    )
    offloaded = {"zero_optimization": {**ZERO_2["zero_optimization"], "offload_optimizer": {"device": "cpu"}}}
    assert "offload_optimizer is" in refusal(before, plan_processes(2, offloaded))
    assert refusal(before, before) == ""
    assert refusal(Processes(2, 2), now) == ""  # a checkpoint without the record says nothing of it


def test_without_deepspeed_any_number_goes_on_and_says_what_a_step_is_now() -> None:
    """R5: with the accumulation that keeps the step as it was."""
    two, one = Processes(2, None, {}), Processes(1, None, {})
    assert refusal(two, one) == ""
    batch = {"per_device_train_batch_size": 4}
    (said,) = note_processes(two, one, batch, batch)
    assert said == (
        "the checkpoint was written by 2 processes, this run has 1: a step takes 4 conversations instead of 8, and the "
        "position in the data is counted in today's; training_args.gradient_accumulation_steps 2 keeps 8"
    )
    (said,) = note_processes(two, one, batch, batch | {"gradient_accumulation_steps": 2})
    assert said.endswith("a step takes 8 conversations as before; dropout draws other numbers")
    (said,) = note_processes(one, Processes(8, None, {}), batch, batch)
    assert said.endswith("change batch size and accumulation to keep 4")
    assert note_processes(two, two, batch, batch) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["rng_state.pth", "optimizer.pt"], Processes(1, None)),
        (["rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"], Processes(2, None)),
        (["optimizer.pt"], Processes(None, None)),
        (["global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], Processes(1, 2)),
        (
            [
                f"global_step4/zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
                for rank in (0, 1)
                for kind in ("model", "optim")
            ],
            Processes(2, 3),
        ),
        (["global_step4/mp_rank_00_model_states.pt", "rng_state_0.pth", "rng_state_1.pth"], Processes(2, 0)),
    ],
)
def test_a_checkpoint_without_a_record_is_known_by_its_files(
    tmp_path: Path, files: list[str], expected: Processes
) -> None:
    """R5: checkpoints from before the record was kept."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert read_processes(tmp_path) == expected


def test_the_record_wins_over_the_files(tmp_path: Path) -> None:
    """R5: it also tells what the names cannot, such as stage 1."""
    (tmp_path / "global_step4").mkdir()
    planned = plan_processes(4, {"zero_optimization": {"stage": 1}})
    write_processes(tmp_path, planned)
    assert read_processes(tmp_path) == planned
    assert planned == Processes(4, 1, {"offload_optimizer": "none", "round_robin_gradients": False})


def model_at(folder: Path, weights: bytes) -> ModelLocation:
    """Return the location of a model with these weights."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    return ModelLocation(str(folder), str(folder), is_local=True)


def test_a_model_is_known_by_its_weights(tmp_path: Path) -> None:
    """R5: a folder that was renamed goes on with a line; other weights under the same name are refused."""
    first, second = model_at(tmp_path / "a", b"x" * 200_000), model_at(tmp_path / "b", b"x" * 199_999 + b"y")
    record = {"model": "old", "model_fingerprint": weights_fingerprint(first)}
    notice = f"MODEL old -> {first.name}: the same weights under another name"
    assert compare_models(CHECKPOINT, record, first) == ([], [notice])
    assert compare_models(CHECKPOINT, record | {"model": first.name}, first) == ([], [])
    (problem,), _ = compare_models(CHECKPOINT, record | {"model": second.name}, second)
    assert problem.what == f"output/checkpoint-4 was trained from {second.name}, whose weights were others"
    assert problem.fix == "give that model, or start afresh (RESUME no)"


def test_without_its_weights_a_model_is_known_by_its_name() -> None:
    """R5: a hub id that is not on this machine, and records of before."""
    hub = ModelLocation("owner/model", "owner/model", is_local=False)
    assert compare_models(CHECKPOINT, {"model": "owner/model"}, hub) == ([], [])
    (problem,), _ = compare_models(CHECKPOINT, {"model": "owner/other"}, hub)
    assert problem.what == "output/checkpoint-4 was trained from owner/other"


def test_other_versions_are_said() -> None:
    """The continuation may have other bits."""
    old = {"torch": "2.12.0", "peft": "0.21.2", "python": "3.11"}
    assert note_versions(old, {"torch": "2.13.0", "peft": "0.21.2", "python": "3.12"}) == [
        "since the checkpoint was written: torch 2.12.0 -> 2.13.0; the run goes on, perhaps not with the same bits"
    ]
    assert note_versions(old, old) == []
