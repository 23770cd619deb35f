"""On XLA's own CPU devices, through Accelerate's TPU launcher: the CPU's steps, few compilations, checkpoints that move.

They need torch_xla and the torch of its version, in an environment of their own: `make test-xla`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import ROOT, Outcome, start, write_recipe_in

pytest.importorskip("torch_xla", reason="make test-xla brings it")
pytestmark = pytest.mark.launch

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
SOMETIMES = {
    "evaluation": {"eval_strategy": "steps", "eval_steps": 8},
    "saving": {"save_strategy": "steps", "save_steps": 8, "load_best_model_at_end": False},
    "training": {"num_train_epochs": 3},
}


def on_cpu(folder: Path, *arguments: str) -> Outcome:
    command = [*LAUNCH, str(ROOT / "accelerate_configs/cpu.yaml"), "-m", "accel_trainer.train", *arguments]
    return start(command, folder, USE_TORCH_XLA="false")


def on_xla(folder: Path, devices: int, *arguments: str, bf16: bool = False, **environment: str) -> Outcome:
    precision = [] if bf16 else ["--mixed_precision", "no"]
    command = [*LAUNCH, str(ROOT / "accelerate_configs/tpu.yaml"), *precision, "-m", "traced_train", *arguments]
    return start(
        command,
        folder,
        timeout=600,
        PJRT_DEVICE="CPU",
        CPU_NUM_DEVICES=str(devices),
        COMPILED="compiled",
        PYTHONPATH=f"{ROOT}:{Path(__file__).parent}",
        **environment,
    )


def run(outcome: Outcome, name: str) -> Outcome:
    """What it left in a folder."""
    assert outcome.code == 0, outcome.err
    return Outcome(outcome.code, outcome.folder / name, outcome.out, outcome.err)


def compiled(folder: Path) -> list[int]:
    """How many graphs there were after each step."""
    return [int(line) for line in (folder / "compiled").read_text().splitlines()]


SEVERAL_SHAPES = ("--max_tokens_per_device", "24")


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """24 steps in three epochs, the last batch of each a short one, dropout on."""
    folder = tmp_path_factory.mktemp("cpu")
    recipe = write_recipe_in(folder, **SOMETIMES)
    return run(on_cpu(folder, str(recipe), "--output_dir", "run"), "run")


@pytest.fixture(scope="module", params=[1, 2])
def xla(request: pytest.FixtureRequest, cpu: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same on one device, and on two, in two shapes."""
    folder = tmp_path_factory.mktemp("xla")
    line = (str(cpu.folder.parent / "tiny.yaml"), "--output_dir", "run", *SEVERAL_SHAPES)
    return run(on_xla(folder, request.param, *line), "run")


def assert_same(one: Outcome, other: Outcome) -> None:
    assert [line["step"] for line in one.lines] == [line["step"] for line in other.lines]
    for a, b in zip(one.lines, other.lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-5)
    for name, weight in one.weights.items():
        assert (weight - other.weights[name]).abs().max() < 1e-5, name


def test_the_steps_are_those_of_the_cpu(cpu: Outcome, xla: Outcome) -> None:
    assert len(xla.steps) == 24
    assert_same(cpu, xla)


def assert_compiled_once_for_each_shape(done: Outcome, beside: int) -> None:
    """After an epoch and its evaluation nothing new comes: not for other rows, lengths, steps, rates, or short batches."""
    facts, after = done.json("run.json"), compiled(done.folder.parent)
    shapes = {role: len(found) for role, found in facts["shapes"].items()}
    assert shapes == {"training": 2, "validation": 3, "test": 2}
    # Beside the shapes: the first update, where it makes a state, and the others, each with a reduction of its own on two
    # devices; what adds up the losses, and what reads them; what agrees on a stop. Of two devices one may note the first step
    # while the other still compiles for it.
    added = after[7] - after[0] - shapes["training"]
    assert added == beside if facts["hardware"]["num_processes"] == 1 else added <= beside
    assert after[8] - after[7] == shapes["validation"] + 1  # logits are gathered
    assert after[8] == after[23]
    assert facts["compilations"] - after[23] <= shapes["test"] + 1


def test_graphs_are_compiled_once_for_each_shape(xla: Outcome) -> None:
    assert_compiled_once_for_each_shape(xla, {1: 4, 2: 8}[xla.json("run.json")["hardware"]["num_processes"]])


def test_gradient_descent_compiles_no_more(cpu: Outcome, tmp_path: Path) -> None:
    line = (str(cpu.folder.parent / "tiny.yaml"), "--output_dir", "run", *SEVERAL_SHAPES, "training.optim=sgd")
    assert_compiled_once_for_each_shape(run(on_xla(tmp_path, 1, *line), "run"), 3)


def test_a_step_that_adds_one_is_seen(cpu: Outcome, tmp_path: Path) -> None:
    recipe = str(cpu.folder.parent / "tiny.yaml")
    run(on_xla(tmp_path, 1, recipe, "--output_dir", "run", RAGGED="20"), "run")
    after = compiled(tmp_path)
    assert after[18] < after[19] == after[23]


@pytest.mark.parametrize("devices", [1, 2])
def test_checkpoints_move_between_xla_and_cpu(cpu: Outcome, tmp_path: Path, devices: int) -> None:
    line = (str(cpu.folder.parent / "tiny.yaml"), "--output_dir", "run", "--resume")
    for until, begins in ((6, on_xla), (12, on_cpu), (None, on_xla)):
        stop = [] if until is None else ["--stop_after", str(until)]
        place = (tmp_path, devices) if begins is on_xla else (tmp_path,)
        done = begins(*place, *line, *stop)
        assert until is None or f"interrupted after step {until} of 24" in done.err + done.out, done.err
    assert_same(cpu, run(done, "run"))


@pytest.mark.parametrize("by", ["XLA_USE_BF16", "XLA_DOWNCAST_BF16"])
def test_weights_are_float32_whatever_the_precision(cpu: Outcome, tmp_path: Path, by: str) -> None:
    """Accelerate sets one of the variables on TPUs; it makes all that is on the device bf16."""
    recipe = str(cpu.folder.parent / "tiny.yaml")
    done = on_xla(tmp_path, 1, recipe, "--output_dir", "run", "training.max_steps=2", bf16=True, **{by: "1"})
    assert run(done, "run").json("run.json")["hardware"]["mixed_precision"] == "bf16"
    weights = run(done, "run").weights
    assert any((weight.bfloat16().float() != weight).any() for weight in weights.values())
    assert run(done, "run").losses == pytest.approx(cpu.losses[:2], rel=0.02)
    assert run(done, "run").losses != pytest.approx(cpu.losses[:2], rel=1e-6)


def test_the_launcher_ends_with_the_exit_code(cpu: Outcome, tmp_path: Path) -> None:
    done = on_xla(tmp_path, 1, str(cpu.folder.parent / "tiny.yaml"), "training.learning_rat=3")
    assert done.code == 2
    assert "learning_rat" in done.err
