"""Show runs to a colleague: output folders as one HTML page that needs nothing but a browser.

\b
    python -m glm_edge_ft report output/demo
    python -m glm_edge_ft report output/lora output/sft --out compare.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glm_edge_ft.console import show
from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.files import atomic_path, can_be_made
from glm_edge_ft.report.page import Language, render_page
from glm_edge_ft.report.reading import read_run

PAGE_FILE = "report.html"
LANGUAGES: tuple[Language, ...] = ("both", "en", "zh")


def report(output_dirs: Sequence[Path], out: Path | None = None, language: str = "both") -> None:
    """Do the command: check the arguments, write the page and say where it is.

    Args:
        output_dirs: output folders of runs.
        out: the page; `report.html` in the first folder where None.
        language: `en`, `zh`, or `both` with a switch on the page.

    Raises UserError with everything that is wrong with the arguments.
    """
    problems = ProblemList()
    chosen = next((known for known in LANGUAGES if known == language), None)
    if chosen is None:
        problems.add("--language", f"knows no {language!r}", f"write one of: {', '.join(LANGUAGES)}")
    target = out if out is not None else output_dirs[0] / PAGE_FILE
    try:
        write_report(output_dirs, target, chosen or "both", problems)
    except UserError as error:
        raise UserError(error.problems) from None
    show(f"report: {target} ({target.stat().st_size / 1e6:.1f} MB); open it in a browser, or send it as it is")


def write_report(
    output_dirs: Sequence[Path], target: Path, language: Language, problems: ProblemList | None = None
) -> None:
    """Write one self-contained page of the runs in `output_dirs`, over an earlier page of that name.

    Args:
        output_dirs: output folders, each with at least one of `run.json`, `metrics.jsonl` and `predictions/`.
        target: the page, `*.html`. It appears whole or not at all; its folder is made where it is missing.
        language: of the labels; `both`: the browser's, with a switch.
        problems: what was found before, raised together with what is found here.

    Raises UserError for folders that are none of a run, with what was looked for, and for a target that is no page.
    """
    problems = problems or ProblemList()
    if target.suffix.lower() not in (".html", ".htm"):
        problems.add(f"--out {target}", "is no name of a page", f"end it in .html: {target.with_suffix('.html')}")
    elif target.is_dir():
        problems.add(f"--out {target}", "is a folder", f"name a file in it: {target / PAGE_FILE}")
    elif not can_be_made(target.absolute().parent):
        problems.add(f"--out {target}", "cannot be made", "name a file in a folder of yours")
    runs = []
    for folder in output_dirs:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            problems.extend(error)
    problems.raise_if_any()
    page = render_page(runs, language)
    try:
        with atomic_path(target) as staged:
            staged.write_bytes(page)
    except OSError as error:
        raise UserError.single(f"--out {target}", f"cannot be written: {error}", "name another file") from None
