"""The page: its HTML, style and script with the runs' data inside."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from glm_edge_ft.report.content import build_content
from glm_edge_ft.report.reading import RunFolder

Language = Literal["en", "zh", "both"]

_PARTS = Path(__file__).parent
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render_page(runs: Sequence[RunFolder], language: Language) -> bytes:
    """Return the whole page in UTF-8; nothing in it points outside of it.

    Text of the runs stands in a block of JSON, of which the script makes text nodes, never markup. Besides, the page's
    content security policy names its own script by its hash: no other would run.
    """
    content = {"language": language, **build_content(runs)}
    title = ", ".join(run["name"] for run in content["runs"])
    page = (_PARTS / "page.html").read_text(encoding="utf-8")
    script = (_PARTS / "page.js").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "style": (_PARTS / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": _policy_hash(script),
        "data": embed_json(content),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], page)  # one pass: marks in the data stay text
    return page.encode("utf-8", "replace")  # a lone surrogate of a prediction becomes a question mark


def _policy_hash(text: str) -> str:
    """Return what a content security policy calls an inline script of this text (W3C, CSP Level 2)."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def embed_json(value: Any) -> str:
    """Return JSON that may stand in a script element: no markup in it, no line that a script would end at."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)
