"""The package's imports run one way: an arrow that runs back, or a circle, fails here."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "robust_submission"
FLOORS = (
    {"cli", "runtime"},
    {"data", "models", "attacks"},
    {"training", "prediction", "evaluation"},
    {"report"},
    {"api"},
    {"checker"},
    {"packaging"},
    {"leaderboard", "hub"},
)
"""Rooms of the package, from the ground up; a room imports from lower floors alone."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted names within the package, and their files."""
    named = dict[str, Path]()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if "templates" not in parts:
            named[".".join(parts).removesuffix(".__init__")] = path
    return named


def imported(path: Path, known: set[str]) -> set[str]:
    """The package's modules that a file imports."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1].relative_to(PACKAGE.parent) if node.level else ""
            module = ".".join([*Path(folder).parts, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    prefix = f"{PACKAGE.name}."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)} & known


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    named = modules()
    return {name: imported(path, named.keys()) - {name} for name, path in named.items()}


def test_every_room_has_a_floor(imports: dict[str, set[str]]):
    assert {name.split(".")[0] for name in imports} == FLOOR.keys() | {"__init__"}


def test_rooms_import_from_lower_floors_alone(imports: dict[str, set[str]]):
    for name, others in imports.items():
        room = name.split(".")[0]
        for other in others if room != "__init__" else ():
            below = other.split(".")[0]
            assert below == room or FLOOR[below] < FLOOR[room], f"{name} imports {other}"


def test_no_circles(imports: dict[str, set[str]]):
    TopologicalSorter(imports).prepare()
