"""Recipes by name: `imdb/distilbert` is looked up in ./recipes and then in the library that ships with the package."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from accel_trainer.errors import UserError


def shipped(name: str) -> Path:
    """A folder that ships with the package, `recipes` or `accelerate_configs`, installed or in a checkout."""
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parent.parent / name


def library_folders() -> list[Path]:
    """Folders that names are looked up in, first come first served."""
    folders = [Path("recipes"), shipped("recipes")]
    return [
        folder
        for i, folder in enumerate(folders)
        if folder.is_dir() and folder.resolve() not in map(Path.resolve, folders[:i])
    ]


def recipe_names() -> dict[str, Path]:
    """Names in reach and the files they stand for."""
    names: dict[str, Path] = {}
    for folder in library_folders():
        for path in sorted(folder.rglob("*.yaml")):
            names.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return names


def find_recipe(recipe: str) -> tuple[str, Path]:
    """Name and path of a recipe, given as a path or as a name.

    Raises:
        UserError: there is neither such a file nor such a name.
    """
    names = recipe_names()
    path = Path(recipe).expanduser()
    if path.is_file():
        own = {file.resolve(): name for name, file in names.items()}
        return own.get(path.resolve(), path.stem), path
    if recipe in names:
        return recipe, names[recipe]
    close = get_close_matches(recipe.removesuffix(".yaml").removeprefix("recipes/"), names, n=1, cutoff=0.5)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(
        f"{recipe}: no such recipe{guess}; give the path of a YAML file, or one of: {', '.join(names) or 'none in reach'}"
    )
