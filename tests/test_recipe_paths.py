"""Files and folders that a recipe names are found beside it or here, or reported."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from sample_files import MINIMAL

from accel_trainer.errors import RecipeError
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A recipe's folder and the working directory, both with a data.csv, only the first with first.csv and so on."""
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (beside, here):
        (folder / "parts").mkdir(parents=True)
        (folder / "data.csv").touch()
        (folder / "parts" / "a.csv").touch()
    (beside / "first.csv").touch()
    (here / "second.csv").touch()
    monkeypatch.chdir(here)
    return beside.resolve(), here.resolve()


def load(beside: Path, dataset: str, *overrides: str) -> Recipe:
    path = beside / "recipe.yaml"
    path.write_text(MINIMAL.replace("path: org/data", dataset), encoding="utf-8")
    return load_recipe(path, overrides)


def test_files_are_looked_for_beside_the_recipe_then_here(folders: tuple[Path, Path]) -> None:
    beside, here = folders
    assert load(beside, "path: data.csv").dataset.path == str(beside / "data.csv")
    assert load(beside, "path: second.csv").dataset.path == str(here / "second.csv")
    assert load(beside, "path: x", "dataset.path=data.csv").dataset.path == str(here / "data.csv")
    assert load(beside, "path: x", "dataset.path=first.csv").dataset.path == str(beside / "first.csv")


def test_home_is_expanded(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = folders
    monkeypatch.setenv("HOME", str(here))
    assert load(beside, "path: ~/second.csv").dataset.path == str(here / "second.csv")


def test_data_files_lie_in_a_local_path(folders: tuple[Path, Path]) -> None:
    beside, here = folders
    files = load(beside, "path: parts, data_files: {train: a.csv, test: ['*.csv', hf://x]}").dataset.data_files
    assert files == {"train": str(beside / "parts/a.csv"), "test": [str(beside / "parts/*.csv"), "hf://x"]}
    assert load(beside, "data_files: 'second.*'").dataset.data_files == str(here / "second.*")
    assert load(beside, "path: org/data, data_files: none.csv").dataset.data_files == "none.csv"
    assert load(beside, f"data_files: {beside}/parts/*.csv").dataset.data_files == f"{beside}/parts/*.csv"


def test_a_link_keeps_its_name(folders: tuple[Path, Path]) -> None:
    beside, _ = folders
    (beside / "link.csv").symlink_to(beside / "data.csv")
    assert load(beside, "path: link.csv").dataset.path == str(beside / "link.csv")


@pytest.mark.parametrize("path", ["org/name", "imdb", "hf://datasets/a/b/c.csv", "s3://bucket/x.json"])
def test_hub_ids_and_addresses_stay(folders: tuple[Path, Path], path: str) -> None:
    assert load(folders[0], f"path: {path}").dataset.path == path


@pytest.mark.parametrize("path", ["a/b/c", "./a", "../a", "/a/b", "~/a", "~nobody-here/a", r"a\b", "a.csv", "b/a.jsonl.gz", "a b", ""])  # fmt: skip
def test_what_is_no_hub_id_must_exist(folders: tuple[Path, Path], path: str) -> None:
    beside, here = folders
    with pytest.raises(RecipeError) as caught:
        load(beside, f"path: '{path}'")
    (mistake,) = caught.value.mistakes
    assert "no such file or folder" in mistake.what
    assert mistake.remedy == "it is absolute" or f"{beside} and {here}" in mistake.remedy or "~" in path


@pytest.mark.parametrize("files", ["none.csv", "'none*.csv'", "'**x/*.csv'", r'"a\0b/**/x.csv"', "imdb"])
def test_data_files_must_exist(folders: tuple[Path, Path], files: str) -> None:
    with pytest.raises(RecipeError, match="no such file or folder"):
        load(folders[0], f"data_files: {files}")


@pytest.mark.parametrize("files", ["/**/x.csv", "/*/**/x.csv", "~/**", "~/../**/x.csv", "../../**/a.csv"])
def test_no_glob_searches_the_disk(folders: tuple[Path, Path], files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setenv("HOME", str(folders[1].parent / "here" / "home"))
    monkeypatch.setattr(Path, "glob", refuse)
    with pytest.raises(RecipeError) as caught:
        load(folders[0], f"data_files: '{files}'")
    (mistake,) = caught.value.mistakes
    assert mistake.remedy.startswith("** is searched for neither below / nor below a home folder: name the folder that")


def test_a_glob_searches_a_folder(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = folders
    monkeypatch.setenv("HOME", str(beside))
    for files in ("parts/**/*.csv", f"{beside}/parts/**/a.csv", "~/parts/**/a.csv"):
        found = load(beside, f"data_files: '{files}'").dataset.data_files
        assert str(found).startswith(str(beside / "parts" / "**"))
    # Beside the recipe, which is a home folder, nothing is searched for; here it is.
    assert load(beside, "data_files: '**/second.csv'").dataset.data_files == str(here / "**" / "second.csv")
