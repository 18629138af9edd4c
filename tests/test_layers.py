"""Arrows point down: no room of the package imports one above it, and no file imports itself by way of others."""

import ast
import graphlib
from functools import cache
from pathlib import Path

import diffusers_gm

PACKAGE = Path(diffusers_gm.__file__).parent

# From the ground up; a room is a folder or a file of the package. Each may import those before it.
ORDER = [
    *(
        "version",
        "extra",
        "cli",
        "files",
        "launch",
        "pictures",
        "autoencoders",
        "networks",
        "processes",
        "data",
    ),
    *("readings", "losses", "likelihood", "samplers", "schedulers", "calibration", "calibrate", "pipelines"),
    "__init__",  # what `import diffusers_gm` shows
    "evaluation",
    "calibrate.__main__",  # the command; the function of that name is in `calibration`
    "app",
    *("training", "hub", "studies", "docs"),
]
LONGEST_CHAIN = 6


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def room_of(module: tuple[str, ...]) -> str:
    return "calibrate.__main__" if module == ("calibrate", "__main__") else module[0]


def imports_of(text: str, module: tuple[str, ...], is_package: bool, modules) -> set[tuple[str, ...]]:
    """Modules of the package that a source imports, also inside functions."""
    found = set()

    def add(target: tuple[str, ...]) -> None:
        found.add(next((target[:n] for n in range(len(target), 0, -1) if target[:n] in modules), ("__init__",)))

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE.name:
                    add(tuple(alias.name.split(".")[1:]))
        elif isinstance(node, ast.ImportFrom):
            given = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                here = () if module == ("__init__",) else module if is_package else module[:-1]
                base = here[: len(here) - node.level + 1] + given
            elif given[:1] == (PACKAGE.name,):
                base = given[1:]
            else:
                continue
            for alias in node.names:
                add((*base, alias.name) if (*base, alias.name) in modules else base)
    return found - {module}


@cache
def graph() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    paths = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    return {
        module: imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", paths)
        for module, path in paths.items()
    }


def rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, imported in graph().items():
        found.setdefault(room_of(module), set()).update(map(room_of, imported))
    return {room: below - {room} for room, below in found.items()}


def test_every_room_has_its_place():
    assert set(rooms()) <= set(ORDER), f"new rooms: {set(rooms()) - set(ORDER)}"


def test_no_room_imports_one_above():
    up = {
        f"{'.'.join(module)} -> {'.'.join(target)}"
        for module, imported in graph().items()
        for target in imported
        if ORDER.index(room_of(target)) > ORDER.index(room_of(module))
    }
    assert not up


def test_no_file_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter(graph()).prepare()


def test_no_chain_of_rooms_is_long():
    below = rooms()

    def longest(room: str) -> list[str]:
        return [room, *max((longest(other) for other in below[room]), key=len, default=[])]

    chain = max(map(longest, below), key=len)
    assert len(chain) - 1 <= LONGEST_CHAIN, " -> ".join(chain)


def test_every_way_to_import_is_seen():
    modules = {("data",), ("hub", "cards"), ("hub",), ("pipelines", "loading"), ("__init__",)}
    text = "import diffusers_gm.hub.cards\nfrom .. import data, other\ndef f():\n    from ..hub import cards, x\n"
    assert imports_of(text, ("pipelines", "loading"), False, modules) == {
        *(("hub", "cards"), ("data",), ("__init__",), ("hub",)),
    }
    assert imports_of("from .loading import x\nimport torch", ("pipelines",), True, modules) == {
        ("pipelines", "loading")
    }
