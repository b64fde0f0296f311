"""Arguments and exit codes of all commands, and how errors are shown; `--help` answers in under a second."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

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


def argument(metavar: str, text: str, **settings: Any) -> Any:
    """Return a command's argument without a default."""
    return typer.Argument(metavar=metavar, help=text, show_default=False, **settings)


def option(flag: str, metavar: str, text: str, show_default: bool = False, **settings: Any) -> Any:
    """Return a command's option."""
    return typer.Option(flag, metavar=metavar, help=text, show_default=show_default, **settings)


DATA_DIR = "Folder of the data files that the config names, e.g. data/demo with train.jsonl and dev.jsonl."
MODEL = (
    "Folder of a model, a hub id such as THUDM/glm-edge-1.5b-chat or THUDM/glm-edge-v-2b, or an embedded model: "
    "glm-edge-nano, glm-edge-v-nano."
)
CONFIG = "YAML file with the settings of the run, e.g. configs/lora.yaml."
RESUME = (
    "yes: continue from the newest whole checkpoint; a number, e.g. 600: from checkpoint-600; no or nothing: start "
    "afresh."
)
SET = "Override one value of the config, e.g. --set training_args.max_steps=20. May be given several times."
CHECK = (
    "Check everything, print the data and memory report, train nothing, e.g. "
    "finetune.py data/demo glm-edge-nano configs/demo.yaml --check"
)
PREVIEW = "Print the first N training rows token by token, supervised ones marked, e.g. --preview 3."
JSON = "With --check or --preview: write the same as JSON, e.g. --json report.json."
Overrides = Annotated[list[str] | None, option("--set", "KEY=VALUE", SET)]


def make_app(help_text: str, takes_images: bool) -> typer.Typer:
    """Return a script's command: its arguments and options, handed to the recipe.

    Args:
        help_text: what `--help` shows; a block after a line with `\\b` keeps its lines.
        takes_images: whether it trains vision models.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command(help=help_text, context_settings={"help_option_names": ["-h", "--help"]})
    def main(
        data_dir: Annotated[Path, argument("DATA_DIR", DATA_DIR, parser=expand_home)],
        model: Annotated[str, argument("MODEL", MODEL)],
        config: Annotated[Path, argument("CONFIG", CONFIG, parser=expand_home)],
        resume: Annotated[str | None, argument("RESUME", RESUME)] = None,
        overrides: Overrides = None,
        check: Annotated[bool, typer.Option("--check", help=CHECK)] = False,
        preview: Annotated[int | None, option("--preview", "N", PREVIEW, min=1)] = None,
        json_path: Annotated[Path | None, option("--json", "PATH", JSON, parser=expand_home)] = None,
    ) -> None:
        overridden = tuple(overrides or ())
        request = RunRequest(data_dir, model, config, resume, overridden, check, preview, json_path, takes_images)
        again = "; the same command with `yes` at its end continues from the last checkpoint"
        run_command(lambda: recipe.run(request), problems_end="; nothing was trained", stopped_end=again)

    return app


def run_command(action: Callable[[], None], problems_end: str = "", stopped_end: str = "") -> None:
    """Do `action` and end the process with its exit code: 0 done, 2 the user's input is wrong, 1 anything else.

    Args:
        action: what the command does.
        problems_end: ends the line that counts the errors in the input.
        stopped_end: ends the line after Ctrl-C.
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
