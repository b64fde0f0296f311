"""Write what the config knows of its keys into `configs/`: the tables of README.md, and keys.md, the list of all keys.

The texts are the descriptions in `glm_edge_ft/config/settings.py` and `glm_edge_ft/config/keys.toml`. Run it after a
change of either, or of the installed libraries; `tests/config/test_configs_readme.py` fails until then:

    python -m tests.write_config_docs
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_edge_ft.config.keys import PEFT_TYPES, Key, key_table, library_keys, section_rules, words
from glm_edge_ft.config.rules import TRAINING_DEFAULTS
from glm_edge_ft.config.settings import DATA_KEYS, TOP_KEYS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_SECTIONS = {
    "training_args": ("training_args.", ("training_args",)),
    "generation_config": ("training_args.generation_config.", ("generation_config",)),
    "peft_config": ("peft_config.", PEFT_TYPES),
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def own_and_common_keys() -> Iterator[tuple[str, str, str]]:
    """Yield name, description and what holds where it is not written, of the keys that the table of README.md has."""
    own = [(f"data_config.{name}", key) for name, key in DATA_KEYS.items()] + list(TOP_KEYS.items())
    for name, key in own:
        yield name, key.description, "must be given" if name == "data_config.train_file" else _code(key.default)
    for section, (prefix, sources) in _SECTIONS.items():
        keys = {name: key for source in sources for name, key in library_keys(source).items()}
        for name, rule in section_rules(section).items():
            if "doc" in rule:
                yield f"{prefix}{name}", rule["doc"], rule.get("unset") or _code(_default(section, name, keys[name]))


def _default(section: str, name: str, key: Key) -> Any:
    return TRAINING_DEFAULTS.get(name, key.default) if section == "training_args" else key.default


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def key_rows() -> str:
    """Return the table of the keys that most runs need."""
    rows = "".join(f"| `{name}` | {meaning} | {unset} |\n" for name, meaning, unset in own_and_common_keys())
    return f"| key | meaning | if left out |\n|---|---|---|\n{rows}"


def old_rows(head: str) -> str:
    """Return the table of keys of older versions that are still read."""
    old = key_table()["old"]["training_args"]
    new = {name: today if isinstance(today, str) else today.get("now") for name, today in old.items()}
    return f"{head}\n|---|---|\n" + "".join(f"| `{name}` | `{today}` |\n" for name, today in new.items() if today)


def all_keys() -> str:
    """Return the list of all keys of the libraries, with their types, defaults and what this toolkit does with them."""
    text = "# Every key of transformers and PEFT\n\nWritten by `python -m tests.write_config_docs` from the installed "
    text += "classes. What a key means is in their documentation; the keys that most runs need are in\n"
    text += "[README.md](README.md). Keys without a remark are handed to the library as they are.\n"
    for section, (prefix, sources) in _SECTIONS.items():
        for source in sources:
            title = f"{section}, {source}" if source in PEFT_TYPES else prefix.removesuffix(".")
            text += f"\n## {title}\n\n| key | values | default | here |\n|---|---|---|---|\n"
            for name, key in library_keys(source).items():
                default = _code(_default(section, name, key))
                text += f"| `{name}` | {_cell(words(key.type))} | {_cell(default)} | {_remark(key)} |\n"
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _remark(key: Key) -> str:
    rule = key.rule
    bounds = [f"{sign} {rule[bound]}" for bound, sign in _BOUNDS.items() if bound in rule]
    remarks = [", ".join(bounds) + (f" or {rule['also']}" if "also" in rule else "")] if bounds else []
    if "refused" in rule:
        remarks.append(f"refused: {rule['refused']}" + (f" ({rule['instead']})" if "instead" in rule else ""))
    if "no_effect" in rule:
        remarks.append(f"no effect: {rule['no_effect']}")
    if "needs" in rule:
        remarks.append(f"with `{rule['needs']}` only")
    return "; ".join(remarks)


def written() -> dict[Path, str]:
    """Return file → the content that it should have."""
    texts = {path: path.read_text(encoding="utf-8") for path in (CONFIGS / "README.md", CONFIGS / "README_zh.md")}
    english, chinese = texts
    texts[english] = _with_table(texts[english], key_rows())
    texts[english] = _with_table(texts[english], old_rows("| old name | today's name |"))
    texts[chinese] = _with_table(texts[chinese], old_rows("| 旧名称 | 现在的名称 |"))
    return {**texts, CONFIGS / "keys.md": all_keys()}


def _with_table(text: str, table: str) -> str:
    """Return a text whose table with the same head is replaced."""
    head = re.escape("".join(table.splitlines(keepends=True)[:2]))
    replaced, count = re.subn(rf"{head}(\|.*\n)*", lambda _: table, text)
    assert count == 1, table[:40]
    return replaced


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
