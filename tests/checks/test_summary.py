"""What `--check` says of replies and of the disk, and in its JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from glm_edge_ft import recipe
from glm_edge_ft.checks.disk import DiskNeed, advise_on_disk, describe_disk, estimate_disk
from glm_edge_ft.checks.preflight import check_inputs, prepare
from glm_edge_ft.checks.summary import TESTED_VERSIONS, note_untested_versions
from glm_edge_ft.data.dataset import build_dataset
from glm_edge_ft.data.replies import ReplyEnds, count_reply_ends
from glm_edge_ft.run import RunRequest
from tests.conftest import EncoderMaker
from tests.launch import REPOSITORY
from tests.runs import LORA, do_run, write_config


def row(*replies: str) -> dict[str, Any]:
    """Return a conversation with these replies."""
    messages = []
    for reply in replies:
        messages += [{"role": "user", "content": "hello"}, {"role": "assistant", "content": reply}]
    return {"messages": messages}


@pytest.mark.parametrize("template", ["glm", "glm-newline", "glm-literal", "chatml"])
def test_every_reply_is_counted_with_how_it_ends(tmp_path: Path, make_encoder: EncoderMaker, template: str) -> None:
    """M1, M2: two whole replies, one whole and one cut, one that is not learned, one alone that is cut."""
    rows = [row("fine", "I am"), row("fine", "today " * 40), row("fine", "fine"), row("today " * 40)]
    rows[2]["messages"][1]["loss"] = False
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    encoder = make_encoder(template, max_output_length=20)
    dataset, _ = build_dataset([path], encoder, cache_dir=tmp_path / "cache", progress=False)
    stops = encoder.reply_format.stop_ids
    assert count_reply_ends(dataset, stops) == ReplyEnds(replies=6, stopping=4, cut=2, first_other="")
    without_first = dataset.without({0: "left out"})
    assert count_reply_ends(without_first, stops) == ReplyEnds(replies=4, stopping=2, cut=2, first_other="")
    none = count_reply_ends(dataset, {0})  # of other stop ids
    assert (none.stopping, none.others, none.first_other) == (0, 4, "train.jsonl:1")


def test_check_tells_replies_and_disk(chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In words and as JSON: 18 rows, of which every second has two turns."""
    config, report = write_config(chat_folder / "output", max_steps=100, save_steps=10), chat_folder / "check.json"
    request = RunRequest(chat_folder / "data", str(chat_folder / "model"), config, check=True, json_path=report)
    recipe.run(request)
    said = capsys.readouterr().out
    assert "  learned replies                   27   each ends with a token on which generation stops" in said
    assert "disk: about " in said
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["data"]["train"]["replies"] == {
        "replies": 27,
        "stopping": 27,
        "cut": 0,
        "first_other": "",
        "others": 0,
    }
    assert written["disk_bytes"]["checkpoints"] == 10
    assert written["disk_bytes"]["fits"] is True


@pytest.mark.parametrize("peft", [LORA, None], ids=["lora", "full"])
def test_the_size_of_a_checkpoint_is_known_before(chat_folder: Path, peft: dict[str, Any] | None) -> None:
    """Estimated within the fixed allowance for small files."""
    request = RunRequest(
        chat_folder / "data",
        str(chat_folder / "model"),
        write_config(chat_folder / "output", peft=peft, max_steps=2, save_steps=2),
    )
    need = estimate_disk(prepare(check_inputs(request)))
    output = do_run(chat_folder / "output", chat_folder / "data", chat_folder / "model", peft=peft, max_steps=2)
    size = sum(path.stat().st_size for path in (output / "checkpoint-2").iterdir())
    assert size <= need.checkpoint <= size + 100_000
    assert need.checkpoints == 1


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"max_steps": 100, "save_steps": 30}, 3),
        ({"max_steps": 100, "save_steps": 0.25}, 4),
        ({"max_steps": 100, "save_steps": 30, "save_total_limit": 1}, 2),
        ({"max_steps": -1, "num_train_epochs": 4, "save_strategy": "epoch"}, 4),
        ({"max_steps": 100, "save_strategy": "no"}, 0),
    ],
)
def test_checkpoints_are_counted(chat_folder: Path, settings: dict[str, Any], count: int) -> None:
    """By steps, fractions and epochs, with a limit: the new one is written before an old one goes."""
    config = write_config(chat_folder / "output", **settings)
    need = estimate_disk(prepare(check_inputs(RunRequest(chat_folder / "data", str(chat_folder / "model"), config))))
    assert need.checkpoints == count


def test_what_does_not_fit_is_said_with_what_to_write() -> None:
    """How many would fit, or that none does."""
    need = DiskNeed(checkpoint=10**9, checkpoints=20, final=10**9, free=8 * 10**9, limit=None)
    assert describe_disk(need) == (
        "disk: about 21.0 GB (20 checkpoints of 1.0 GB at a time, and the final model); 8.0 GB are free"
    )
    assert advise_on_disk(need) == (
        "disk: about 21.0 GB are more than the 8.0 GB that are free: training_args.save_total_limit null -> 6, "
        "or make room"
    )
    way = "make room, or name another training_args.output_dir"
    assert advise_on_disk(dataclasses.replace(need, free=10**9)) == (
        f"disk: about 21.0 GB are more than the 1.0 GB that are free: {way}"
    )
    assert advise_on_disk(dataclasses.replace(need, checkpoints=7)) is None


def test_other_versions_than_the_tested_ones_are_one_notice() -> None:
    """The tested ones are those of requirements.txt; this package uses private parts of these libraries."""
    pinned = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {f"{name}=={version}" for name, version in TESTED_VERSIONS.items()} <= set(pinned)
    assert note_untested_versions(TESTED_VERSIONS) == ""
    notice = note_untested_versions(TESTED_VERSIONS | {"peft": "9.0.0"})
    assert notice.startswith(f"peft 9.0.0 instead of {TESTED_VERSIONS['peft']}: ")
    assert "requirements.txt" in notice
    assert "\n" not in notice
