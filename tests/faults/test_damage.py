"""Damage of every kind is recognised before anything is used, named, and passed over; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Outcome, alone_on_the_cpu, run_trainer, write_recipe_in

from accel_trainer import checkpoint, cli
from accel_trainer.checkpoint import flaw, load_checkpoint, newest_sound, save_checkpoint, save_tensors
from accel_trainer.errors import RunFolderError
from accel_trainer.tracking import speak_on
from accel_trainer.writing import MANIFEST, _seal

Harm = Callable[[Path], object]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def whole(place: Path) -> Outcome:
    """A run with a checkpoint and an evaluation at every step."""
    recipe = write_recipe_in(
        place,
        "whole.yaml",
        evaluation={"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"},
        saving={"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True},
    )
    outcome = run_trainer(recipe, place / "whole")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture
def copy(whole: Outcome, tmp_path: Path) -> Path:
    """The run, of which model and results are still to be made."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "model")
    (folder / "results.json").unlink()
    return folder


def sealed_again(folder: Path) -> None:
    """As whoever changed the files on purpose would leave it: a manifest that fits."""
    (folder / MANIFEST).unlink(missing_ok=True)
    _seal(folder)


def rewrite_manifest(change: Callable[[dict[str, Any]], Any]) -> Harm:
    def harm(folder: Path) -> None:
        entries = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(change(entries)))

    return harm


def write_state(value: Any) -> Harm:
    def harm(folder: Path) -> None:
        (folder / "trainer_state.json").write_text(value if isinstance(value, str) else json.dumps(value))
        sealed_again(folder)

    return harm


def replace_by(name: str, make: Callable[[Path], object]) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return harm


def named(name: str) -> Harm:
    """The manifest calls the weights by another name, under which the same bytes are found."""

    def harm(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "outside")
        entries = json.loads((folder / MANIFEST).read_text())
        entries[name.format(outside=folder.parent / "outside")] = entries["model.safetensors"]
        (folder / MANIFEST).write_text(json.dumps(entries))

    return harm


def of_another(folder: Path) -> None:
    shutil.copy(folder.parent / "checkpoint-1" / MANIFEST, folder / MANIFEST)


def to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def cut(name: str, length: int) -> Harm:
    return lambda folder: os.truncate(folder / name, length)


def longer(name: str) -> Harm:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\0")


def flipped(name: str, i: int) -> Harm:
    def harm(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[i] ^= 0x10
        (folder / name).write_bytes(data)

    return harm


def deleted(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def unnamed(name: str) -> Harm:
    return rewrite_manifest(lambda entries: {key: entry for key, entry in entries.items() if key != name})


def entry(value: Any) -> Harm:
    """What the manifest says of the weights."""
    return rewrite_manifest(lambda entries: {**entries, "model.safetensors": value})


def entry_with(**values: Any) -> Harm:
    return rewrite_manifest(
        lambda entries: {**entries, "model.safetensors": {**entries["model.safetensors"], **values}}
    )


def and_sealed(harm: Harm) -> Harm:
    def both(folder: Path) -> None:
        harm(folder)
        sealed_again(folder)

    return both


HUGE: tuple[Any, ...] = (10**18, 10**4000, -1, 1e999, None, "12", [], {}, "x" * 10**5)
NO_HASHES: tuple[Any, ...] = (None, 7, "", [], "0" * 64)
NO_ENTRIES: tuple[Any, ...] = (None, 7, "text", [1], {})
NO_STATES: list[tuple[str, Any, str]] = [
    ("nothing", "", "cannot be read"),
    ("half", '{"format": "acc', "cannot be read"),
    ("deep brackets", "[" * 10**6, "cannot be read"),
    ("null", None, "is not that of"),
    ("a list", [1], "is not that of"),
    ("empty", {}, "is not that of"),
    ("another program's", {"global_step": 3, "log_history": []}, "is not that of"),
    ("of a later format", {"format": "accel_trainer checkpoint 999"}, "is not that of an accel_trainer checkpoint 1"),
]


def harms_of(name: str) -> dict[str, tuple[Harm, str]]:
    return {
        f"{name} truncated": (cut(name, 9), rf"{name} has 9 bytes instead of \d+"),
        f"{name} emptied": (cut(name, 0), rf"{name} has 0 bytes instead of \d+"),
        f"{name} longer": (longer(name), f"{name} has .* bytes"),
        f"{name} first bit": (flipped(name, 0), f"{name} has other contents"),
        f"{name} last bit": (flipped(name, -1), f"{name} has other contents"),
        f"{name} deleted": (deleted(name), f"{name} is missing"),
        f"{name} a folder": (replace_by(name, Path.mkdir), f"{name} is missing"),
        f"{name} a pipe": (replace_by(name, os.mkfifo), f"{name} is missing"),
        f"{name} a link to nothing": (replace_by(name, to_nothing), f"{name} is missing"),
        f"{name} a link to itself": (replace_by(name, to_itself), f"{name} is missing"),
        f"{name} unnamed": (unnamed(name), f"does not name {name}"),
    }


HARMS: dict[str, tuple[Harm, str]] = {
    **harms_of("model.safetensors"),
    **harms_of("optimizer.safetensors"),
    **harms_of("trainer_state.json"),
    "no manifest": (
        lambda folder: (folder / MANIFEST).unlink(),
        r"manifest\.json cannot be read \(FileNotFoundError\)",
    ),
    "a manifest that is a folder": (replace_by(MANIFEST, Path.mkdir), r"cannot be read \(IsADirectoryError\)"),
    "an empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), "cannot be read"),
    "no entries": (rewrite_manifest(lambda entries: {}), "names no files"),
    "zeros": (lambda folder: (folder / MANIFEST).write_bytes(bytes(500)), "cannot be read"),
    "no UTF-8": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe{}"), "cannot be read"),
    "a list": (rewrite_manifest(list), "cannot be read"),
    "a number": (lambda folder: (folder / MANIFEST).write_text("7"), "cannot be read"),
    "null": (lambda folder: (folder / MANIFEST).write_text("null"), "cannot be read"),
    "deep brackets": (lambda folder: (folder / MANIFEST).write_text("[" * 10**6), r"cannot be read \(RecursionError\)"),
    "a manifest of another checkpoint": (of_another, "has other contents|has .* bytes"),
    "an absolute path": (named("{outside}"), "names '/.*', which is no file of this folder"),
    "a path upwards": (named("../outside"), r"names '\.\./outside', which is no file of this folder"),
    "a path down and up": (named("x/../../outside"), "which is no file of this folder"),
    "a name with a line feed": (named("x\n"), r"names 'x\\n', which is no file"),
    "a name that is no text": (named("\udc80"), r"names '\\udc80', which is no file"),
    "a name with a zero": (named("model\0"), r"names 'model\\x00', which is no file"),
    "a very long name": (named("x" * 5000), r"x{100} is missing|cannot be read \(OSError\)"),
    "no name": (named(""), " is missing"),
    **{
        f"bytes {str(value)[:9]!r} of {type(value).__name__}": (
            entry_with(bytes=value),
            "has .* bytes instead of .{1,20}$",
        )
        for value in HUGE
    },
    "a number too long to read": (
        lambda folder: (folder / MANIFEST).write_text('{"model.safetensors": {"bytes": ' + "9" * 5000 + "}}"),
        r"cannot be read \(ValueError\)",
    ),
    **{
        f"a hash that is {value!r}": (entry_with(sha256=value), "model.safetensors has other contents")
        for value in NO_HASHES
    },
    **{
        f"an entry that is {value!r}": (entry(value), r"cannot be read \((TypeError|KeyError)\)")
        for value in NO_ENTRIES
    },
    # What follows is no accident: the manifest fits.
    **{
        f"a state that is {kind}": (write_state(value), f"trainer_state.json {said}") for kind, value, said in NO_STATES
    },
    "tensors that are text": (
        and_sealed(lambda folder: (folder / "optimizer.safetensors").write_text("x" * 99)),
        "optimizer.safetensors is no safetensors file",
    ),
    "tensors cut off": (
        and_sealed(cut("model.safetensors", 200)),
        "model.safetensors is no safetensors file",
    ),
    "tensors of nothing": (
        and_sealed(cut("model.safetensors", 0)),
        "model.safetensors is no safetensors file",
    ),
}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for step in (1, 2):
        tensors = {"a": torch.full((30,), float(step)), "b": torch.ones(4, dtype=torch.bfloat16)}
        save_checkpoint(tmp_path / "checkpoints", step, tensors, tensors, {"step": step})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("kind", HARMS)
def test_damage_is_named_and_an_older_one_is_used(two: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    older, newest = two / "checkpoint-1", two / "checkpoint-2"
    assert newest_sound(two) == (newest, [])
    harm, said = HARMS[kind]
    harm(newest)
    path, complaints = newest_sound(two)
    assert path == older
    assert len(complaints) == 1
    assert complaints[0].startswith(f"{newest} is damaged: ")
    assert complaints[0].endswith("; it is passed over")
    assert len(complaints[0]) < len(str(two)) + 300
    assert complaints[0].isprintable()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_file", lambda *_: pytest.fail("something was loaded"))
        with pytest.raises(RunFolderError, match=said.removesuffix("$")):
            load_checkpoint(newest)
    assert load_checkpoint(older)[2] == {"step": 1}


def test_what_the_manifest_does_not_name_is_nobodys(two: Path) -> None:
    """A note, what a file browser leaves, what network storage calls a deleted file: no damage, and never opened."""
    for name in (".DS_Store", ".nfs0000012", "notes.txt", "pytorch_model.bin"):
        (two / "checkpoint-2" / name).write_bytes(b"\x80\x04.")
        (two / "checkpoint-2" / name).chmod(0)
    (two / "checkpoint-2" / "folder").mkdir()
    assert newest_sound(two) == (two / "checkpoint-2", [])
    assert load_checkpoint(two / "checkpoint-2")[2] == {"step": 2}


def test_a_link_to_the_same_bytes_is_no_damage(two: Path) -> None:
    """Large files may be moved to other storage."""
    path = two / "checkpoint-2" / "model.safetensors"
    path.rename(two / "moved")
    path.symlink_to(two / "moved")
    assert newest_sound(two) == (two / "checkpoint-2", [])
    assert torch.equal(load_checkpoint(path.parent)[0]["a"], torch.full((30,), 2.0))


def test_a_file_named_as_a_checkpoint(two: Path) -> None:
    (two / "checkpoint-3").write_text("x")
    (two / "checkpoint-4").symlink_to("nowhere")
    path, complaints = newest_sound(two)
    assert path == two / "checkpoint-2"
    assert len(complaints) == 2


def test_a_run_goes_back_to_the_newest_sound_one(place: Path, whole: Outcome, copy: Path) -> None:
    """Another damage to each; all of them are named, and what follows is what it would have been."""
    kinds = [
        "model.safetensors last bit",
        "optimizer.safetensors deleted",
        "no manifest",
        "a path upwards",
        "a state that is another program's",
        "tensors that are text",
    ]
    for step, kind in enumerate(kinds, start=3):
        HARMS[kind][0](copy / "checkpoints" / f"checkpoint-{step}")
    (copy / "outside").unlink(missing_ok=True)
    outcome = run_trainer(place / "whole.yaml", copy, "--resume")
    assert outcome.code == 0, outcome.err
    for step in range(3, 9):
        assert f"checkpoint-{step} is damaged" in outcome.err
    assert "step 2 of 8" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.lines == whole.lines
    assert outcome.weights_sha256 == whole.weights_sha256
    assert all(flaw(copy / "checkpoints" / f"checkpoint-{step}") is None for step in range(1, 9))


@pytest.mark.parametrize("kind", ["optimizer.safetensors first bit", "tensors cut off", "a list"])
def test_a_damaged_one_that_was_asked_for(place: Path, whole: Outcome, copy: Path, kind: str) -> None:
    HARMS[kind][0](copy / "checkpoints" / "checkpoint-8")
    asked = str(copy / "checkpoints" / "checkpoint-8")
    outcome = run_trainer(place / "whole.yaml", copy, "--resume_from_checkpoint", asked)
    assert outcome.code == 2
    assert "checkpoint-8: " in outcome.err
    assert "use another checkpoint, or --resume" in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(outcome.checkpoints()) == sorted(whole.checkpoints())


def test_a_model_is_no_checkpoint(place: Path, copy: Path) -> None:
    outcome = run_trainer(place / "whole.yaml", copy, "--resume_from_checkpoint", str(copy / "best"))
    assert outcome.code == 2
    assert "does not name optimizer.safetensors; use another checkpoint" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_checkpoint_of_another_encoder_under_a_manifest_that_fits(place: Path, copy: Path) -> None:
    """Nobody makes it by accident; it still ends in one message, before anything is loaded into the model."""
    folder = copy / "checkpoints" / "checkpoint-8"
    state = json.loads((folder / "trainer_state.json").read_text())

    def of_another_encoder(folder: Path) -> None:
        write_state(state)(folder)
        save_tensors({"a": torch.ones(3)}, folder / "model.safetensors")
        sealed_again(folder)

    for harm in (
        write_state({**state, "state": {**state["state"], "colour": "red"}}),
        write_state({**state, "state": 7}),
        write_state({**state, "mathematics": None}),
        write_state({name: value for name, value in state.items() if name != "optimizer_values"}),
        write_state({**state, "optimizer_values": []}),
        of_another_encoder,
    ):
        harm(folder)
        outcome = run_trainer(place / "whole.yaml", copy, "--resume")
        assert "Traceback" not in outcome.err
        assert outcome.code == 2
        assert "checkpoint-8: " in outcome.err


# --- pickles

# What transformers, torch, accelerate and their kin would open under these names, once a folder is given to them.
PICKLES = (
    *("pytorch_model.bin", "model.bin", "model.pt", "model.pth", "optimizer.bin", "optimizer.pt", "optimizer_0.bin"),
    *(
        "scheduler.bin",
        "scheduler.pt",
        "scaler.pt",
        "sampler.bin",
        "random_states_0.pkl",
        "rng_state.pth",
        "rng_state_0.pth",
    ),
    *(
        "training_args.bin",
        "custom_checkpoint_0.pkl",
        "dl_state_dict.bin",
        "adapter_model.bin",
        "state.pkl",
        "data.pkl",
    ),
    *("pytorch_model-00001-of-00001.bin", "pytorch_model_fsdp.bin", "tokenizer.pkl", "consolidated.00.pth"),
)


KINDS = ("pickle", "torch", "torch of old")


class Payload:
    """Whoever unpickles this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path, kind: str) -> bytes:
    if kind == "pickle":
        return pickle.dumps(Payload(marker), protocol=2)
    file = io.BytesIO()
    torch.save({"a": Payload(marker)}, file, _use_new_zipfile_serialization=kind == "torch")
    return file.getvalue()


def plant(folder: Path, marker: Path) -> None:
    """Pickles of every name and kind, and the manifest, if there is one, names them all."""
    for i, name in enumerate(PICKLES):
        (folder / name).write_bytes(pickled(marker, KINDS[i % len(KINDS)]))
    if (folder / MANIFEST).exists():
        sealed_again(folder)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a pickle makes when it is opened; at the end of the test it must not be there."""
    path = tmp_path / "unpickled"
    yield path
    assert not path.exists(), "a pickle was opened"


def accel_trainer(*arguments: str) -> tuple[int, str, str]:
    """A verb of `accel-trainer` in this process: exit code and what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        speak_on(True)
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_that_is_opened_would_be_seen(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickled(tmp_path / "unpickled", kind))
    with pytest.raises((pickle.UnpicklingError, AttributeError, TypeError, EOFError, RuntimeError)):
        torch.load(path, weights_only=True)
    assert not (tmp_path / "unpickled").exists()
    with path.open("rb") as file, unpickled() as seen:
        if kind == "pickle":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert (tmp_path / "unpickled").exists()
    assert any(name.endswith(".mkdir") for name in seen)


def test_planted_pickles_are_never_opened(place: Path, whole: Outcome, copy: Path, marker: Path) -> None:
    """In every folder of a run that goes on, and of one that labels text; manifests name them."""
    for folder in (copy, copy / "best", copy / "checkpoints", *(copy / "checkpoints").iterdir()):
        if folder.is_dir():
            plant(folder, marker)
    shutil.rmtree(copy / "checkpoints" / "checkpoint-8")
    outcome = run_trainer(place / "whole.yaml", copy, "--resume")
    assert outcome.code == 0, outcome.err
    assert "step 7 of 8" in outcome.err
    assert outcome.lines == whole.lines
    assert outcome.weights_sha256 == whole.weights_sha256
    plant(copy / "model", marker)
    with alone_on_the_cpu(copy / "cache"):
        for folder in (copy, copy / "best", copy / "model"):
            code, out, err = accel_trainer("predict", str(folder), "--text", "good soup")
            assert code == 0, err
            assert out.endswith("good soup\n")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_checkpoint_that_are_a_pickle(
    place: Path, whole: Outcome, copy: Path, marker: Path, kind: str
) -> None:
    for step, name in ((8, "model.safetensors"), (7, "optimizer.safetensors"), (6, "trainer_state.json")):
        folder = copy / "checkpoints" / f"checkpoint-{step}"
        (folder / name).write_bytes(pickled(marker, kind))
        sealed_again(folder)
    outcome = run_trainer(place / "whole.yaml", copy, "--resume")
    assert outcome.code == 0, outcome.err
    assert "checkpoint-8 is damaged: model.safetensors is no safetensors file" in outcome.err
    assert "checkpoint-7 is damaged: optimizer.safetensors is no safetensors file" in outcome.err
    assert "checkpoint-6 is damaged: trainer_state.json cannot be read" in outcome.err
    assert outcome.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("kind", KINDS)
def test_best_weights_that_are_a_pickle(place: Path, copy: Path, marker: Path, kind: str) -> None:
    """Where the run goes on they are missed; where it only has to load them, it ends."""
    (copy / "best" / "model.safetensors").write_bytes(pickled(marker, kind))
    sealed_again(copy / "best")
    outcome = run_trainer(place / "whole.yaml", copy, "--resume")
    assert "Traceback" not in outcome.err
    assert outcome.code == 0
    assert "the best weights so far" in outcome.err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["best", "model"])
def test_a_model_that_is_a_pickle(whole: Outcome, tmp_path: Path, marker: Path, kind: str, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(whole.folder / name, folder)
    (folder / "model.safetensors").write_bytes(pickled(marker, kind))
    with alone_on_the_cpu(tmp_path / "cache"):
        code, _, err = accel_trainer("predict", str(folder), "--text", "good soup")
    assert code == 2
    assert f"RUN_OR_MODEL: cannot load '{folder}': " in err
    assert "Traceback" not in err


@pytest.mark.parametrize("safe", [False, True], ids=["only a pickle", "a pickle named as tensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_to_start_from_that_is_a_pickle(
    whole: Outcome, tmp_path: Path, marker: Path, kind: str, safe: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(whole.folder / "model", base)
    (base / "model.safetensors").unlink()
    plant(base, marker)
    (base / ("model.safetensors" if safe else "pytorch_model.bin")).write_bytes(pickled(marker, kind))
    recipe = write_recipe_in(tmp_path, model={"checkpoint": str(base), "from_config": None, "train_tokenizer": None})
    outcome = run_trainer(recipe, tmp_path / "run")
    assert outcome.code == 2, outcome.err
    assert f"model.checkpoint: cannot load '{base}': " in outcome.err
    assert "Traceback" not in outcome.err
    with alone_on_the_cpu(tmp_path / "cache"):
        code, _, err = accel_trainer("predict", str(base), "--text", "good soup")
    assert code == 2
    assert f"RUN_OR_MODEL: cannot load '{base}': " in err


_seen: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and _seen is not None:
        _seen.append(".".join(map(str, arguments)))


@contextlib.contextmanager
def unpickled() -> Iterator[list[str]]:
    """Every class or function that any unpickler looks up meanwhile, and every call that could unpickle."""
    global _seen
    if not hasattr(sys, "_accel_trainer_hears"):  # a hook cannot be taken away again
        sys.addaudithook(_hear)
        sys._accel_trainer_hears = True  # type: ignore[attr-defined]
    _seen = seen = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            seen.append(name)
            return function(*arguments, **keywords)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "load"), (torch.jit, "load"), (pickle, "load"), (pickle, "loads")):
            patch.setattr(owner, name, recorded(f"{owner.__name__}.{name}", getattr(owner, name)))
        try:
            yield seen
        finally:
            _seen = None


def test_nothing_is_unpickled_by_a_whole_run(place: Path, whole: Outcome, copy: Path) -> None:
    """From the beginning, going on, and labelling: no unpickler looks anything up, of whatever file."""
    with unpickled() as seen:
        begun = run_trainer(place / "whole.yaml", copy.parent / "begun", "--stop_after", "2")
        assert begun.code == 75, begun.err
        gone_on = run_trainer(place / "whole.yaml", copy.parent / "begun", "--resume")
        assert gone_on.code == 0, gone_on.err
        with alone_on_the_cpu(copy / "cache"):
            assert accel_trainer("predict", str(gone_on.folder), "--text", "good soup")[0] == 0
    assert gone_on.weights_sha256 == whole.weights_sha256
    assert seen == []
