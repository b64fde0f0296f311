"""Show runs to a colleague: output folders as one HTML page that needs nothing but a browser.

\b
    python -m glm_edge_ft report output/demo
    python -m glm_edge_ft report output/lora output/sft --out compare.html
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_edge_ft.console import show
from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.files import atomic_path, can_be_made
from glm_edge_ft.report.content import build_content
from glm_edge_ft.report.reading import RunFolder, read_run

PAGE_FILE = "report.html"
LANGUAGES = ("both", "en", "zh")
_PARTS = Path(__file__).parent
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def report(output_dirs: Sequence[Path], out: Path | None = None, language: str = "both") -> None:
    """Run the command: write one self-contained page of the runs and say where it is.

    Args:
        output_dirs: output folders, each with at least one of `run.json`, `metrics.jsonl` and `predictions/`.
        out: the page, which replaces an earlier one; `report.html` in the first folder where None.
        language: `en`, `zh`, or `both`: the browser's, with a switch on the page.

    Raises UserError with everything that is wrong with the arguments.
    """
    target = out if out is not None else output_dirs[0] / PAGE_FILE
    problems = ProblemList()
    if language not in LANGUAGES:
        problems.add("--language", f"knows no {language!r}", f"write one of: {', '.join(LANGUAGES)}")
    if target.suffix.lower() not in (".html", ".htm"):
        problems.add(f"--out {target}", "is no name of a page", f"end it in .html: {target.with_suffix('.html')}")
    elif target.is_dir():
        problems.add(f"--out {target}", "is a folder", f"name a file in it: {target / PAGE_FILE}")
    elif not can_be_made(target.absolute().parent):
        problems.add(f"--out {target}", "cannot be made", "name a file in a folder of yours")
    runs = []
    for folder in output_dirs:
        with problems.collect():
            runs.append(read_run(folder))
    problems.raise_if_any()
    try:
        with atomic_path(target) as staged:
            staged.write_bytes(render_page(runs, language))
    except OSError as error:
        raise UserError.single(f"--out {target}", f"cannot be written: {error}", "name another file") from None
    show(f"report: {target} ({target.stat().st_size / 1e6:.1f} MB); open it in a browser, or send it as it is")


def render_page(runs: Sequence[RunFolder], language: str) -> bytes:
    """Return the whole page in UTF-8; nothing in it points outside of it.

    The runs' text is in a block of JSON, from which the script makes text nodes, never markup. The page's content
    security policy names its own script by its hash, so no other would run.
    """
    content = {"language": language, **build_content(runs)}
    script = (_PARTS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    parts = {
        "title": html.escape(", ".join(run["name"] for run in content["runs"])),
        "style": (_PARTS / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": f"'sha256-{digest}'",
        "data": embed_json(content),
    }
    page = (_PARTS / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page)  # one pass: marks in the data stay text
    return page.encode("utf-8", "replace")  # a lone surrogate of a prediction becomes a question mark


def embed_json(value: Any) -> str:
    """Return JSON that may be inside a script element: no markup in it, no line separator that would end a script."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)
