"""The launcher's variables, and how all processes of a run end where one of them fails, on one machine and on two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from glm_edge_ft.__main__ import main
from glm_edge_ft.checks.machines import check_same_on_all_machines
from glm_edge_ft.distributed import Launch, barrier, check_launcher, explain_peer_failure, launch, report_failure
from glm_edge_ft.errors import ProcessLost
from tests.launch import REPOSITORY, end_all, start_machines, start_script

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
OF_TORCHRUN = {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2"}


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Set these variables of a launcher, and no other."""
    for name in (*WHOLE, *OF_TORCHRUN, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables", [{}, WHOLE, WHOLE | OF_TORCHRUN, WHOLE | {"PMI_SIZE": "4"}, {"PMI_SIZE": "1"}])
def test_a_whole_set_of_variables_is_honoured(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """K4: of torchrun, and of launchers that set less than it, on MPI too."""
    set_variables(monkeypatch, variables)
    assert check_launcher() == []
    assert (launch().rank, launch().world_size) == ((1, 4) if "RANK" in variables else (0, 1))
    assert launch().local_world_size == int(variables.get("LOCAL_WORLD_SIZE", launch().world_size))


@pytest.mark.parametrize(
    "variables",
    [
        *({name: value} for name, value in (WHOLE | OF_TORCHRUN).items()),
        *({other: value for other, value in WHOLE.items() if other != name} for name in WHOLE),
        *(WHOLE | {name: value} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") for value in ("x", "-1", "", "1.0")),
        WHOLE | {"RANK": "4"},
        WHOLE | {"WORLD_SIZE": "0"},
        WHOLE | {"LOCAL_RANK": "4"},
        WHOLE | {"LOCAL_WORLD_SIZE": "1"},
        WHOLE | {"LOCAL_WORLD_SIZE": "8"},
        WHOLE | OF_TORCHRUN | {"GROUP_RANK": "2"},
        WHOLE | {"MASTER_PORT": "0"},
        WHOLE | {"MASTER_PORT": "295000"},
        WHOLE | {"MASTER_ADDR": " "},
        WHOLE | {"WORLD_SIZE": "9" * 5000},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_variables_that_no_launcher_sets_so_are_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """K4: some without the others, and values that cannot be; libraries would wait for processes that do not exist."""
    set_variables(monkeypatch, variables)
    (problem,) = check_launcher()
    assert next(iter(variables)) in problem.where
    assert "torchrun" in problem.fix


def test_a_command_of_one_process_works_with_what_was_left_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """K4: in a pod that has WORLD_SIZE set, a model can still be talked to; nothing is waited for."""
    set_variables(monkeypatch, {"WORLD_SIZE": "4", "RANK": "3"})
    main()
    assert launch() == Launch()
    assert launch().launcher == "none"


# Rank 1, or all ranks, fail at a stage of the run, while the others wait for them.
SCRIPT = """
import os, sys, time, typer
from pathlib import Path
from glm_edge_ft.checks import machines
from glm_edge_ft.cli import run_command
from glm_edge_ft.distributed import barrier, explain_peer_failure, init_cpu_process_group
from glm_edge_ft.errors import RunStopped, UserError

machines.SECONDS_TO_SEE_A_FILE = 1
kind, who, stage, folder = sys.argv[1:]

def fail_at(now):
    if now != stage or (who == "one" and os.environ["RANK"] != "1"):
        return
    if kind == "silent":
        time.sleep(3600)
    if kind == "dies":
        os.kill(os.getpid(), 9)
    if kind == "input":
        raise UserError.single("cat.png", "is no image", "replace it")
    raise {"stop": RunStopped("the loss is nan"), "crash": ZeroDivisionError("division by zero")}[kind]

def act():
    import torch
    for now in ("start", "encoding"):
        fail_at(now)
        barrier()
    init_cpu_process_group(None, 3 if kind == "silent" else 60)
    fail_at("training")
    with explain_peer_failure(lambda: "start again"):
        machines.check_same_on_all_machines(Path(folder), None, {})
        torch.distributed.barrier()

app = typer.Typer()
app.command(context_settings={"allow_extra_args": True})(lambda: run_command(act))
app()
"""
INPUT = "error: 1 problem in the input\ncat.png: is no image\n    -> replace it\n"
FAILED = "stopped: process 1 of 2 failed; its output, perhaps on another machine, says why"
GONE = "stopped: another process of the run is gone, or does not answer ("


def end_of(folder: Path, kind: str, who: str, stage: str, machines: Mapping[str, Path] | None = None) -> list[str]:
    """Run SCRIPT in two processes, or on machines with these output folders; return what each launcher printed."""
    script, log, environment = folder / "script.py", folder / "log", {"PYTHONPATH": str(REPOSITORY)}
    script.write_text(SCRIPT, encoding="utf-8")
    if machines is None:
        arguments = [kind, who, stage, str(folder)]
        return [start_script(script, arguments, log, processes=2, environment=environment).end(code=1)]
    runs = [[kind, who, stage, str(output)] for output in machines.values()]
    return end_all(start_machines(script, runs, log, environment=environment), code=1)  # torchrun's own


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("input", INPUT),
        ("stop", "stopped: the loss is nan\n"),
        ("crash", "error: unexpected ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_rank_that_fails_alone_ends_all_with_its_message(tmp_path: Path, kind: str, message: str) -> None:
    """T7: rank 0, whose connection to it is lost, adds none of its own."""
    (said,) = end_of(tmp_path, kind, "one", "training")
    assert said.count(f"{message}(rank 1 of 2)\n") == 1
    assert "Connection closed" not in said


@pytest.mark.parametrize(("kind", "message"), [("input", INPUT), ("crash", "error: unexpected")])
def test_what_all_ranks_have_in_common_is_said_once(tmp_path: Path, kind: str, message: str) -> None:
    """T7: whichever of them comes first."""
    (said,) = end_of(tmp_path, kind, "all", "training")
    assert said.count(message) == 1


def test_a_process_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    """T7: on CPUs too `ddp_timeout` says when."""
    (said,) = end_of(tmp_path, "silent", "one", "training")
    assert said.count(f"{GONE}Timed out waiting 3000ms for ") == 1


@pytest.mark.parametrize(
    ("kind", "stage", "own", "others"),
    [
        ("input", "start", INPUT, FAILED),
        (
            "input",
            "encoding",
            INPUT,
            FAILED,
        ),
        ("dies", "encoding", "", GONE),
    ],
)
def test_a_failure_on_one_machine_ends_the_other_at_once(
    tmp_path: Path, kind: str, stage: str, own: str, others: str
) -> None:
    """T7: it would wait in a collective for half an hour; torchrun knows of its own machine alone."""
    said = end_of(tmp_path, kind, "one", stage, {"first": tmp_path, "second": tmp_path})
    assert sorted(text.count(others) for text in said) == [0, 1]
    assert sorted(text.count(own) > 0 for text in said if others not in text) == [True]


def test_an_output_folder_that_is_not_shared_is_refused_on_both_machines(tmp_path: Path) -> None:
    """R3: each process writes its part of a checkpoint there, and looks for it there."""
    folders = {name: tmp_path / name for name in ("first", "second")}
    for folder in folders.values():
        folder.mkdir()
    for said in end_of(tmp_path, "none", "one", "never", folders):
        assert "where process 0 writes\n    -> name a folder that all machines share" in said
    assert [list(folder.iterdir()) for folder in folders.values()] == [[], []]


def test_one_machine_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """T7: torchrun itself ends all its processes; no connection is made."""
    set_variables(monkeypatch, {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    barrier()
    report_failure()
    check_same_on_all_machines(tmp_path, None, {})
    assert list(tmp_path.iterdir()) == []


GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:5. This is "
    "typically caused by a remote worker crashing."
)


def test_a_closed_connection_is_explained() -> None:
    """T7, R1: what happened, and what to do."""
    with pytest.raises(ProcessLost) as caught, explain_peer_failure(lambda: "start again"):
        raise RuntimeError(GLOO)
    assert str(caught.value) == (
        "another process of the run is gone, or does not answer (Connection closed by peer [10.0.0.2]:5); its output, "
        "perhaps on another machine, says why; start again"
    )


def test_an_error_of_this_process_stays_what_it_is() -> None:
    """T7: it is shown with its traceback."""
    with pytest.raises(RuntimeError, match="the size of tensor a"), explain_peer_failure(lambda: ""):
        raise RuntimeError("the size of tensor a must match")
