"""The shape of the package: its size, its rooms, and that imports run downwards only.

A room is a folder of `glm_edge_ft`, or a file at its root. All imports count: those at the top of a module, inside
of functions, and for type hints alone (`if TYPE_CHECKING:`), since a reader meets them all.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "glm_edge_ft"

# What holds today; lower a number with the change that makes it smaller. The goal stands beside it.
MOST_LINES = 17_700  # 13,500
MOST_MODULES = 105  # 80
MOST_FILES_AT_THE_ROOT = 10
MOST_PROBES = 31  # 13, 1 in 1,000 lines: calls of getattr and hasattr
MOST_UPWARD_IMPORTS = 0
MOST_CIRCLES = 0
MOST_MUTUAL_ROOMS = 0

# From low to high: a room imports from its own row and the rows above it here.
LEVELS = (
    {"errors", "files", "console", "distributed"},
    {"config"},
    {"data", "model", "training"},
    {"run"},
    {"failures", "checks"},
    {"recipe", "deploy", "report"},
    {"cli", "__main__"},
)
APART = {"data", "model", "training"}  # these do not import one another either
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "PIL", "matplotlib"}


@cache
def trees() -> dict[str, ast.Module]:
    """Return the name of each module of the package, without `glm_edge_ft.`, and its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Return each module and the modules of the package that it imports."""
    found = {}
    for module, tree in trees().items():
        names = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        inside = {name.removeprefix(f"{PACKAGE.name}.") for name in names if name.startswith(f"{PACKAGE.name}.")}
        found[module] = inside & set(trees()) - {module}
    return found


def room(module: str) -> str:
    """Return the room of a module."""
    return module.partition(".")[0]


def room_imports() -> set[tuple[str, str]]:
    """Return pairs of rooms of which the first imports from the second."""
    pairs = {(room(module), room(other)) for module, others in imports().items() for other in others}
    return {(one, other) for one, other in pairs if one != other}


def level(name: str) -> int:
    """Return the level of a room; a new room must be given one."""
    (found,) = (number for number, rooms in enumerate(LEVELS) if name in rooms)
    return found


def test_size_of_the_package() -> None:
    """Lines, modules, and files at the root."""
    files = sorted(PACKAGE.rglob("*.py"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert lines <= MOST_LINES
    assert len(files) <= MOST_MODULES
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FILES_AT_THE_ROOT


def test_few_probes_of_unknown_objects() -> None:
    """The versions of the libraries are known, and so are the attributes of their objects."""
    calls = [node.func for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    probes = sum(isinstance(function, ast.Name) and function.id in {"getattr", "hasattr"} for function in calls)
    assert probes <= MOST_PROBES


def test_no_import_runs_upwards() -> None:
    """A room imports from its own level and lower ones; data, model and training not even from one another."""
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in sorted(others)
        if level(room(module)) < level(room(other))
        or (room(module) != room(other) and {room(module), room(other)} <= APART)
    ]
    assert len(upward) <= MOST_UPWARD_IMPORTS, "\n".join(upward)


def test_no_two_rooms_import_each_other() -> None:
    """Neither needs the other to be understood."""
    pairs = room_imports()
    mutual = sorted({(one, other) for one, other in pairs if (other, one) in pairs and one < other})
    assert len(mutual) <= MOST_MUTUAL_ROOMS, mutual


def reachable(start: str) -> set[str]:
    """Return the modules that a module imports, directly or through others."""
    found: set[str] = set()
    open_modules = [start]
    while open_modules:
        fresh = imports()[open_modules.pop()] - found
        found |= fresh
        open_modules += fresh
    return found


def test_no_circle() -> None:
    """No module imports itself through others."""
    reach = {module: reachable(module) for module in imports()}
    circles = {frozenset(other for other in reach[module] if module in reach[other]) for module in reach}
    assert len(circles - {frozenset()}) <= MOST_CIRCLES, circles


def test_what_starts_first_imports_nothing_heavy() -> None:
    """Wrong arguments and configs are answered before torch and transformers are imported, which takes seconds."""
    code = (
        "import sys, finetune, glm_edge_ft.cli, glm_edge_ft.config, glm_edge_ft.__main__\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
