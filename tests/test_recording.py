"""A run's result in its recipe: written once, beside all that stands there, and refused where it is not the recipe's."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import ROOT, run_trainer, write_recipe_in
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer import recipe_edit, recording
from accel_trainer.errors import UserError
from accel_trainer.recipe import Recipe, Result
from accel_trainer.recipe_edit import alone_with
from accel_trainer.recipe_file import load_recipe
from accel_trainer.recording import hardware_named, merged, record, unlike
from accel_trainer.results import rounded
from accel_trainer.results_table import BEGIN, END, results_table

COMMENT = "# what this is about\n"
HERE = "1 process, cpu, float32"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with one recipe, and a run of it that is done."""
    place = tmp_path_factory.mktemp("done")
    recipe = write_recipe_in(place / "library", training={"max_steps": 3})
    text = recipe.read_text(encoding="utf-8").replace(f"{recipe.parent}/", "")  # the table lies beside it
    recipe.write_text(COMMENT + text, encoding="utf-8")
    (place / "library" / "README.md").write_text(f"# Ours\n{BEGIN}\n{END}\nend\n", encoding="utf-8")
    outcome = run_trainer(recipe, place / "run")
    assert outcome.code == 0, outcome.err
    return place


@pytest.fixture
def place(done: Path, tmp_path: Path) -> Path:
    """A copy of its own: `library/` and `run/`, which names the copied recipe."""
    for name in ("library", "run"):
        shutil.copytree(done / name, tmp_path / name, copy_function=shutil.copy2)
    for name in ("run.json", "recipe.yaml"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text(encoding="utf-8").replace(str(done), str(tmp_path)), encoding="utf-8")
    return tmp_path


def change(path: Path, **values: Any) -> None:
    """Change top-level values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def without(path: Path, name: str) -> None:
    """Take a top-level value out of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    del values[name]
    path.write_text(json.dumps(values), encoding="utf-8")


def change_recipe(place: Path, **sections: Any) -> None:
    path = place / "library" / "tiny.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(values, allow_unicode=True).replace("1.0e-03", "0.001"), encoding="utf-8")


def test_a_run_is_written_into_its_recipe_and_its_library(place: Path) -> None:
    path = place / "library" / "tiny.yaml"
    before = path.read_text(encoding="utf-8")
    assert record(place / "run") == path
    after = path.read_text(encoding="utf-8")
    assert after.startswith(before)
    (result,) = load_recipe(path).results
    left = json.loads((place / "run" / "results.json").read_text(encoding="utf-8"))
    for role in ("validation", "test"):
        scalars = {name: value for name, value in left[role].items() if not isinstance(value, dict | list)}
        assert {"loss", "accuracy", "f1"} == scalars.keys()
        assert result.metrics[role] == pytest.approx(scalars, rel=1e-5)
    assert result.metrics.keys() == {"validation", "test"}
    assert result.step == 3
    assert result.hardware == HERE
    assert result.duration == pytest.approx(left["train"]["train_runtime"], rel=1e-2)
    assert {"accel_trainer", "torch"} < result.versions.keys()
    assert result.tolerance == 0.02
    table = results_table(path.parent)
    assert (place / "library" / "README.md").read_text(encoding="utf-8") == f"# Ours\n{BEGIN}\n\n{table}\n{END}\nend\n"
    assert f"| {result.date} |" in table

    files = {file: file.read_bytes() for file in (place / "library").iterdir()}
    record(place / "run", str(path))
    assert {file: file.read_bytes() for file in (place / "library").iterdir()} == files
    record(place / "run", tolerance=0.5)
    assert [entry.tolerance for entry in load_recipe(path).results] == [0.5]
    record(place / "run")
    assert [entry.tolerance for entry in load_recipe(path).results] == [0.5]


def test_the_step_is_that_of_the_scored_weights(place: Path) -> None:
    results = json.loads((place / "run" / "results.json").read_text(encoding="utf-8"))
    change(place / "run" / "results.json", train={**results["train"], "best_step": 2})
    assert recording.result_of(place / "run").step == 2
    recipe = place / "run" / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("best_model_at_end: true", "best_model_at_end: false"), encoding="utf-8")
    assert recording.result_of(place / "run").step == 3


def test_what_no_step_depends_on_may_change(place: Path) -> None:
    change_recipe(place, description="other words", saving={"save_total_limit": 1}, tracking={"logging_steps": 7})
    assert load_recipe(record(place / "run")).results


def test_a_recipe_that_lies_elsewhere_is_named(place: Path) -> None:
    moved = (place / "library" / "tiny.yaml").rename(place / "library" / "moved.yaml")
    with pytest.raises(UserError, match=r"tiny.yaml is not here; .*--recipe"):
        record(place / "run")
    assert record(place / "run", str(moved)) == moved
    change(place / "run" / "run.json", recipe=None)
    with pytest.raises(UserError, match=r"does not say .*--recipe"):
        record(place / "run")


def edited(place: Path) -> None:
    change_recipe(place, training={"learning_rate": 0.5})


def other_data(place: Path) -> None:
    shutil.copy(place / "library" / "reviews.csv", place / "library" / "other.csv")
    change_recipe(place, dataset={"path": "other.csv"})


def no_result(place: Path) -> None:
    (place / "run" / "results.json").unlink()


def nothing_scored(place: Path) -> None:
    results = json.loads((place / "run" / "results.json").read_text(encoding="utf-8"))
    (place / "run" / "results.json").write_text(json.dumps({"train": results["train"]}), encoding="utf-8")


TRAIN = {"steps": 3, "best_step": None, "train_runtime": None}  # no number: it was not finite

MISTAKES: list[tuple[Callable[[Path], object], str]] = [
    (edited, r"training.learning_rate: 0.001 in the run, 0.5 in the recipe\n.*accel-trainer copy"),
    (other_data, r"dataset.path: /.*reviews.csv in the run, /.*other.csv in the recipe"),
    (lambda place: change_recipe(place, training={"seed": "x"}), r"tiny.yaml:\d+: training.seed"),
    (lambda place: change(place / "run" / "status.json", state="interrupted"), "interrupted, at step 3; .*--resume"),
    (lambda place: (place / "run" / "status.json").unlink(), "there is no run"),
    (no_result, "results.json: it is missing or empty"),
    (lambda place: (place / "run" / "run.json").unlink(), "run.json: it is missing or empty"),
    (lambda place: (place / "run" / "results.json").write_text("[]"), "results.json: it is not what a run leaves"),
    (lambda place: (place / "run" / "results.json").write_text('{"test": {"f1": 0.5}}'), "'train' is missing"),
    (lambda place: without(place / "run" / "run.json", "hardware"), "'hardware' is missing"),
    (lambda place: change(place / "run" / "run.json", started_at=5), "a value is of the wrong kind"),
    (lambda place: change(place / "run" / "run.json", hardware={"num_processes": 1}), "'device' is missing"),
    (lambda place: change(place / "run" / "results.json", train=TRAIN), "a value is of the wrong kind"),
    (lambda place: change(place / "run" / "run.json", recipe={"path": "x" * 300}), "is not here"),
    (nothing_scored, "no split was scored"),
    (lambda place: (place / "run" / "recipe.yaml").unlink(), "recipe.yaml: there is no such file"),
]


@pytest.mark.parametrize(("damage", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_result_that_is_not_the_recipes_is_refused(
    damage: Callable[[Path], object], message: str, place: Path
) -> None:
    damage(place)
    files = {file: file.read_bytes() for file in (place / "library").iterdir()}
    with pytest.raises(UserError, match=f"(?s){message}"):
        record(place / "run")
    assert {file: file.read_bytes() for file in (place / "library").iterdir()} == files


COMMANDS = """
import sys; from pathlib import Path; from accel_trainer.recording import record
sys.stdin.read(1)
for run in sys.argv[1:]: record(Path(run))
"""


def test_several_at_once_lose_nothing(place: Path) -> None:
    runs = [place / f"run-{number}" for number in range(6)]
    hardware = json.loads((place / "run" / "run.json").read_text(encoding="utf-8"))["hardware"]
    for number, run in enumerate(runs, 2):
        shutil.copytree(place / "run", run)
        change(run / "run.json", hardware={**hardware, "num_processes": number})
    commands = [
        subprocess.Popen([sys.executable, "-c", COMMANDS, *map(str, mine)], stdin=subprocess.PIPE, cwd=ROOT)
        for mine in (runs[::2], runs[1::2])
    ]
    for command in commands:
        assert command.stdin is not None
        command.stdin.close()
    assert [command.wait() for command in commands] == [0, 0]
    results = load_recipe(place / "library" / "tiny.yaml").results
    assert {result.hardware for result in results} == {f"{number} processes, cpu, float32" for number in range(2, 8)}
    readme = (place / "library" / "README.md").read_text(encoding="utf-8")
    assert readme == f"# Ours\n{BEGIN}\n\n{results_table(place / 'library')}\n{END}\nend\n"
    assert [path.name for path in (place / "library").iterdir() if path.name.startswith(".")] == []


def test_the_table_is_written_by_one_command_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_edit, "PATIENCE", 0.0)

    def write_table(library: Path) -> None:
        with pytest.raises(UserError, match="another command is changing it"), alone_with(library / "README.md"):
            pass
        written.append(library)

    written: list[Path] = []
    monkeypatch.setattr(recording, "write_table", write_table)
    record(place / "run")
    assert written == [place / "library"]


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_that_makes_no_sense(tolerance: float, place: Path) -> None:
    with pytest.raises(UserError, match="--tolerance"):
        record(place / "run", tolerance=tolerance)


@pytest.mark.parametrize("keeper", ["package", "hub"])
def test_a_library_that_others_keep_is_left_alone(keeper: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if keeper == "package":
        monkeypatch.setattr(recipe_edit, "__file__", str(place / "recipe_edit.py"))
    else:
        monkeypatch.setattr(recipe_edit, "HF_HUB_CACHE", str(place))
    before = (place / "library" / "tiny.yaml").read_bytes()
    with pytest.raises(UserError, match="accel-trainer copy"):
        record(place / "run")
    assert (place / "library" / "tiny.yaml").read_bytes() == before


def test_a_file_that_cannot_be_written_is_a_message(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(final: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(recipe_edit, "replaced", refuse)
    with pytest.raises(UserError, match=r"cannot write .*tiny.yaml: Permission denied; copy it"):
        record(place / "run")


# --- what a result depends on -----------------------------------------------------------------------------------------

# Another value of keys of each kind.
OTHER: dict[str, Any] = {
    "dataset.splits": {"train": 50, "validation": 20, "test": 10},
    "dataset.shuffle_seed": 1,
    "dataset.max_length": 12,
    "model.hidden_dropout": 0.5,
    "training.seed": 7,
    "training.max_steps": 4,
    "evaluation.metrics": ["f1"],
    "evaluation.eval_strategy": "no",
    "saving.load_best_model_at_end": False,
}


def resolved(place: Path) -> tuple[Recipe, Recipe]:
    return load_recipe(place / "library" / "tiny.yaml"), load_recipe(place / "run" / "recipe.yaml")


def changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    section, name = key.split(".")
    values = recipe.model_dump()
    values[section][name] = value
    return Recipe.model_validate(values)


@pytest.mark.parametrize("key", OTHER)
def test_every_key_that_a_result_depends_on_is_compared(key: str, place: Path) -> None:
    recipe, run = resolved(place)
    assert unlike(recipe, run) == []
    assert {name.rpartition(".train")[0] or name for name, _, _ in unlike(changed(recipe, key, OTHER[key]), run)} == {
        key
    }


def test_the_steps_between_evaluations_come_from_where_the_recipe_has_them(place: Path) -> None:
    recipe, run = (changed(one, "evaluation.eval_strategy", "steps") for one in resolved(place))
    assert [key for key, _, _ in unlike(changed(recipe, "tracking.logging_steps", 5), run)] == ["evaluation.eval_steps"]
    assert unlike(changed(recipe, "evaluation.eval_steps", run.eval_steps), run) == []


def test_what_a_run_pins_may_be_open_in_the_recipe(place: Path) -> None:
    recipe, run = resolved(place)
    commit, other = "a" * 40, "b" * 40
    run = changed(run, "dataset.revision", commit)
    for revision in (None, "main", "v1.0", commit):
        assert unlike(changed(recipe, "dataset.revision", revision), run) == []
    assert unlike(changed(recipe, "dataset.revision", other), run) == [("dataset.revision", other, commit)]


def test_bytes_may_lie_anywhere_where_their_hash_is_given(place: Path) -> None:
    recipe, run = resolved(place)
    moved = changed(run, "dataset.path", "/elsewhere/reviews.csv")
    assert [key for key, _, _ in unlike(recipe, moved)] == ["dataset.path"]
    assert run.dataset.sha256 is not None
    locked = changed(recipe, "dataset.sha256", run.dataset.sha256)
    assert unlike(locked, moved) == []
    other = changed(locked, "dataset.sha256", {**run.dataset.sha256, "test": "0" * 64})
    assert [key for key, _, _ in unlike(other, moved)] == ["dataset.sha256.test"]


# --- small parts ------------------------------------------------------------------------------------------------------


def results(hardware: st.SearchStrategy[str]) -> st.SearchStrategy[Result]:
    days = st.sampled_from(["2025-01-01", "2025-06-01", "2026-01-01"])
    return st.builds(
        Result,
        date=days,
        step=st.integers(0, 3),
        metrics=st.just({}),
        hardware=hardware,
        tolerance=st.sampled_from([0.1, 0.2]),
    )


@given(
    old=st.lists(results(st.sampled_from("abc")), max_size=4),
    new=results(st.sampled_from("abc")),
    tolerance=st.sampled_from([None, 0.3]),
)
def test_a_result_replaces_that_of_its_hardware_alone(old: list[Result], new: Result, tolerance: float | None) -> None:
    old = sorted(old, key=lambda result: result.date)
    after = merged(old, new, tolerance)
    assert merged(after, new, tolerance) == after
    assert [result.date for result in after] == sorted(result.date for result in after)
    assert [result for result in after if result.hardware != new.hardware] == [
        result for result in old if result.hardware != new.hardware
    ]
    (found,) = (result for result in after if result.hardware == new.hardware)
    before = [result.tolerance for result in old if result.hardware == new.hardware]
    assert found == new.model_copy(update={"tolerance": tolerance or [*before, new.tolerance][0]})


@given(st.floats(-1e9, -1e-9) | st.floats(1e-9, 1e9))
def test_rounding_keeps_six_digits(value: float) -> None:
    assert abs(rounded(value) - value) <= 5.0001e-6 * abs(value)
    assert rounded(rounded(value)) == rounded(value)
    assert len(f"{rounded(value):.15g}".lstrip("-0.").partition("e")[0].replace(".", "").rstrip("0")) <= 6


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, HERE),
        ({"num_processes": 2}, "2 processes, cpu, float32"),
        ({"device": "cuda", "device_name": "NVIDIA H200", "mixed_precision": "bf16"}, "1 process, NVIDIA H200, bf16"),
        ({"dynamo_backend": "INDUCTOR"}, "1 process, cpu, float32, compiled by inductor"),
    ],
)
def test_the_hardware_in_words(facts: dict[str, Any], words: str) -> None:
    plain = {
        "num_processes": 1,
        "device": "cpu",
        "device_name": "x86_64",
        "mixed_precision": "no",
        "dynamo_backend": "NO",
    }
    assert hardware_named({**plain, **facts}) == words


def test_the_shipped_library_is_no_package_in_a_checkout() -> None:
    assert not (ROOT / "recipes").is_relative_to(Path(recipe_edit.__file__).parent)
