"""The data that a run was trained on, as the recipe in its run folder says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from robust_submission.cli.errors import UserError
from robust_submission.data.sources import Columns, Source, available_splits, open_source


def read_recipe(checkpoint: Path | None, otherwise: str) -> dict[str, Any]:
    """The resolved recipe of a run.

    Args:
        checkpoint: A run folder.
        otherwise: The option that makes the recipe unnecessary, for the message.

    Raises:
        UserError: there is no recipe.yaml, or it holds no recipe.
    """
    path = checkpoint / "recipe.yaml" if checkpoint else None
    if path is None or not path.is_file():
        raise UserError(
            f"{path or '--checkpoint'}: expected a run's recipe, or {otherwise}; found neither."
        )
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: expected a recipe in YAML, found {line}.") from error
    data = recipe.get("data") if isinstance(recipe, dict) else None
    if not isinstance(data, dict) or not {"name", "root"} <= data.keys():
        raise UserError(f"{path}: expected a recipe with data.name and data.root, found none.")
    for key in ("optimizer", "objective"):
        if not isinstance(group := recipe.get(key, {}), dict):
            raise UserError(f"{path}: expected keys in {key}, found {group!r}.")
    return recipe


def recipe_columns(data: Mapping[str, Any]) -> Columns:
    """The columns that a recipe's data names, as `open_source` takes them."""
    return Columns(image=data.get("image_column"), label=data.get("label_column"))


def open_run_data(checkpoint: Path, split: str) -> Source:
    """One split of the data that the run was trained on.

    Raises:
        UserError: no recipe, or its data has no such split.
    """
    data = read_recipe(checkpoint, "--images")["data"]
    name, root, columns = data["name"], data["root"], recipe_columns(data)
    if split not in ("train", *available_splits(name, root, columns)):
        raise UserError(
            f"{checkpoint}: expected data with {split} images, or --images; found none."
        )
    return open_source(name, root, split, columns=columns)
