"""A recorded result and a new one: what counts as the same, and real launches of the trainer."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import LAUNCH_VARIABLES, ROOT, run_trainer, signal_at, user_environment, write_recipe_in
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer import reproduction as module
from accel_trainer.errors import Interrupted, RunFolderError, TrainingFailed, UserError
from accel_trainer.recipe import Recipe, Result
from accel_trainer.recipe_file import load_recipe
from accel_trainer.recording import record
from accel_trainer.reproduction import Comparison, comparable, compare, print_reproduction, reproduce
from accel_trainer.results import rounded
from accel_trainer.run_folder import RunFolder

CPU = ROOT / "accelerate_configs" / "cpu.yaml"


def result(**values: Any) -> Result:
    plain = {"date": "2026-01-01", "step": 3, "metrics": {"test": {"accuracy": 0.85}}, "hardware": "here"}
    return Result.model_validate({**plain, **values})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with the result of a run, without a tolerance for differences."""
    place = tmp_path_factory.mktemp("recorded")
    recipe = write_recipe_in(place, training={"max_steps": 5})
    outcome = run_trainer(recipe, place / "run")
    assert outcome.code == 0, outcome.err
    return record(place / "run", tolerance=0.0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working folder and environment; `launched` hands it on."""
    for name in [name for name in os.environ if name.startswith(LAUNCH_VARIABLES)]:
        monkeypatch.delenv(name)
    for name, value in user_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.launch
def test_the_same_hardware_gives_the_same_numbers(
    recorded: Path, here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():  # of a launch around this process
        monkeypatch.setenv(name, value)
    again = reproduce(str(recorded), config_file=CPU)
    assert again.run == here / "runs" / "reproduce" / "tiny"
    assert len(again.comparisons) == 6
    assert {comparison.difference for comparison in again.comparisons} == {0.0}
    assert again.succeeded
    shown = capfd.readouterr()
    assert "step 5/5" in shown.err  # progress, as the trainer shows it
    assert shown.out == ""
    print_reproduction(again)
    out = capfd.readouterr().out
    assert out.count(" same\n") == 6
    assert out.splitlines()[-1] == "tiny: reproduced"


# --- without a launch -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that are calls of the trainer in this process."""

    def launched(command: list[str], *, shown: bool) -> tuple[int, str]:
        recipe, *rest = command[command.index(module.TRAINER) + 1 :]
        place = rest.index("--output_dir")
        folder = Path(rest[place + 1])
        return min(run_trainer(Path(recipe), folder, *rest[:place], *rest[place + 2 :]).code, 1), ""

    monkeypatch.setattr(module, "launched", launched)


@pytest.fixture
def run(recorded: Path, here: Path) -> Path:
    """A copy of the run whose result was recorded."""
    return shutil.copytree(recorded.parent / "run", here / "again", copy_function=shutil.copy2)


@pytest.mark.usefixtures("in_process")
def test_a_run_that_is_done_is_compared_again(recorded: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = recorded.read_text(encoding="utf-8")
    (entry,) = load_recipe(recorded).results
    loss = entry.metrics["test"]["loss"]
    assert text.count(f"{loss:.6g}") == 1
    tampered = recorded.with_name("tampered.yaml")
    tampered.write_text(text.replace(f"{loss:.6g}", f"{loss + 0.001:.6g}"), encoding="utf-8")
    weights = (run / "checkpoints" / "checkpoint-5" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(RunFolderError, match=r"a run lies there already .*--resume"):
        reproduce(str(tampered), config_file=CPU, output_dir=run)
    missed = reproduce(str(tampered), ["tracking.logging_steps=2"], config_file=CPU, output_dir=run, resume=True)
    assert (run / "checkpoints" / "checkpoint-5" / "model.safetensors").stat().st_mtime_ns == weights
    assert not missed.succeeded
    assert [comparison.metric for comparison in missed.comparisons if not comparison.holds] == ["test loss"]
    print_reproduction(missed)
    out = capsys.readouterr().out
    assert out.count(" missed\n") == 1
    assert "tampered: NOT reproduced: test loss" in out
    assert "accel-trainer lock" in out


@pytest.mark.usefixtures("in_process")
def test_a_mistake_that_the_trainer_finds_is_the_users(recorded: Path, here: Path, run: Path) -> None:
    (here / "other.csv").write_text("text,stars\nfine,5\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.csv has 1"):
        reproduce(str(recorded), ["dataset.path=other.csv"])
    assert RunFolder(here / "runs" / "reproduce" / "tiny").status()["exit_code"] == 2

    before = RunFolder(run).status()
    with pytest.raises(UserError, match=r"other\.csv has 1"):
        reproduce(str(recorded), ["dataset.path=other.csv"], output_dir=run, resume=True)
    assert RunFolder(run).status() == before  # what is done is done


@pytest.mark.usefixtures("in_process")
def test_an_interrupted_reproduction_can_be_gone_on_from(recorded: Path, here: Path) -> None:
    with signal_at(2, signal.SIGTERM), pytest.raises(Interrupted):
        reproduce(str(recorded), output_dir=here / "out")
    assert (here / "out" / "checkpoints" / "checkpoint-2").is_dir()
    assert reproduce(str(recorded), output_dir=here / "out", resume=True).succeeded


def test_an_interruption_waits_until_the_trainer_has_saved(
    recorded: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = threading.Event()

    def trainer() -> None:
        with RunFolder(here / "out").locked():
            at_work.set()
            time.sleep(0.3)
            RunFolder(here / "out").set_status("interrupted", 3, 75, "saved")

    def launched(*_: object, **__: object) -> None:
        threads.append(threading.Thread(target=trainer))
        threads[0].start()
        assert at_work.wait(30)
        raise Interrupted

    threads: list[threading.Thread] = []
    monkeypatch.setattr(module, "launched", launched)
    with pytest.raises(Interrupted):
        reproduce(str(recorded), output_dir=here / "out")
    assert RunFolder(here / "out").status()["reason"] == "saved"
    threads[0].join()


def pretend(monkeypatch: pytest.MonkeyPatch, code: int, status: tuple[Any, ...] | None) -> list[list[str]]:
    """Let a launch end so; returns the commands."""
    commands: list[list[str]] = []

    def launched(command: list[str], *, shown: bool) -> tuple[int, str]:
        commands.append(list(command))
        folder = RunFolder(Path(command[command.index("--output_dir") + 1]))
        assert folder.status().get("reason") is None  # what an earlier launch left would be taken for this one's
        if status is not None:
            folder.set_status(*status)
        return code, ""

    monkeypatch.setattr(module, "launched", launched)
    return commands


@pytest.mark.parametrize(
    ("code", "status", "error", "message"),
    [
        (1, ("failed", 3, 2, "no such column"), UserError, "no such column"),
        (1, ("failed", 3, 1, "NaN"), TrainingFailed, "NaN"),
        (1, ("interrupted", 3, 75, "continue with --resume"), Interrupted, "--resume"),
        (1, None, TrainingFailed, "exit code 1; what it said stands above"),
        (1, ("done", 5, 0, None), TrainingFailed, "exit code 1"),
        (0, ("running", 3), TrainingFailed, "exit code 0"),
    ],
)
def test_how_a_launch_ended(
    code: int,
    status: tuple[Any, ...] | None,
    error: type[Exception],
    message: str,
    recorded: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    RunFolder(here / "out").set_status("failed", 1, 2, "an earlier mistake")
    before = RunFolder(here / "out").status()
    pretend(monkeypatch, code, status)
    with pytest.raises(error, match=message) as raised:
        reproduce(str(recorded), output_dir=here / "out")
    assert type(raised.value) is error
    if status is None:
        assert RunFolder(here / "out").status() == before


def test_the_command(recorded: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pretend(monkeypatch, 1, None)
    for more in ({}, {"config_file": CPU, "resume": True, "trust_remote_code": True}):
        with pytest.raises(TrainingFailed):
            reproduce(str(recorded), ["tracking.logging_steps=2"], output_dir=here / "out", **more)
    plain, full = (command[3:] for command in commands)
    assert plain[-4:] == [str(recorded), "tracking.logging_steps=2", "--output_dir", str(here / "out")]
    assert "--config_file" not in plain
    assert full[:2] == ["--config_file", str(CPU)]
    assert full.index("accel_trainer.train") < full.index("--resume") < full.index("--trust_remote_code")


def no_result(recorded: Path) -> dict[str, Any]:
    bare = recorded.with_name("bare.yaml")
    bare.write_text(recorded.read_text(encoding="utf-8").partition("\nresults:")[0] + "\n", encoding="utf-8")
    return {"recipe": str(bare)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (no_result, "records no result .*accel-trainer record"),
        (lambda _: {"overrides": ["training.learning_rate=0.5"]}, "training.learning_rate.*accel-trainer copy"),
        (lambda _: {"overrides": ["saving.load_best_model_at_end=false"]}, "saving.load_best_model_at_end"),
        (lambda _: {"overrides": ["training.sed=1"]}, "training.sed"),
        (lambda _: {"recipe": "nowhere"}, "nowhere: no such recipe"),
        (lambda _: {"config_file": Path("nowhere.yaml")}, r"nowhere\.yaml: there is no such file"),
        (lambda _: {"config_file": ROOT / "README.md"}, r"README\.md:\d+: "),
        (lambda _: {"tolerance": -1.0}, "--tolerance -1.0"),
    ],
    ids=range(8),
)
def test_mistakes_are_found_before_anything_starts(
    arguments: Callable[[Path], dict[str, Any]],
    message: str,
    recorded: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = pretend(monkeypatch, 0, None)
    with pytest.raises(UserError, match=message):
        reproduce(**{"recipe": str(recorded), **arguments(recorded)})
    assert commands == []


def test_the_verdict() -> None:
    cases = [(0.85, 0.0, "same"), (0.86, 0.02, "within"), (0.87, 0.02, "within"), (0.8701, 0.02, "missed")]
    cases += [(0.83, 0.02, "within"), (0.8299, 0.02, "missed"), (math.nan, 1.0, "missed")]
    for now, tolerance, verdict in cases:
        assert Comparison("test accuracy", 0.85, now, tolerance).verdict == verdict
    assert Comparison("test accuracy", 0.85, None, 1e9).verdict == "missed"


values = st.floats(-10, 10).map(rounded)


@given(values, values, st.floats(0, 5))
def test_a_verdict_is_the_same_both_ways_and_kinder_with_more_tolerance(a: float, b: float, tolerance: float) -> None:
    there, back = Comparison("x", a, b, tolerance), Comparison("x", b, a, tolerance)
    assert there.verdict == back.verdict
    assert there.holds <= Comparison("x", a, b, tolerance * 2).holds
    assert Comparison("x", a, a, 0.0).verdict == "same"
    assert there.holds == (abs(a - b) <= tolerance) or math.isclose(abs(a - b), tolerance, rel_tol=1e-5)


def test_every_recorded_number_is_compared() -> None:
    old = result(metrics={"validation": {"f1": 0.5}, "test": {"f1": 0.25, "accuracy": 0.75}}, tolerance=0.1)
    new = result(metrics={"test": {"f1": 0.25, "loss": 1.0}})
    assert compare(old, new) == (
        Comparison("validation f1", 0.5, None, 0.1),
        Comparison("test f1", 0.25, 0.25, 0.1),
        Comparison("test accuracy", 0.75, None, 0.1),
    )
    assert {comparison.tolerance for comparison in compare(old, new, 0.0)} == {0.0}


def test_the_same_hardware_is_compared_with_before_the_newest(recorded: Path) -> None:
    recipe = load_recipe(recorded)
    here, newer = result(), result(date="2026-05-01", hardware="a card", step=4)

    def recording(*results: Result) -> Recipe:
        return recipe.model_copy(update={"results": list(results)})

    assert comparable(recording(here, newer), result()) == here
    assert comparable(recording(here, newer), result(hardware="another")) == newer


def test_other_versions_are_named_where_numbers_differ(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = result(versions={"torch": "2.9", "datasets": "4"}), result(versions={"torch": "2.13", "datasets": "4"})
    missed = compare(old, result(metrics={}))
    print_reproduction(module.Reproduction("a", True, Path("run"), old, new, missed))
    out = capsys.readouterr().out
    assert "torch was 2.9 and is 2.13" in out
    assert "datasets was" not in out
    assert "lock" not in out
