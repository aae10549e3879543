"""The rooms import one way: an arrow that runs back fails here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "cli": set(),
    "data": {"cli"},
    "models": set(),
    "attacks": set(),
    "training": {"cli", "data", "models", "attacks"},
    "inference": {"cli", "data", "models", "attacks"},
    "submission": {"cli", "data", "models", "attacks", "inference"},
}


def imported_rooms(path: Path) -> set[str]:
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & MAY_IMPORT.keys()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room: str):
    files = list((ROOT / room).glob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= MAY_IMPORT[room] | {room}, path


def test_no_script_bears_a_top_level_package_name():
    for room in MAY_IMPORT:
        assert not {path.stem for path in (ROOT / room).glob("*.py")} & MAY_IMPORT.keys()
