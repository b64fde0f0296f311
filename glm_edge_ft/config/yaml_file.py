"""A YAML file and `--set` options → plain values that remember where each was written.

The file is composed into nodes, never constructed by a loader, so that every key keeps its line, a key given twice is
seen, no tag can run anything, and a plain scalar keeps the text it was written with (`save_strategy: no` is the word
"no" to a field that takes words, and false to one that takes true or false).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from glm_edge_ft.config.document import Document, KeyPath, dotted
from glm_edge_ft.errors import Problem, UserError
from glm_edge_ft.files import did_you_mean

_TAG = "tag:yaml.org,2002:"
_DEEPEST = 40
_MOST_NODES = 20_000  # aliases of aliases can blow a small file up to billions of nodes


class _Loader(yaml.SafeLoader):
    """Composes nodes, reading fewer plain scalars as non-text: `5e-5` is a number, `2024-01-01` and `12:30` are not."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _name, _pattern, _first in (
    ("bool", r"(?i:yes|no|true|false|on|off)\Z", "yYnNtTfFoO"),
    ("int", r"[-+]?[0-9]+(?:_[0-9]+)*\Z", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z", "-+.0123456789"),
    ("float", r"(?i:[-+]?\.inf|\.nan)\Z", "-+."),
    ("null", r"(?i:~|null|)\Z", "~nN"),
    ("merge", r"<<\Z", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), [*_first, ""])


def read_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """Read a configuration file and lay the `--set` options over it.

    Raises:
        UserError: the file is missing, a folder, not UTF-8 text, not YAML, or not a mapping of keys; the problems of
            the `--set` options are listed with it.
    """
    document = Document(name=str(path), folder=path.absolute().parent)
    parsed = [_parse_override(text, document.problems) for text in overrides]
    try:
        _Builder(document).read_top(_compose(_read_text(path), str(path)))
    except UserError as error:
        raise UserError([*error.problems, *(problem for _, problem in document.problems)]) from None
    for override in parsed:
        if override is not None:
            _apply_override(document, *override)
    return document


def _read_text(path: Path) -> str:
    where = str(path)
    try:
        if path.is_dir():
            raise UserError.single(where, "this is a folder, not a config file", f"write {path / 'lora.yaml'} or so")
        if not path.exists():
            raise UserError.single(where, "no such config file", did_you_mean(path) + _nearby_files(path))
        if not path.is_file() and not str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")):
            raise UserError.single(where, "this is a pipe or a device, not a config file", "name a YAML file")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError.single(where, f"the config file cannot be read: {reason}") from error
    if b"\0" in content:
        raise UserError.single(where, "this is not a text file", "name a YAML file, such as configs/lora.yaml")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError.single(
            f"{where}:{line}", f"byte 0x{content[error.start]:02x} is not UTF-8", "save the file as UTF-8"
        ) from error


def _nearby_files(path: Path) -> str:
    try:
        names = sorted(found.name for found in path.parent.iterdir() if found.suffix in (".yaml", ".yml"))
    except OSError:
        return f"the folder {path.parent} does not exist either"
    return f"config files there: {', '.join(names[:10])}" if names else f"no .yaml file lies in {path.parent}"


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError.single(place, f"not valid YAML: {reason}", _yaml_hint(reason)) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        character = f"U+{error.character:04X}" if isinstance(error.character, int) else repr(error.character)
        raise UserError.single(f"{name}:{line}", f"the control character {character} cannot stand in YAML") from error
    except RecursionError as error:
        raise UserError.single(name, f"nested more than {_DEEPEST} levels deep") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError.single(name, f"not valid YAML: {error}") from error


def _yaml_hint(reason: str) -> str:
    if "\\t" in reason:
        return "indent with spaces, not with tabs"
    if "mapping values are not allowed" in reason:
        return "check the indentation, and quote a text that holds a colon followed by a space"
    return "check the indentation, colons and quotes of this line and the one before"


class _Builder:
    """Turns the nodes of one file or option into values, writing lines, texts and problems to a document."""

    def __init__(self, document: Document, with_lines: bool = True) -> None:
        self.document = document
        self.with_lines = with_lines
        self.nodes = 0
        self.open: list[yaml.Node] = []

    def read_top(self, node: yaml.Node | None) -> None:
        """Read the whole file into the document. Raises UserError where it is empty or holds no mapping."""
        name = self.document.name
        if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null"):
            raise UserError.single(name, "the config file is empty", "start from one of the files in configs/")
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise UserError.single(
                f"{name}:{node.start_mark.line + 1}", f"{kind} where keys are expected", "write `key: value` lines"
            )
        self.document.values = self.build(node, ())

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """Return the plain value of a node; an unusable one is noted and becomes None."""
        self.nodes += 1
        if node in self.open or len(self.open) > _DEEPEST or self.nodes > _MOST_NODES:
            raise UserError.single(
                self._place(node, path),
                "nested too deeply, or made far too large by aliases",
                "write it flat, without &name and *name",
            )
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self._entry(child, child, (*path, index)) for index, child in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, path)
            return self._refuse(node, path, f"the tag `{_short(node.tag)}` is not allowed here", "write a plain value")
        finally:
            self.open.pop()

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, path, "a list or mapping cannot be a key", "write the key as one word")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in first_lines:
                what = f"`{key}` is given twice, in lines {first_lines[key]} and {line}"
                self._refuse(key_node, (*path, key), what, "keep one of them")
                continue
            first_lines[key] = line
            values[key] = self._entry(key_node, value_node, (*path, key))
        for base_node in merged:
            base = self.build(base_node, path) if isinstance(base_node, yaml.MappingNode) else None
            if base is None:
                self._refuse(base_node, path, "`<<` takes an alias of a mapping", "write `<<: *name`")
            else:
                values = {**base, **values}
        return values

    def _entry(self, key_node: yaml.Node, value_node: yaml.Node, path: KeyPath) -> Any:
        if self.with_lines:
            self.document.lines[path] = key_node.start_mark.line + 1
        return self.build(value_node, path)

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind in ("str", "merge"):
            return text
        self.document.texts[path] = text
        reader = _READERS.get(kind)
        if reader is None:
            return self._refuse(node, path, f"the tag `{_short(node.tag)}` is not allowed here", "write a plain value")
        try:
            return reader(text)
        except (ValueError, KeyError):
            return self._refuse(node, path, f"`{text[:40]}` cannot be read as {kind}", "write a plain value")

    def _refuse(self, node: yaml.Node, path: KeyPath, what: str, fix: str) -> None:
        line = node.start_mark.line + 1 if self.with_lines else math.inf
        self.document.problems.append((line, Problem(self._place(node, path), what, fix)))

    def _place(self, node: yaml.Node, path: KeyPath) -> str:
        if not self.with_lines:
            return f"--set {dotted(path)}"
        place = f"{self.document.name}:{node.start_mark.line + 1}"
        return f"{place}: {dotted(path)}" if path else place


_BOOLEANS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_READERS: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: _BOOLEANS[text.lower()],
    "int": int,
    "float": lambda text: float(re.sub(r"(?i)\.(inf|nan)\Z", r"\1", text)),
}


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")[:60]


def _parse_override(text: str, problems: list[tuple[float, Problem]]) -> tuple[KeyPath, yaml.Node | None] | None:
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        fix = "write KEY=VALUE with no space around =, such as --set training_args.max_steps=20"
        problems.append((math.inf, Problem(f"--set {text}", "this is not KEY=VALUE", fix)))
        return None
    try:
        return tuple(parts), _compose(value, f"--set {'.'.join(parts)}")
    except UserError as error:
        problems += [(math.inf, problem) for problem in error.problems]
        return None


def _apply_override(document: Document, path: KeyPath, node: yaml.Node | None) -> None:
    target: dict[str, Any] = document.values
    for depth, part in enumerate(path[:-1], start=1):
        inner = target.get(str(part))
        if inner is None:
            inner = target[str(part)] = {}
        if not isinstance(inner, dict):
            what = f"`{dotted(path[:depth])}` is a single value, so nothing can be set below it"
            fix = f"write --set {dotted(path[:depth])}=VALUE"
            document.problems.append((math.inf, Problem(f"--set {dotted(path)}", what, fix)))
            return
        target = inner
    document.forget(path)
    document.overridden.add(path)
    try:
        value = None if node is None else _Builder(document, with_lines=False).build(node, path)
    except UserError as error:
        document.problems += [(math.inf, problem) for problem in error.problems]
        return
    target[str(path[-1])] = value
