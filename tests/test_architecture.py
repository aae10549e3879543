"""The package's structure: imports run one way, folders are small, a name has one meaning."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "robust_submission"
FLOORS = (
    {"cli"},
    {"runtime"},
    {"data", "models", "attacks"},
    {"settings"},
    {"training", "prediction", "evaluation"},
    {"report"},
    {"api", "checker"},
    {"packaging"},
    {"leaderboard", "hub"},
)
"""Rooms of the package, from the ground up; a room imports from lower floors alone."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
Imports = dict[str, set[str]]


def parse() -> dict[str, ast.Module]:
    """The package's files by dotted name within it; templates belong to the packages they make."""
    parsed = dict[str, ast.Module]()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if "templates" not in parts:
            parsed[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return parsed


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """The package's modules that a file imports, at its top or in a function."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    prefix = f"{PACKAGE.name}."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)} & known


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return parse()


@pytest.fixture(scope="module")
def imports(trees: dict[str, ast.Module]) -> Imports:
    return {name: imported(tree, trees.keys()) - {name} for name, tree in trees.items()}


def test_every_room_has_a_floor(imports: Imports):
    assert {name.split(".")[0] for name in imports} == FLOOR.keys() | {"__init__"}


def test_rooms_import_from_lower_floors_alone(imports: Imports):
    for name, others in imports.items():
        room = name.split(".")[0]
        for other in others if room != "__init__" else ():
            below = other.split(".")[0]
            assert below == room or FLOOR[below] < FLOOR[room], f"{name} imports {other}"


def test_no_circles(imports: Imports):
    TopologicalSorter(imports).prepare()  # raises CycleError


def test_folders_have_at_most_ten_files_and_three_floors(imports: Imports):
    folders = defaultdict[str, set[str]](set)
    packages = {name.rpartition(".")[0] for name in imports}
    for name in imports.keys() - packages - {"__init__"}:
        folders[name.rpartition(".")[0]].add(name)
    for folder, files in folders.items():
        assert len(files) <= 10, folder

        def floor(name: str, files: set[str] = files) -> int:
            return 1 + max((floor(other) for other in imports[name] & files), default=0)

        assert max(map(floor, files)) <= 3, {name: floor(name) for name in files}


def test_a_name_is_defined_once(trees: dict[str, ast.Module]):
    places = defaultdict[str, set[str]](set)
    for module, tree in trees.items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            names = {each.id for each in targets if isinstance(each, ast.Name)}
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            for name in names - {"Options", "main", "__all__"}:
                places[name].add(module)
    assert not {name: where for name, where in places.items() if len(where) > 1}
