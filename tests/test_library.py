"""Recipes by path or by name, ./recipes before the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from accel_trainer.errors import UserError
from accel_trainer.library import find_recipe, library_folders, recipe_names, shipped
from accel_trainer.recipe_file import load_recipe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = tmp_path / "shipped"
    for name in ("imdb/distilbert", "imdb/bert", "quickstart"):
        path = library / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr("accel_trainer.library.shipped", lambda name: library)
    work = tmp_path / "work"
    (work / "recipes" / "imdb").mkdir(parents=True)
    (work / "recipes" / "imdb" / "distilbert.yaml").write_text("")
    (work / "recipes" / "own.yaml").write_text("")
    monkeypatch.chdir(work)
    return work


def test_names_and_what_they_shadow(here: Path) -> None:
    assert recipe_names() == {
        "imdb/distilbert": Path("recipes/imdb/distilbert.yaml"),
        "own": Path("recipes/own.yaml"),
        "imdb/bert": here.parent / "shipped" / "imdb" / "bert.yaml",
        "quickstart": here.parent / "shipped" / "quickstart.yaml",
    }


def test_a_name_a_path_and_a_path_with_a_name(here: Path) -> None:
    assert find_recipe("imdb/bert") == ("imdb/bert", here.parent / "shipped" / "imdb" / "bert.yaml")
    assert find_recipe("recipes/imdb/distilbert.yaml") == ("imdb/distilbert", Path("recipes/imdb/distilbert.yaml"))
    other = here / "elsewhere.yaml"
    other.write_text("")
    assert find_recipe(str(other)) == ("elsewhere", other)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("imdb/distilbret", "imdb/distilbert"), ("quikstart", "quickstart"), ("recipes/imdb/brt.yaml", "imdb/bert")],
)
def test_a_typo_is_answered_with_the_name(here: Path, typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"no such recipe \(did you mean {meant}\?\)") as caught:
        find_recipe(typed)
    assert "own" in str(caught.value)


def test_nothing_in_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel_trainer.library.shipped", lambda name: tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="none in reach"):
        find_recipe("zzz")


def test_one_folder_under_two_names_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped("recipes").parent)
    assert library_folders() == [Path("recipes")]


def test_every_shipped_recipe_is_sound() -> None:
    recipes = sorted(shipped("recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        load_recipe(path)
