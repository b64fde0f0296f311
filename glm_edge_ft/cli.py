"""What the scripts share: arguments, exit codes, how errors are shown. Light: `--help` answers in under a second."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from glm_edge_ft import recipe
from glm_edge_ft.console import is_unicode, prepare_streams, show_failure, show_problems
from glm_edge_ft.distributed import is_main_process, report_failure
from glm_edge_ft.errors import (
    EXIT_DONE,
    EXIT_UNEXPECTED,
    EXIT_USER_ERROR,
    Problem,
    ProcessLost,
    RunStopped,
    UserError,
    shorten,
)
from glm_edge_ft.files import expand_home
from glm_edge_ft.run import RunRequest
from glm_edge_ft.training.termination import Terminated, end_helper_processes

DataDir = Annotated[
    Path,
    typer.Argument(
        metavar="DATA_DIR",
        parser=expand_home,
        help="Folder of the data files that the config names, e.g. data/demo with train.jsonl and dev.jsonl.",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a model, a hub id such as THUDM/glm-edge-1.5b-chat or THUDM/glm-edge-v-2b, or an embedded "
        "model: glm-edge-nano, glm-edge-v-nano.",
        show_default=False,
    ),
]
Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        parser=expand_home,
        help="YAML file with the settings of the run, e.g. configs/lora.yaml.",
        show_default=False,
    ),
]
Resume = Annotated[
    str | None,
    typer.Argument(
        metavar="RESUME",
        help="yes: continue from the newest whole checkpoint; a number, e.g. 600: from checkpoint-600; no or nothing: "
        "start afresh.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one value of the config, e.g. --set training_args.max_steps=20. May be given several times.",
        show_default=False,
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Check everything, print the data and memory report, train nothing, e.g. "
        "finetune.py data/demo glm-edge-nano configs/demo.yaml --check",
    ),
]
Preview = Annotated[
    int | None,
    typer.Option(
        "--preview",
        metavar="N",
        min=1,
        help="Print the first N training rows token by token, supervised ones marked, e.g. --preview 3.",
        show_default=False,
    ),
]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="PATH",
        parser=expand_home,
        help="With --check or --preview: write the same as JSON, e.g. --json report.json.",
        show_default=False,
    ),
]


def make_app(help_text: str, takes_images: bool) -> typer.Typer:
    """Return a script's command: its arguments and options, handed to the recipe.

    Args:
        help_text: what `--help` shows; each block after a line with a backslash and a b keeps its lines.
        takes_images: whether it trains vision models.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command(help=help_text, context_settings={"help_option_names": ["-h", "--help"]})
    def main(
        data_dir: DataDir,
        model: Model,
        config: Config,
        resume: Resume = None,
        overrides: Overrides = None,
        check: Check = False,
        preview: Preview = None,
        json_path: JsonPath = None,
    ) -> None:
        """Hand the command line to the recipe."""
        overridden = tuple(overrides or ())
        execute(RunRequest(data_dir, model, config, resume, overridden, check, preview, json_path, takes_images))

    return app


def execute(request: RunRequest) -> None:
    """Run the request and end the process with its exit code: 0 done, 2 the user's input is wrong, 1 anything else."""
    again = "; the same command with `yes` at its end continues from the last checkpoint"
    run_command(lambda: recipe.run(request), problems_end="; nothing was trained", stopped_end=again)


def run_command(action: Callable[[], None], problems_end: str = "", stopped_end: str = "") -> None:
    """Do `action` and end the process with its exit code, as `execute` does.

    Args:
        action: what the command does.
        problems_end: ends the line that counts the mistakes in the input.
        stopped_end: ends the line that Ctrl-C gives.
    """
    prepare_streams()
    # Read when torch is imported. Threads that wait busily for one another slow a CPU run tenfold and more as soon as
    # anything else wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = _run_and_report(action, problems_end, stopped_end)
    end_helper_processes()
    raise typer.Exit(code)


def _run_and_report(action: Callable[[], None], problems_end: str, stopped_end: str) -> int:
    try:
        _refuse_undecodable(sys.argv[1:])
        action()
    except UserError as error:
        show_problems(error.problems, problems_end)
        return EXIT_USER_ERROR
    except Terminated as error:
        _show_end(f"stopped: {error}")
        return EXIT_UNEXPECTED
    except RunStopped as error:
        show_failure(f"stopped: {error}", may_follow_another=isinstance(error, ProcessLost))
        return EXIT_UNEXPECTED
    except KeyboardInterrupt:
        _show_end(f"stopped by Ctrl-C{stopped_end}")
        return EXIT_UNEXPECTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whatever argument or key named it
            what = f"no file can have a name or a path as long as this ({len(str(error.filename)):,} characters)"
            show_problems([Problem(shorten(str(error.filename)), what, "correct the path")], problems_end)
            return EXIT_USER_ERROR
        text = f"{traceback.format_exc()}error: unexpected {type(error).__name__}: {error}"
        show_failure(text, may_follow_another=True)
        return EXIT_UNEXPECTED
    return EXIT_DONE


def _refuse_undecodable(arguments: Sequence[str]) -> None:
    """Raise UserError for each argument that has bytes which are no text; neither a tokenizer nor JSON takes them."""
    found = [argument for argument in arguments if not is_unicode(argument)]
    if found:
        fix = "write it in UTF-8; rename a file or folder of that name"
        raise UserError(Problem("command line", f"{os.fsencode(text)!r:.100} is not UTF-8", fix) for text in found)


def _show_end(text: str) -> None:
    """Print what a signal did; it reaches all ranks of a machine."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)
    report_failure()
