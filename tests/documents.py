"""The READMEs of all folders, as the tests read them: their blocks, their tables, and the codes in their prose."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "configs", "data", "glm_edge_ft/deploy")  # a README in English and one in Chinese in each
TRANSLATED = [(ROOT / folder / "README.md", ROOT / folder / "README_zh.md") for folder in FOLDERS]
DOCUMENTS = [
    *(path for pair in TRANSLATED for path in pair),
    *(
        ROOT / name
        for name in ("configs/keys.md", "glm_edge_ft/README.md", "tests/README.md", "tests/bench/RESULTS.md")
    ),
]
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
ENGLISH = [path for path in DOCUMENTS if not path.name.endswith("_zh.md")]
DEPLOY, DATA = ROOT / "glm_edge_ft/deploy/README.md", ROOT / "data/README.md"


def blocks(path: Path, language: str = r"\w*") -> list[str]:
    """Return the contents of the fenced blocks of one language, or of all, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[path], flags=re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", TEXTS[path], flags=re.MULTILINE | re.DOTALL)


def codes(path: Path) -> list[str]:
    """Return what stands between single backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def table_rows(path: Path) -> list[list[str]]:
    """Return the cells of all rows of all tables."""
    lines = re.findall(r"^\|(.*)\|$", prose(path), flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def commands(*paths: Path) -> list[str]:
    """Return every line of the bash blocks, each once."""
    return list(dict.fromkeys(line for path in paths for block in blocks(path, "bash") for line in block.splitlines()))
