"""The table of a library: what its rows say, and that nothing else of a README changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import ROOT, python
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_recipe

from accel_trainer.errors import UserError
from accel_trainer.recipe import DatasetSection, Recipe
from accel_trainer.results_table import (
    BEGIN,
    END,
    HEADERS,
    dataset_named,
    library_of,
    newest,
    results_table,
    score,
    write_table,
)

RESULT: dict[str, Any] = {
    "date": "2026-03-01",
    "step": 12,
    "metrics": {"validation": {"accuracy": 0.8, "f1": 0.75}, "test": {"loss": 0.5, "accuracy": 0.7}},
    "hardware": "1 process, cpu, float32",
    "duration": 3725.4,
}


def recipe_of(*results: dict[str, Any], **evaluation: Any) -> Recipe:
    values = tiny_recipe(Path("reviews.csv"), evaluation={"metrics": ["accuracy", "f1"], **evaluation})
    return Recipe.model_validate({**values, "results": list(results)})


def write(path: Path, **values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**tiny_recipe(Path("data/reviews.csv")), **values}, allow_unicode=True, sort_keys=False)
    path.write_text(text.replace("1.0e-03", "0.001"), encoding="utf-8")
    return path


def cells(table: str) -> dict[str, dict[str, str]]:
    """First cell → header → cell."""
    lines = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines()]
    heads = [head.strip("| ") for head in lines[0]]
    return {line[0].strip("| "): dict(zip(heads, (c.strip("| ") for c in line), strict=True)) for line in lines[2:]}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Three recipes, one of them with mistakes; none of the files that they name exists."""
    folder = tmp_path / "recipes"
    write(
        folder / "b" / "done.yaml",
        description="食評 | two\nlines",
        evaluation={"metrics": ["accuracy"], "metric_for_best_model": "accuracy"},
        results=[{**RESULT, "date": "2025-01-01", "metrics": {"test": {"accuracy": 0.1}}}, RESULT],
    )
    write(folder / "a.yaml", model={"checkpoint": "google-bert/bert-base-uncased"}, warmup_ratio=0.1)  # an old name
    write(folder / "c.yml", training={"global_batch_size": 0})
    (folder / "cpu.yaml").write_text("num_processes: 2\n", encoding="utf-8")  # no recipe
    return folder


def test_a_row_says_what_a_recipe_is_and_came_to(library: Path) -> None:
    rows = cells(results_table(library))
    assert list(rows) == ["[a](a.yaml)", "[b/done](b/done.yaml)", "[c](c.yml)"]
    assert rows["[b/done](b/done.yaml)"] == {
        "recipe": "[b/done](b/done.yaml)",
        "description": "食評 \\| two lines".replace(" | ", " \\| "),
        "checkpoint": "new bert",
        "dataset": "data/reviews.csv",
        "metric": "test accuracy",
        "value": "0.7000",
        "hardware": "1 process, cpu, float32",
        "duration": "1:02:05",
        "date": "2026-03-01",
    }
    assert rows["[a](a.yaml)"]["checkpoint"] == "google-bert/bert-base-uncased"
    assert rows["[a](a.yaml)"]["value"] == "not recorded"
    assert "mistakes" in rows["[c](c.yml)"]["description"]
    assert results_table(library).count("\n") == 2 + len(rows)


def test_the_number_that_speaks_for_a_recipe() -> None:
    best = {"metric_for_best_model": "f1"}
    assert score(recipe_of()) is None
    assert score(recipe_of(RESULT, metric_for_best_model="accuracy")) == ("test", "accuracy", 0.7)
    assert score(recipe_of(RESULT, **best)) == ("validation", "f1", 0.75)  # the test rows may be unlabelled
    assert score(recipe_of({**RESULT, "metrics": {"test": {"loss": 0.5}}}, **best)) is None
    assert score(recipe_of(RESULT)) == ("test", "accuracy", 0.7)  # not the loss, by default
    assert score(recipe_of(RESULT, metrics=[])) == ("test", "loss", 0.5)


@given(st.lists(st.sampled_from(["2024-12-31", "2025-01-01", "2025-01-02"]), min_size=1, max_size=5))
def test_the_newest_result_is_the_last_of_the_latest_day(days: list[str]) -> None:
    results = recipe_of(*({**RESULT, "date": day, "step": i} for i, day in enumerate(days))).results
    found = newest(results)
    assert found is not None
    assert found.date == max(days)
    assert found.step == max(i for i, day in enumerate(days) if day == max(days))


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        ({"path": "nyu-mll/glue", "name": "sst2"}, "nyu-mll/glue (sst2)"),
        ({"path": "https://host/a/data/", "data_files": "x.csv"}, "https://host/a/data/"),
        ({"path": "team/data", "data_files": "a.csv"}, "team/data"),
        ({"data_files": {"train": "data/a/x.csv", "test": ["data/a/y.csv"]}}, "data/a"),
        ({"data_files": ["a.csv", "b/c.csv"]}, "a.csv, b/c.csv"),
        ({"data_files": ["a.csv", "b.csv"]}, "a.csv, b.csv"),
        ({"data_files": "data/a.csv"}, "data/a.csv"),
        ({"data_files": ["/data/a.csv", "b.csv"]}, "/data/a.csv, b.csv"),
    ],
)
def test_the_dataset_in_a_word(named: dict[str, Any], shown: str) -> None:
    assert dataset_named(DatasetSection.model_validate({**named, "splits": {"train": "train"}})) == shown


@given(before=st.text(max_size=30), inside=st.text(max_size=30), after=st.text(max_size=30))
def test_nothing_but_the_table_changes(
    before: str, inside: str, after: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("library")
    write(folder / "a.yaml")
    readme = folder / "README.md"
    readme.write_bytes(f"{before}{BEGIN}{inside}{END}{after}".encode())
    write_table(folder)
    text = readme.read_bytes().decode()
    assert text == f"{before}{BEGIN}\n\n{results_table(folder)}\n{END}{after}"
    write_table(folder)
    assert readme.read_bytes().decode() == text


def test_the_library_of_a_recipe_is_the_nearest_readme_with_a_place_for_the_table(tmp_path: Path) -> None:
    place = f"{BEGIN}\n{END}\n"
    recipe = write(tmp_path / "checkout" / "recipes" / "imdb" / "x.yaml")
    (tmp_path / "README.md").write_text(place, encoding="utf-8")
    assert library_of(recipe) == tmp_path
    (tmp_path / "checkout" / ".git").mkdir()
    assert library_of(recipe) is None  # beyond the checkout lies somebody else's
    for text in ("no place", f"{END}{BEGIN}"):
        (recipe.parent / "README.md").write_text(text, encoding="utf-8")
        assert library_of(recipe) is None
    (recipe.parent / "README.md").write_bytes(b"\xff" + place.encode())
    assert library_of(recipe) is None
    (tmp_path / "checkout" / "README.md").write_text(place, encoding="utf-8")
    assert library_of(recipe) == tmp_path / "checkout"
    (tmp_path / "checkout" / "recipes" / "README.md").write_text(place, encoding="utf-8")
    assert library_of(recipe) == tmp_path / "checkout" / "recipes"


def test_a_readme_that_cannot_be_written_is_a_message(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (library / "README.md").write_text(f"{BEGIN}{END}", encoding="utf-8")

    def refuse(final: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("accel_trainer.results_table.replaced", refuse)
    with pytest.raises(UserError, match=r"README.md: Permission denied"):
        write_table(library)


def test_the_table_of_the_shipped_library_is_current() -> None:
    folder = ROOT / "recipes"
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = text.partition(BEGIN)[2].partition(END)[0]
    assert found.strip() == results_table(folder).strip(), "run python scripts/write_recipe_table.py"
    assert all(header in found.splitlines()[2] for header in HEADERS)


def test_no_torch(tmp_path: Path) -> None:
    code = "import accel_trainer.results_table, sys; print({'torch', 'transformers', 'pandas'} & {*sys.modules})"
    assert python(code, tmp_path).out == "set()\n"
