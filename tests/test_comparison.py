"""Two recipes or runs side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_trainer.comparison import compared, diff, print_diff
from accel_trainer.errors import RunFolderError, UserError
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe, to_yaml

RESULT = "results: [{date: '2026-01-02', step: 3, metrics: {test: {f1: 0.5}}, versions: {torch: '1'}}]\n"


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe()


def write_run(folder: Path, recipe: Recipe, f1: float = 0.5, processes: int = 1) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    results = {"train": {"train_runtime": 1.0}, "test": {"f1": f1, "confusion_matrix": [[1]]}}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    facts = {"hardware": {"num_processes": processes}, "versions": {"torch": "1"}, "git_commit": str(folder)}
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(["seed", "max_steps", "global_batch_size"]), st.integers(1, 99)))
def test_exactly_what_was_changed_differs(recipe: Path, values: dict[str, int]) -> None:
    one = load_recipe(recipe)
    other = load_recipe(recipe, [f"training.{key}={value}" for key, value in values.items()])
    found = compared(one, other)
    changed = {f"training.{key}" for key, value in values.items() if getattr(one.training, key) != value}
    assert {difference.key for difference in found} == changed
    assert {difference.meaning for difference in found} <= {"steps"}
    assert [(d.key, d.after, d.before, d.meaning) for d in compared(other, one)] == [tuple(d) for d in found]


def test_equal_recipes_are_said_to_be(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = recipe.with_name("again.yaml")
    again.write_text("# another comment\n" + recipe.read_text(encoding="utf-8") + RESULT, encoding="utf-8")
    assert diff(str(recipe), str(again)) == []
    print_diff(str(recipe), str(again))
    assert capsys.readouterr().out == f"{recipe} and {again} do not differ\n"


def locked(recipe: Recipe, rows: str, path: str | None = None) -> Recipe:
    update = {"sha256": {"train": rows * 64}, "path": path or recipe.dataset.path}
    return recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update=update)})


def test_the_same_bytes_elsewhere_are_no_other_data(recipe: Path) -> None:
    one = load_recipe(recipe)
    meanings = {d.key: d.meaning for d in compared(locked(one, "a"), locked(one, "a", "/elsewhere.csv"))}
    assert meanings == {"dataset.path": "nothing"}
    meanings = {d.key: d.meaning for d in compared(locked(one, "a"), locked(one, "b", "/elsewhere.csv"))}
    assert meanings == {"dataset.path": "data", "dataset.sha256.train": "data"}
    assert {d.key: d.meaning for d in compared(one, locked(one, "a"))} == {"dataset.sha256.train": "open"}


@pytest.mark.parametrize(
    ("overrides", "verdict"),
    [
        (["training.seed=7"], "they take other steps"),
        (["dataset.path=other.csv"], "they take the same steps if they read the same data and weights"),
        (["evaluation.metrics=[f1]"], "they take the same steps, but for stopping early; scores and best weights may be others"),
        (["dataset.revision=main"], "they take the same steps if what one leaves open is what the other has"),
        (["tracking.logging_steps=7"], "they take the same steps"),
    ],
)  # fmt: skip
def test_the_verdict(
    recipe: Path,
    overrides: list[str],
    verdict: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(recipe.parent)
    Path("other.csv").write_bytes(Path("reviews.csv").read_bytes())
    Path("other.yaml").write_text(to_yaml(load_recipe(recipe, overrides)), encoding="utf-8")
    print_diff("tiny.yaml", "other.yaml")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == verdict
    assert lines[0].split() == ["key", "tiny.yaml", "other.yaml"]
    assert lines[1].startswith(overrides[0].partition("=")[0] + "  ")
    assert len(lines) == 4


def test_runs_are_compared_with_their_results_and_hardware(recipe: Path, tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", load_recipe(recipe))
    assert diff(str(one), str(write_run(tmp_path / "same", load_recipe(recipe)))) == []
    other = write_run(tmp_path / "other", load_recipe(recipe, ["training.seed=7"]), f1=0.75, processes=2)
    assert [tuple(difference) for difference in diff(str(one), str(other))] == [
        ("training.seed", 42, 7, "steps"),
        ("results.test.f1", 0.5, 0.75, "result"),
        ("hardware.num_processes", 1, 2, "rounding"),
    ]


def test_a_run_is_compared_with_what_its_recipe_recorded(recipe: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", load_recipe(recipe), f1=0.5000004)
    assert diff(str(recipe), str(run)) == []
    recipe.write_text(recipe.read_text(encoding="utf-8") + RESULT, encoding="utf-8")
    assert diff(str(recipe), str(run)) == []  # to the digits that are recorded
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("f1: 0.5", "f1: 0.25"), encoding="utf-8")
    assert [tuple(d) for d in diff(str(recipe), str(run))] == [("results.test.f1", 0.25, 0.5, "result")]


def test_the_last_result_of_the_latest_day_is_compared(recipe: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", load_recipe(recipe), f1=0.75)
    later = RESULT[: RESULT.rindex("]")].removeprefix("results: [").replace("0.5", "0.75")
    text = recipe.read_text(encoding="utf-8") + RESULT.rstrip().removesuffix("]") + f", {later}]\n"
    recipe.write_text(text, encoding="utf-8")
    assert diff(str(recipe), str(run)) == []


def test_runs_are_compared_without_their_data(recipe: Path, tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", load_recipe(recipe))
    other = write_run(tmp_path / "other", load_recipe(recipe, ["training.seed=7"]))
    (recipe.parent / "reviews.csv").unlink()
    assert [tuple(difference) for difference in diff(str(one), str(other))] == [("training.seed", 42, 7, "steps")]


def test_a_folder_with_a_recipe_of_its_own_is_no_run(recipe: Path) -> None:
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["dataset"]["path"] = Path(values["dataset"]["path"]).name
    (recipe.parent / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    assert diff(str(recipe), str(recipe.parent)) == []


@pytest.mark.parametrize("name", ["none", "~nobody-here", "x" * 300, "x/" * 3000, "a\0b"])
def test_what_is_not_there(recipe: Path, tmp_path: Path, name: str) -> None:
    for typed in (name, str(tmp_path / name)):
        with pytest.raises(UserError, match="no such recipe"):
            diff(str(recipe), typed)


@pytest.mark.parametrize("text", ["{", "[]", '{"hardware": 3}', '{"test": 3}', "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["run.json", "results.json"])
def test_a_run_with_garbled_files(recipe: Path, tmp_path: Path, name: str, text: str) -> None:
    run = write_run(tmp_path / "run", load_recipe(recipe))
    (run / name).write_bytes(text.encode("latin-1"))
    if (name, text) == ("run.json", '{"test": 3}'):
        assert diff(str(recipe), str(run)) == []
        return
    with pytest.raises(RunFolderError, match=rf"{name}: it .*; name another run, or train again$"):
        diff(str(recipe), str(run))
