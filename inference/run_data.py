"""The data that a run was trained on, as its run folder remembers it."""

from pathlib import Path

import yaml

from data.sources import Source, open_source


def open_run_data(checkpoint: Path, split: str) -> Source:
    """The images of the run's own data source.

    Args:
        checkpoint: A run folder with recipe.yaml.
        split: train, val or test.

    Raises:
        ValueError: no recipe.yaml, or none that names a source; or the source's own error.
    """
    recipe = checkpoint / "recipe.yaml"
    if not recipe.is_file():
        raise ValueError(f"{recipe}: expected the run's recipe, or --images; found neither.")
    try:
        data = yaml.safe_load(recipe.read_text())["data"]
        name, root = data["name"], data["root"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{recipe}: expected data.name and data.root, found {error}.") from error
    return open_source(name, root, split)
