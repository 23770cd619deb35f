"""The table of recipes: what each is, what it came to, where it is from."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from harness import python
from support import reviews, tiny_recipe, write_csv

from accel_trainer import library, recipe_file
from accel_trainer.draft import Draft
from accel_trainer.errors import UserError
from accel_trainer.library import VARIABLE, find_recipe
from accel_trainer.listing import print_recipes, rows
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import glance, load_recipe, read_draft


def write(folder: Path, name: str, text: str = "", **sections: Any) -> Path:
    """A tiny recipe, with sections replaced, or a text."""
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = tiny_recipe(Path("reviews.csv")) | sections
    path.write_text(text or yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def result(date: str, **metrics: dict[str, float]) -> dict[str, Any]:
    return {"date": date, "step": 10, "metrics": metrics}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two sound recipes and a wrong one; a shipped library that they shadow in part."""
    monkeypatch.setattr(library, "shipped", lambda name: tmp_path / "shipped")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "reviews.csv", reviews(90))
    write(tmp_path / "recipes", "food/tiny", results=[result("2026-01-02", test={"accuracy": 0.87654, "f1": 0.5})])
    write(
        tmp_path / "recipes", "客服/意图", dataset={"path": "team/tickets", "name": "zh", "splits": {"train": "train"}}
    )
    write(tmp_path / "recipes", "wrong", model={"checkpoint": "team/bert", "revison": "main"})
    write(tmp_path / "shipped", "food/tiny")
    return tmp_path


def table(capsys: pytest.CaptureFixture[str], pattern: str | None = None) -> list[list[str]]:
    """Cells of the lines printed."""
    print_recipes(pattern)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    return [[cell.strip() for cell in line if cell.strip()] for line in lines]


def test_each_recipe_on_a_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table(capsys) == [
        ["name", "checkpoint", "dataset", "recorded", "from", "shadows"],
        ["food/tiny", "new bert", "reviews.csv", "accuracy 0.8765", "./recipes", "shipped"],
        ["wrong", "has mistakes: accel-trainer check wrong", "./recipes"],
        ["客服/意图", "new bert", "team/tickets (zh)", "./recipes"],
    ]


def test_columns_stand_below_their_headers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.cells import cell_len

    print_recipes()
    header, *lines = capsys.readouterr().out.splitlines()
    assert {cell_len(line[: line.index("./recipes")]) for line in lines} == {header.index("from")}


def test_of_a_long_address_the_end_is_shown_and_the_whole_is_searched(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "https://example.org/a/very/long/address/of/train.csv"
    write(here / "recipes", "far", dataset={"path": address, "splits": {"train": 0.9, "validation": 0.1}})
    assert table(capsys, "example.org")[1] == ["far", "new bert", f"…{address[-39:]}", "./recipes"]


def test_columns_that_tell_nothing_are_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table(capsys, "客服/*")[0] == ["name", "checkpoint", "dataset", "from"]


def test_problem_types_are_told_where_they_differ(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> tuple[Recipe, bool]:
        other = {"problem_type": "regression"} if path.stem == "tiny" else {}
        recipe, is_sound = glance(path)
        return recipe.model_copy(update=other), is_sound

    monkeypatch.setattr("accel_trainer.listing.glance", read)
    header, *lines = table(capsys)
    assert header[1] == "problem type"
    assert [line[1] for line in lines] == [
        "regression",
        "has mistakes: accel-trainer check wrong",
        "single_label_classification",
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (None, ["food/tiny", "wrong", "客服/意图"]),
        ("tiny", ["food/tiny"]),
        ("TINY", ["food/tiny"]),
        ("food", ["food/tiny"]),
        ("team/", ["客服/意图"]),
        ("bert", ["food/tiny", "客服/意图"]),
        ("*/tiny", ["food/tiny"]),
        ("tin?", []),  # a glob stands for the whole
        ("*bert", ["food/tiny", "客服/意图"]),
        ("Tickets (zh", ["客服/意图"]),
    ],
)
def test_patterns(here: Path, pattern: str | None, names: list[str]) -> None:
    assert [row.entry.name for row in rows(pattern)] == names


def test_a_pattern_without_a_match_is_a_mistake(here: Path) -> None:
    with pytest.raises(UserError, match="matches 'nothing'; `accel-trainer list` shows all"):
        print_recipes("nothing")


def test_no_recipes_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(library, "shipped", lambda name: tmp_path / "none")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    print_recipes()
    assert capsys.readouterr().out.startswith("no recipes in reach")


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"test": {"f1": 0.91239, "accuracy": 0.5}}, "f1 0.9124"),
        ({"validation": {"f1": 0.7}}, "f1 0.7000 on validation"),
        ({"test": {"accuracy": 0.8}}, ""),
    ],
)
def test_the_result_that_is_shown(here: Path, metrics: dict[str, dict[str, float]], shown: str) -> None:
    evaluation = {"metric_for_best_model": "f1"}
    write(here / "recipes", "food/tiny", evaluation=evaluation, results=[result("2026-01-01", **metrics)])
    assert [row.result for row in rows("food/tiny")] == [shown]


@pytest.mark.parametrize(
    "text",
    [
        "model:\ndataset:\n",
        "model: 3\ndataset: [a]\n",
        "model:\n  checkpoint: [\ndataset:\n",
        f"model: {'[' * 500}{']' * 500}\ndataset:\n",
        "dataset:\n  path: &a [*a]\nmodel:\n  checkpoint: *a\n",
    ],
)
def test_a_file_with_mistakes_is_listed_all_the_same(here: Path, text: str) -> None:
    write(here / "recipes", "odd", text)
    (odd,) = rows("odd")
    assert odd.result == "has mistakes: accel-trainer check odd"


def test_a_recipe_whose_data_are_not_there_has_a_mistake_and_is_described(here: Path) -> None:
    write(here / "recipes", "far", dataset={"path": "gone.csv", "splits": {"train": 0.9, "validation": 0.1}})
    (far,) = rows("gone.csv")
    assert (far.checkpoint, far.dataset) == ("new bert", "gone.csv")
    assert far.result == "has mistakes: accel-trainer check far"


def test_a_secret_is_a_mistake_and_not_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://ann:geheim1234@example.org/train.csv"
    write(here / "recipes", "odd", dataset={"path": address, "splits": {"train": 0.9, "validation": 0.1}})
    assert table(capsys, "odd")[1] == ["odd", "has mistakes: accel-trainer check odd", "./recipes"]
    with pytest.raises(UserError, match="no recipe's name"):
        print_recipes("geheim")


def test_no_disk_is_searched_and_each_file_is_read_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError

    write(here / "recipes", "odd", dataset={"data_files": "/**/x.csv", "splits": {"train": 0.9, "validation": 0.1}})
    monkeypatch.setattr(Path, "glob", refuse)
    monkeypatch.setattr(Path, "rglob", refuse)
    read = Counter[str]()

    def counted(text: bytes, source: str) -> Draft:
        read[source] += 1
        return read_draft(text, source)

    monkeypatch.setattr(recipe_file, "read_draft", counted)
    (odd,) = rows("odd")
    assert (odd.dataset, odd.is_sound) == ("/**/x.csv", True)
    assert set(read.values()) == {1}


def test_old_names_are_read_without_a_note(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("accel_trainer")
    level = logger.level
    with caplog.at_level(logging.INFO, "accel_trainer"):
        logger.addHandler(caplog.handler)
        evaluation = {"evaluation_strategy": "epoch"}
        path = write(here / "recipes", "old", evaluation=evaluation)
        assert rows("old")[0].is_sound
        assert not caplog.messages
        load_recipe(path)
        assert caplog.messages
        logger.removeHandler(caplog.handler)
    assert logger.level == level


def test_the_command_it_names_finds_the_mistakes(here: Path) -> None:
    (wrong,) = rows("wrong")
    name = wrong.result.rpartition(" ")[2]
    with pytest.raises(UserError, match=r"wrong\.yaml:\d+: model\.revison"):
        load_recipe(find_recipe(name)[1])


def test_it_is_light(here: Path) -> None:
    code = """
import sys
from accel_trainer.listing import print_recipes
print_recipes()
heavy = {"torch", "transformers", "datasets", "accelerate", "pandas", "pyarrow", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = python(code, here)
    assert done.code == 0, done.err
    assert "food/tiny" in done.out
