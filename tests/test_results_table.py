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
from accel_trainer.results_table import BEGIN, END, HEADERS, library_of, results_table, write_table

RESULT: dict[str, Any] = {
    "date": "2026-03-01",
    "step": 12,
    "metrics": {"validation": {"accuracy": 0.8, "f1": 0.75}, "test": {"loss": 0.5, "accuracy": 0.7}},
    "hardware": "1 process, cpu, float32",
    "duration": 3725.4,
}


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


def test_no_sign_in_a_recipe_breaks_the_table(tmp_path: Path) -> None:
    write(
        tmp_path / "a (1) | b#.yaml",
        description=f"a \\| b\n| c <img src=x> {END}",
        dataset={"path": "https://host/a b/x(1)|[y]", "splits": {"train": "train"}},
        model={"checkpoint": "team/a<b"},
        results=[{**RESULT, "hardware": "a|b"}],
    )
    *_, line = results_table(tmp_path).splitlines()
    assert line == (
        r"| [a (1) \| b#](a%20%281%29%20%7C%20b%23.yaml) | a \\\| b \| c &lt;img src=x> &lt;!-- end of results --> | team/a&lt;b "
        r"| [x(1)\|\[y\]](https://host/a%20b/x%281%29%7C%5By%5D) | test accuracy | 0.7000 | a\|b | 1:02:05 | 2026-03-01 |"
    )
    (tmp_path / "README.md").write_text(f"{BEGIN}{END}\nmine\n", encoding="utf-8")
    for _ in range(2):
        write_table(tmp_path)
        assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith(f"{line}\n\n{END}\nmine\n")


@pytest.mark.parametrize("secret", ["https://ann:geheim1234@host/x.csv", "https://host/x.csv?token=geheim1234"])
def test_no_secret_of_a_recipe_gets_into_the_table(tmp_path: Path, secret: str) -> None:
    write(tmp_path / "a.yaml", dataset={"path": secret, "splits": {"train": "train"}})
    row = cells(results_table(tmp_path))["[a](a.yaml)"]
    assert "mistakes" in row["description"]
    assert "geheim" not in results_table(tmp_path)


def test_a_readme_that_is_a_link_stays_one(library: Path, tmp_path: Path) -> None:
    real = tmp_path / "docs" / "index.md"
    real.parent.mkdir()
    real.write_text(f"{BEGIN}{END}", encoding="utf-8")
    (library / "README.md").symlink_to(Path("..") / "docs" / "index.md")
    write_table(library)
    assert (library / "README.md").is_symlink()
    assert results_table(library) in real.read_text(encoding="utf-8")


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
