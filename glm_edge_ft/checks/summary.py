"""What `--check` prints, and writes as JSON: data, replies, model, memory, disk, and where the run would go on from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.disk import advise_on_disk, describe_disk, disk_facts, look_at_disk
from glm_edge_ft.checks.memory import advise, describe_memory, look_at_memory, run_memory_facts
from glm_edge_ft.console import is_main_process, show, show_notice
from glm_edge_ft.run_record import describe_model, model_facts, write_json

if TYPE_CHECKING:
    from glm_edge_ft.data.replies import ReplyEnds
    from glm_edge_ft.run import Prepared


def show_check(prepared: Prepared) -> None:
    """Print the report; write it as JSON where `--json` says. Rank 0 speaks, and it alone looks at memory and disk."""
    if not is_main_process():
        return
    resume = prepared.plan.resume
    report = {
        "data": {split: _show_split(prepared, split) for split in prepared.datasets},
        "model": {**model_facts(prepared), "memory_bytes": _show_memory(prepared)},
        "disk_bytes": _show_disk(prepared),
        "resume_from": str(resume.path) if resume.path else None,
    }
    if resume.notice:
        show_notice(resume.notice)
    write_json(prepared.plan.request.json_path, report)
    show("check passed: nothing was trained, no weights were read")


def _show_split(prepared: Prepared, split: str) -> dict[str, Any]:
    from glm_edge_ft.data.replies import count_reply_ends
    from glm_edge_ft.data.report import format_report

    report = prepared.datasets[split].report
    show(format_report(report, f"{split}: {prepared.plan.data_files[split]}"))
    replies = count_reply_ends(prepared.datasets[split], prepared.checkpoint.stop_ids)
    show(f"  {describe_replies(replies)}")
    if replies.others:
        show_notice(
            f"{split}: {replies.others:,} learned replies end without a token on which generation stops, first in "
            f"{replies.first_other}: the tuned model would not stop after such a reply"
        )
    return {**report.to_json(), "replies": replies.to_json()}


def describe_replies(replies: ReplyEnds) -> str:
    """Return one line: how many replies are learned, and how they end."""
    count = f"{'learned replies':<22}{replies.replies:>14,}"
    if replies.stopping == replies.replies:
        return f"{count}   each ends with a token on which generation stops"
    cut = f", {replies.cut:,} were cut by max_output_length" if replies.cut else ""
    return f"{count}   {replies.stopping:,} end with a stop token{cut}"


def _show_memory(prepared: Prepared) -> dict[str, Any]:
    show(describe_model(prepared))
    memory = look_at_memory(prepared)
    show(describe_memory(memory))
    for notice in advise(memory, prepared):
        show_notice(notice)
    return run_memory_facts(memory)


def _show_disk(prepared: Prepared) -> dict[str, Any]:
    need = look_at_disk(prepared)
    show(describe_disk(need))
    if notice := advise_on_disk(need):
        show_notice(notice)
    return disk_facts(need)
