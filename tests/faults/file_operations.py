"""Processes that die at their k-th file operation, for every k, and what the next start makes of what they leave.

A forked child is killed before an operation that changes the disk, or in the middle of a write. Which operations there are
is told by Python's audit events; flushes and writes, which have none, are wrapped. What safetensors writes in Rust is
emulated: it is left unfinished at several lengths, under the temporary name that it uses and under the final one.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from accel_trainer import checkpoint, resuming, run
from accel_trainer.checkpoint import checkpoints, flaw, load_checkpoint, newest_sound, rotate, save_checkpoint
from accel_trainer.run import TrainerState
from accel_trainer.run_folder import RunFolder, write_json
from accel_trainer.writing import committed, damage, replaced, sweep

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
KEEP = 2


class Death:
    """Counts the operations of this process and ends it at the k-th. Armed once, in a process that is about to die."""

    def __init__(self, k: int) -> None:
        self._left = k
        sys.dont_write_bytecode = True
        sys.addaudithook(self._hear)
        for owner, name, wrap in (
            (os, "fsync", self._fsync),
            (io, "open", self._open),
            (checkpoint, "save_file", self._save_file),
        ):
            setattr(owner, name, wrap(getattr(owner, name)))

    def comes(self) -> bool:
        self._left -= 1
        return self._left == 0

    @staticmethod
    def now() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if (opens or event in CHANGES) and self.comes():
            self.now()

    def _fsync(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            if self.comes():
                self.now()
            fsync(descriptor)

        return wrapped

    def _open(self, opening: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            file = opening(*arguments, **keywords)
            if file.writable():
                write = file.write

                def half(data: Any) -> int:
                    if self.comes():
                        write(data[: len(data) // 2])
                        file.flush()
                        self.now()
                    done: int = write(data)
                    return done

                file.write = half
            return file

        return wrapped

    def _save_file(self, save_file: Callable[..., None]) -> Callable[..., None]:
        def wrapped(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            whole = save(tensors, metadata)
            hidden = path.with_name(".tmpZ9yX8w")
            for place, length in ((hidden, 6), (hidden, len(whole)), (path, 0), (path, len(whole) // 2)):
                if self.comes():
                    place.write_bytes(whole[:length])
                    self.now()
            save_file(tensors, path, metadata=metadata)

        return wrapped


@dataclass
class Scenario:
    """What stands in a run folder, what a process does there, and what must be true after a death and after the deed."""

    prepare: Callable[[RunFolder], object]
    act: Callable[[RunFolder], object]
    at_death: Callable[[RunFolder], object]  # before anything is put in order
    after_start: Callable[[RunFolder], object]  # when the next start has put in order what was left
    done: Callable[[RunFolder], object]


def die_everywhere(folder: Path) -> dict[str, int]:
    """Die at every file operation of every scenario.

    Args:
        folder: an empty one to work in.

    Returns:
        number of deaths of each scenario.

    Raises:
        AssertionError: a death took something that must not be lost, or left something that must not be there.
    """
    return {name: deaths(folder / name.replace(" ", "-"), scenario) for name, scenario in SCENARIOS.items()}


def deaths(folder: Path, scenario: Scenario) -> int:
    """Die at every file operation of a scenario, and give their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # what a process wrote outlives it without
        return _deaths(folder, scenario)


def _deaths(folder: Path, scenario: Scenario) -> int:
    template = folder / "template"
    template.mkdir(parents=True)
    scenario.prepare(RunFolder(template))
    for k in itertools.count(1):
        path = folder / str(k)
        shutil.copytree(template, path)
        if not dies(k, lambda path=path: scenario.act(RunFolder(path))):  # type: ignore[misc]
            scenario.done(RunFolder(path))
            return k - 1
        try:
            scenario.at_death(RunFolder(path))
            start(RunFolder(path))
            scenario.after_start(RunFolder(path))
            scenario.act(RunFolder(path))
            scenario.done(RunFolder(path))
        except Exception as error:
            error.add_note(f"killed at operation {k}: {path}")
            raise
        shutil.rmtree(path)
    raise AssertionError


def dies(k: int, act: Callable[[], object]) -> bool:
    """Whether a process that does this is killed at its k-th operation, or gets through."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Death(k)
            act()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed; its traceback is on stderr"
    return os.WIFSIGNALED(status)


def start(folder: RunFolder) -> int:
    """What a start with --resume does about what it finds.

    Returns:
        the step it goes on from, 0 for the beginning.
    """
    sweep(folder.path, folder.checkpoints, folder.predictions)
    for _, path in checkpoints(folder.checkpoints):
        assert flaw(path) is None, "half written or half deleted, and still named as a checkpoint"
    newest, _ = newest_sound(folder.checkpoints)
    state = TrainerState() if newest is None else TrainerState(**load_checkpoint(newest)[2]["state"])
    resuming.settle_best(fake_run(folder, state))
    assert list(folder.path.rglob(".*")) == []
    return state.step


def fake_run(folder: RunFolder, state: TrainerState) -> Any:
    """As much of a run as the functions need that write."""
    recipe = SimpleNamespace(saving=SimpleNamespace(save_total_limit=KEEP))
    return SimpleNamespace(
        folder=folder,
        state=state,
        is_main=True,
        inputs=SimpleNamespace(recipe=recipe),
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None, scaler=None, num_processes=1),
        max_tokens=64,
    )


# --- checkpoints


def weights(step: int, of: str) -> dict[str, Tensor]:
    return {"a": torch.full((3, 5), float(step)), "of": torch.tensor(list(of.encode()))}


def checkpoint_of(folder: RunFolder, step: int, of: str, best_step: int | None = None) -> None:
    state = TrainerState(step=step, best_step=best_step)
    save_checkpoint(folder.checkpoints, step, weights(step, of), weights(step, of), {"of": of, "state": vars(state)})


def old_checkpoints(folder: RunFolder) -> None:
    for step in (1, 2, 3):
        checkpoint_of(folder, step, "old")


def sound(folder: RunFolder) -> dict[int, str]:
    """Steps of the sound checkpoints, and whose they are, seen in every file."""
    found = {}
    for step, path in checkpoints(folder.checkpoints):
        if flaw(path) is None:
            model, optimizer, state = load_checkpoint(path)
            of = state["of"]
            assert state["state"]["step"] == step
            for tensors in (model, optimizer):
                assert all(torch.equal(tensors[name], tensor) for name, tensor in weights(step, of).items())
            found[step] = of
    return found


def save_fourth(folder: RunFolder) -> None:
    checkpoint_of(folder, 4, "new")
    rotate(folder.checkpoints, KEEP, 4)


def save_third_again(folder: RunFolder) -> None:
    checkpoint_of(folder, 3, "new")
    rotate(folder.checkpoints, KEEP, 3)


def fourth_at_death(folder: RunFolder) -> None:
    found = sound(folder)
    assert set(found) >= ({1, 2, 3} if 4 not in found else {3, 4})


def fourth_after_start(folder: RunFolder) -> None:
    found = sound(folder)
    assert max(found) in (3, 4)
    assert len(found) >= KEEP
    assert all(of == ("new" if step == 4 else "old") for step, of in found.items())


def third_at_death(folder: RunFolder) -> None:
    found = sound(folder)
    assert set(found) >= ({2, 3} if found.get(3) == "new" else {1, 2})
    if 3 not in found:  # between the two renames
        assert flaw(folder.checkpoints / ".checkpoint-3.old") is None


def third_after_start(folder: RunFolder) -> None:
    found = sound(folder)
    assert max(found) == 3
    assert len(found) >= KEEP


def has(expected: dict[int, str]) -> Callable[[RunFolder], None]:
    def check(folder: RunFolder) -> None:
        assert sound(folder) == expected
        assert len(checkpoints(folder.checkpoints)) == len(expected)
        assert list(folder.path.rglob(".*")) == []

    return check


def nothing(folder: RunFolder) -> None:
    """Nothing is asked."""


# --- the best weights


def model_of(folder: Path, step: int) -> None:
    with committed(folder) as place:
        checkpoint.save_tensors(weights(step, "best"), place / "model.safetensors")
        (place / "training.json").write_text(json.dumps({"step": step}))


def an_older_best(folder: RunFolder) -> None:
    old_checkpoints(folder)
    checkpoint_of(folder, 4, "old", best_step=2)
    model_of(folder.best, 2)


@contextmanager
def without_a_model() -> Iterator[None]:
    """`write_best` and `save` on tensors of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_model", lambda of, path, scores, step: model_of(path, step))
        patch.setattr(run, "whole_weights", lambda of: weights(of.state.step, "new"))
        patch.setattr(run, "optimizer_state", lambda of: (weights(of.state.step, "new"), {}))
        patch.setattr(run, "mathematics", lambda inputs: {})
        patch.setattr(
            checkpoint,
            "save_checkpoint",
            lambda path, step, model, optimizer, state: save_checkpoint(
                path, step, model, optimizer, {**state, "of": "new"}
            ),
        )
        yield


def write_a_better_one(folder: RunFolder) -> None:
    """As at the end of a step that is evaluated, is the best so far, and is saved."""
    with without_a_model():
        going_on = fake_run(folder, TrainerState(step=5, best_step=5))
        run.write_best(going_on, {"f1": 0.9})
        run.save(going_on)


def best_is_remembered(folder: RunFolder) -> None:
    """The newest checkpoint and the best weights fit each other: both old, or both new."""
    newest, _ = newest_sound(folder.checkpoints)
    assert newest is not None
    remembered = load_checkpoint(newest)[2]["state"]["best_step"]
    assert remembered in (2, 5)
    assert folder.weights_step(folder.best) == remembered
    assert len(sound(folder)) >= KEEP


def better_is_there(folder: RunFolder) -> None:
    best_is_remembered(folder)
    assert sound(folder) == {4: "old", 5: "new"}
    assert list(folder.path.rglob(".*")) == []


# --- one file, one folder, and a start itself


def a_model(folder: RunFolder) -> None:
    write_file(folder, "old")
    model_of(folder.model, 1)


def write_file(folder: RunFolder, text: str) -> None:
    with replaced(folder.path / "status.json") as place, place.open("w") as file:
        file.write(text * 1000)
    write_json(folder.predictions / "test.json", [text] * 100)


def write_file_and_model(folder: RunFolder) -> None:
    write_file(folder, "new")
    model_of(folder.model, 2)


def files_are_whole(folder: RunFolder) -> None:
    assert (folder.path / "status.json").read_text() in ("old" * 1000, "new" * 1000)
    assert json.loads((folder.predictions / "test.json").read_text()) in (["old"] * 100, ["new"] * 100)
    if folder.model.exists():
        assert folder.weights_step(folder.model) in (1, 2)
    else:
        assert damage(folder.path / ".model.old") is None


def model_is_whole(folder: RunFolder) -> None:
    files_are_whole(folder)
    assert folder.model.exists()


def all_is_new(folder: RunFolder) -> None:
    assert (folder.path / "status.json").read_text() == "new" * 1000
    assert folder.weights_step(folder.model) == 2
    assert list(folder.path.rglob(".*")) == []


def leftovers(folder: RunFolder) -> None:
    """Of deaths at several places: a start has to put back, to remove and to settle."""
    an_older_best(folder)
    write_file(folder, "old")
    folder.best.rename(folder.best_before)
    model_of(folder.path / ".best.old", 5)
    (folder.checkpoints / "checkpoint-4").rename(folder.checkpoints / ".checkpoint-4.old")
    for name in (".checkpoint-3.old", ".checkpoint-5.writing", ".checkpoint-0.deleted"):
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "model.safetensors").write_bytes(b"half")
    for path in (folder.path / ".status.json.77.writing", folder.predictions / ".test.json.77.writing"):
        path.write_text("ha")


def started(folder: RunFolder) -> None:
    assert sound(folder) == dict.fromkeys((1, 2, 3, 4), "old")
    assert folder.weights_step(folder.best) == 2
    assert list(folder.path.rglob(".*")) == []


SCENARIOS = {
    "a checkpoint": Scenario(
        old_checkpoints, save_fourth, fourth_at_death, fourth_after_start, has({3: "old", 4: "new"})
    ),
    "the first checkpoint": Scenario(nothing, save_fourth, nothing, nothing, has({4: "new"})),
    "a checkpoint again": Scenario(
        old_checkpoints, save_third_again, third_at_death, third_after_start, has({2: "old", 3: "new"})
    ),
    "the best weights": Scenario(an_older_best, write_a_better_one, nothing, best_is_remembered, better_is_there),
    "files and a model": Scenario(a_model, write_file_and_model, files_are_whole, model_is_whole, all_is_new),
    "a start": Scenario(leftovers, start, nothing, started, started),
}
