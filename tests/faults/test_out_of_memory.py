"""A device that holds too little: smaller micro-batches, the same mathematics, in one process and in one of two.

Memory is made small here: a forward or a backward pass of more than so many tokens raises what torch raises.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import ROOT, Outcome, alone_on_the_cpu, run_trainer, start, user_environment, write_recipe_in
from simulated import Rank, run_ranks
from torch import Tensor

from accel_trainer import collectives, device_memory, train
from accel_trainer.classifier import Classifier
from accel_trainer.device_memory import out_of_memory_named
from accel_trainer.errors import OutOfMemory
from accel_trainer.evaluation import predict_logits
from accel_trainer.feed import Feed
from accel_trainer.inputs import Inputs, read_inputs
from accel_trainer.recipe_file import load_recipe
from accel_trainer.resuming import continue_run
from accel_trainer.run import prepare
from accel_trainer.run_folder import RunFolder, opened
from accel_trainer.signals import StopRequest

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of 1 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)
NUMPY = MemoryError("Unable to allocate 2.00 GiB for an array with shape (268435456,) and data type float64")
NEVER = 10**9
# Plain gradient descent without a bound: a gradient that counts twice shows in the next loss. Adam would hide it.
RECIPE: dict[str, Any] = {
    "training": {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": None},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 4},
    "saving": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None},
}
BUDGET = ("--max_tokens_per_device", "64")  # a global batch of 60 to 100 tokens: two micro-batches; four at half of it


class Refusal(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Memory) -> Tensor:
        ctx.memory = memory
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ctx.memory.full()


@dataclasses.dataclass
class Memory:
    """What a device holds, and what it was asked for."""

    holds: int  # tokens of a micro-batch
    where: str = "forward"  # or backward, evaluation
    steps: tuple[int, int] = (0, NEVER)  # first and last, counted from 0, that find it so small
    after: int = 0  # micro-batches of a step that go through before it is so small
    error: Exception = CUDA
    rank: int | None = None  # all of them
    refused: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # step, tokens
    # What the failed pass had computed, as arrays under its tensors: they live as long as anything keeps the numbers.
    remains: list[weakref.ref[Any]] = dataclasses.field(default_factory=list)
    left: list[int] = dataclasses.field(default_factory=list)  # of `remains`, alive when the next pass began
    here: threading.local = dataclasses.field(default_factory=threading.local)  # step, rank, micro-batches gone through

    def refuses(self, tokens: int) -> bool:
        """Whether a pass of so many tokens, the next of its step, does not fit."""
        step, gone = getattr(self.here, "step", 0), getattr(self.here, "gone", 0)
        self.here.gone = gone + 1
        elsewhere = self.rank is not None and getattr(self.here, "rank", self.rank) != self.rank
        if elsewhere or tokens <= self.holds or gone < self.after or not self.steps[0] <= step <= self.steps[1]:
            return False
        self.refused.append((step, tokens))
        assert len(self.refused) < 50, "the same again and again"
        return True

    def full(self) -> Exception:
        """The error, made anew: one that was raised before would keep the frames it went through."""
        return type(self.error)(*self.error.args)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Memory]:
        """In force for every model of the package."""
        take, forward = Feed.take, Classifier.forward

        def taken(feed: Feed, step: int, max_tokens: int) -> Any:
            self.here.step, self.here.rank, self.here.gone = step, feed.process_index, 0
            return take(feed, step, max_tokens)

        def passed(model: Classifier, inputs: dict[str, Tensor], *rest: Any, **named: Any) -> Tensor:
            self.left.append(sum(remain() is not None for remain in self.remains))
            logits = forward(model, inputs, *rest, **named)
            if model.training == (self.where == "evaluation") or not self.refuses(inputs["input_ids"].numel()):
                return logits
            array = np.ones(logits.shape, dtype=np.float32)
            self.remains.append(weakref.ref(array))
            kept, array = torch.from_numpy(array), None
            logits = (
                logits * kept
            )  # so that the backward pass keeps it; so does this frame, if an error comes out of it
            if self.where != "backward":
                raise self.full()
            return Refusal.apply(logits, self)  # type: ignore[no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Feed, "take", taken)
            patch.setattr(Classifier, "forward", passed)
            yield self


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("memory")
    write_recipe_in(place, **RECIPE)
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Outcome:
    outcome = run_trainer(place / "tiny.yaml", place / "undisturbed", *BUDGET)
    assert outcome.code == 0, outcome.err
    return outcome


numbers = itertools.count()


def run_with(memory: Memory, place: Path, *arguments: str, folder: Path | None = None) -> Outcome:
    """A run of one process on a device of that memory."""
    with memory.installed():
        return run_trainer(place / "tiny.yaml", folder or place / f"run-{next(numbers)}", *(arguments or BUDGET))


def check_like(outcome: Outcome, undisturbed: Outcome) -> None:
    """The same training, to rounding."""
    assert outcome.code == 0, outcome.err
    assert [line["step"] for line in outcome.lines] == [line["step"] for line in undisturbed.lines]
    for key, tolerance in (("loss", 2e-6), ("grad_norm", 2e-5), ("learning_rate", 0), ("tokens", 0), ("epoch", 0)):
        found, expected = [[line[key] for line in run.steps] for run in (outcome, undisturbed)]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)
    for found, expected in zip(outcome.evaluations, undisturbed.evaluations, strict=True):
        assert found == pytest.approx(expected, abs=2e-6)
    for name, weight in undisturbed.weights.items():
        torch.testing.assert_close(outcome.weights[name], weight, rtol=1e-5, atol=1e-6)
    for key in ("steps", "examples", "tokens", "overflows"):
        assert outcome.json("results.json")["train"][key] == undisturbed.json("results.json")["train"][key]


def saved_budgets(folder: Path) -> dict[int, int]:
    """By step, the token budget in its checkpoint."""
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoints/*/trainer_state.json")]
    return {state["state"]["step"]: state["max_tokens_per_device"] for state in states}


def said(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if "out of memory" in line]


# --- one process


@pytest.mark.parametrize("step", [0, 5], ids=["first step", "later"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_is_repeated_in_smaller_micro_batches(place: Path, undisturbed: Outcome, where: str, step: int) -> None:
    memory = Memory(holds=32, where=where, steps=(step, NEVER))
    outcome = run_with(memory, place)
    assert [refused[0] for refused in memory.refused] == [step]
    check_like(outcome, undisturbed)
    (line,) = said(outcome)
    assert line.startswith("out of memory: going on with micro-batches of 32 tokens")
    assert "CUDA out of memory. Tried to allocate 20.00 MiB" in line
    assert saved_budgets(outcome.folder) == {saved: 64 if saved <= step else 32 for saved in (2, 4, 6, 8)}
    assert not (outcome.folder / "token_budget.json").exists()  # checkpoints say it
    assert outcome.json("status.json") == {"state": "done", "exit_code": 0, "step": 8, "reason": None}


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_gradients_of_earlier_micro_batches_do_not_count_twice(
    place: Path, undisturbed: Outcome, where: str
) -> None:
    memory = Memory(holds=16, where=where, steps=(3, 3), after=1)
    outcome = run_with(memory, place)
    assert memory.refused
    check_like(outcome, undisturbed)


def test_it_halves_until_it_fits(place: Path, undisturbed: Outcome) -> None:
    outcome = run_with(Memory(holds=16, steps=(2, NEVER)), place)
    check_like(outcome, undisturbed)
    assert ["of 32 tokens" in line for line in said(outcome)] == [True, False]
    assert ["of 16 tokens" in line for line in said(outcome)] == [False, True]
    assert saved_budgets(outcome.folder) == {2: 64, 4: 16, 6: 16, 8: 16}


def test_no_micro_batch_is_tried_twice(place: Path, undisturbed: Outcome) -> None:
    """A budget far above the global batch is not halved step by step, with the same computation failing every time."""
    memory = Memory(holds=32, steps=(3, NEVER))
    outcome = run_with(memory, place, "--max_tokens_per_device", "4096")
    check_like(outcome, undisturbed)
    (first, *others) = [tokens for _, tokens in memory.refused]
    assert not {first} & set(others)
    assert saved_budgets(outcome.folder)[8] in (16, 32)
    assert len(said(outcome)) == len(memory.refused) <= 2


@pytest.mark.parametrize("error", [CPU, NUMPY], ids=["CPU", "numpy"])
def test_whatever_memory_it_is(place: Path, undisturbed: Outcome, error: Exception) -> None:
    outcome = run_with(Memory(holds=32, steps=(1, 1), error=error), place)
    check_like(outcome, undisturbed)
    assert len(said(outcome)) == 1
    assert str(error) in said(outcome)[0]


def test_padded_as_well(place: Path, undisturbed: Outcome) -> None:
    memory = Memory(holds=32, steps=(1, NEVER), after=1)
    outcome = run_with(memory, place, *BUDGET, "--layout", "padded")
    assert memory.refused
    check_like(outcome, undisturbed)


def test_evaluation_in_smaller_micro_batches(place: Path, undisturbed: Outcome) -> None:
    """And training goes on with its dropout: what follows an evaluation is what shows it."""
    memory = Memory(holds=32, where="evaluation", steps=(0, 4))
    outcome = run_with(memory, place)
    assert [step for step, _ in memory.refused] == [3]  # the evaluation after the fourth step
    check_like(outcome, undisturbed)
    assert len(said(outcome)) == 1
    assert saved_budgets(outcome.folder) == {2: 64, 4: 32, 6: 32, 8: 32}


def test_the_last_evaluation_in_smaller_micro_batches(place: Path, undisturbed: Outcome) -> None:
    """After the last checkpoint; the next start finds out for itself again."""
    outcome = run_with(Memory(holds=32, where="evaluation"), place, *BUDGET, "evaluation.eval_strategy=no")
    assert outcome.code == 0, outcome.err
    np.testing.assert_allclose(outcome.losses, undisturbed.losses, rtol=2e-6)
    assert len(said(outcome)) == 1
    assert set(outcome.json("results.json")) == {"train", "validation", "test"}


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluating"])
def test_a_failed_evaluation_leaves_the_mode_of_the_model(place: Path, mode: bool) -> None:
    with alone_on_the_cpu(place / "datasets-cache"):
        inputs = read_inputs(load_recipe(place / "tiny.yaml", []))
        model = Classifier(copy.deepcopy(inputs.model)).train(mode)
        rank: Any = type("Alone", (), {"device": torch.device("cpu"), "num_processes": 1, "process_index": 0})()
        with Memory(holds=0, where="evaluation").installed(), pytest.raises(OutOfMemory):
            predict_logits(rank, model, inputs.splits["validation"].tokens, 64, packed=True)
    assert model.training == mode


def test_a_resumed_run_repeats_the_budget(place: Path, tmp_path: Path) -> None:
    """To the bit, on a device that holds everything: the micro-batches are what they were."""
    whole = run_with(Memory(holds=32, steps=(3, NEVER)), place, folder=tmp_path / "whole")
    shutil.copytree(whole.folder, tmp_path / "resumed")
    for name in ("checkpoints/checkpoint-8", "checkpoints/checkpoint-6", "model", "best"):
        shutil.rmtree(tmp_path / "resumed" / name)
    resumed = run_trainer(place / "tiny.yaml", tmp_path / "resumed", "--resume")
    assert resumed.code == 0, resumed.err
    assert "step 4 of 8" in resumed.err
    assert not said(resumed)
    assert resumed.json("run.json")["max_tokens_per_device"] == 32
    assert resumed.lines == whole.lines
    assert resumed.weights_sha256 == whole.weights_sha256
    assert saved_budgets(resumed.folder)[8] == 32


def test_a_resumed_run_obeys_the_command_line(place: Path, tmp_path: Path) -> None:
    """Which is larger than what the checkpoint and a process of another launch found out, and smaller than derived."""
    whole = run_with(Memory(holds=32), place, *BUDGET, "--stop_after", "4", folder=tmp_path / "whole")
    assert whole.code == 75
    RunFolder(whole.folder).set_token_budget(16)
    for given, expected in ((["--max_tokens_per_device", "48"], 48), ([], 16)):
        folder = tmp_path / f"resumed-{expected}"
        shutil.copytree(whole.folder, folder)
        resumed = run_trainer(place / "tiny.yaml", folder, "--resume", *given)
        assert resumed.code == 0, resumed.err
        assert resumed.json("run.json")["max_tokens_per_device"] == expected
        assert saved_budgets(folder)[8] == expected


def check_ended(outcome: Outcome, step: int, *parts: str) -> str:
    """A run that out of memory ended, with one clear message; gives it."""
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    (message,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.err.rstrip().endswith(message)
    for part in parts:
        assert part in message
    status = outcome.json("status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 1, step)
    assert status["reason"] == message.replace("error: ", "OutOfMemory: ", 1)
    return message


@pytest.mark.parametrize("where", ["forward", "backward", "evaluation"])
def test_single_examples_that_do_not_fit_end_the_run(place: Path, undisturbed: Outcome, where: str) -> None:
    memory = Memory(holds=0, where=where, steps=(3, NEVER))
    outcome = run_with(memory, place)
    step = 4 if where == "evaluation" else 3
    check_ended(outcome, step, "even single examples do not fit", "max_length", "--gradient_checkpointing", "is kept")
    assert 2 <= len(memory.refused) <= 6  # 64, 32, 16, …: to where every example stands alone and not much longer
    assert saved_budgets(outcome.folder) == {2: 64}
    resumed = run_trainer(place / "tiny.yaml", outcome.folder, "--resume")  # with more memory
    assert "step 2 of 8" in resumed.err
    check_like(resumed, undisturbed)


def test_a_budget_below_the_shortest_example_is_not_halved(place: Path) -> None:
    memory = Memory(holds=0)
    outcome = run_with(memory, place, "--max_tokens_per_device", "2")
    check_ended(outcome, 0, "even single examples do not fit")
    assert len(memory.refused) == 1
    assert "going on" not in outcome.err


@pytest.mark.parametrize("where", ["forward", "backward", "evaluation"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x16 and 8x2)"), ValueError("out of memory. No: a joke")],
    ids=["runtime", "value"],
)
def test_another_error_is_not_swallowed(place: Path, where: str, error: Exception) -> None:
    memory = Memory(holds=32, where=where, steps=(3, NEVER), error=error)
    outcome = run_with(memory, place)
    assert outcome.code == 1
    assert len(memory.refused) == 1
    assert f"{type(error).__name__}: {error}" in outcome.err
    assert "Traceback" in outcome.err
    assert "going on" not in outcome.err
    status = outcome.json("status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"] == f"{type(error).__name__}: {error}"


def test_an_update_that_does_not_fit_is_not_repeated(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some weights may have moved by then, and smaller micro-batches would not help."""
    attempts = []

    def step(optimizer: Any, closure: Any = None) -> None:
        attempts.append(optimizer)
        assert len(attempts) < 10
        raise CUDA

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    outcome = run_with(Memory(holds=NEVER), place)
    assert outcome.code == 1
    assert len(attempts) == 1
    assert "going on" not in outcome.err
    assert "CUDA out of memory" in outcome.err
    status = outcome.json("status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 1, 0)
    assert "CUDA out of memory" in status["reason"]


@pytest.mark.parametrize("where", ["forward", "backward", "evaluation"])
def test_nothing_of_the_failed_pass_is_kept(place: Path, where: str) -> None:
    """When the repeat begins its memory is free, without waiting for the garbage collector."""
    memory = Memory(holds=16, where=where, steps=(3, 3))
    gc.collect()
    gc.disable()
    try:
        outcome = run_with(memory, place)
    finally:
        gc.enable()
    assert outcome.code == 0, outcome.err
    assert len(memory.remains) == len(memory.refused) == 2
    assert set(memory.left) == {0}


# --- what counts as out of memory


@pytest.mark.parametrize(
    "error",
    [
        CUDA,
        CPU,
        NUMPY,
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.93 GB, other allocations: 200 MB)"),
        RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=lambda error: type(error).__name__ + str(error)[:4],
)
def test_named(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as caught, out_of_memory_named():
        raise error
    assert str(caught.value).rstrip(".") == (str(error).splitlines() or ["out of memory"])[0].rstrip(".")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError(),
        RuntimeError("two", "arguments"),
        ValueError("CUDA out of memory. Tried to allocate"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_not_named(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory_named():
        raise error
    assert caught.value is error


# --- one of two, in threads


def inputs_of(place: Path) -> Inputs:
    with alone_on_the_cpu(place / "datasets-cache"):
        return read_inputs(load_recipe(place / "tiny.yaml", []))


def train_two(inputs: Inputs, folder: Path, max_tokens: int = 64, *, given: bool = False) -> dict[int, int]:
    """Two ranks from the newest checkpoint to the end; their budgets when training began."""
    budgets = {}

    def work(rank: Rank) -> None:
        own = dataclasses.replace(inputs, model=copy.deepcopy(inputs.model))
        run = prepare(rank, own, RunFolder(folder), max_tokens_per_device=max_tokens)  # type: ignore[arg-type]
        continue_run(run, None, (), keep_token_budget=not given)
        budgets[rank.process_index] = run.max_tokens
        train.fit(run, StopRequest())

    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(2, work)
    return budgets


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["forward", "backward", "evaluation"])
def test_either_of_two_stops_and_asks_for_half(place: Path, tmp_path: Path, where: str, rank: int) -> None:
    inputs = inputs_of(place)
    with alone_on_the_cpu(place / "datasets-cache"):
        holds = 8 if where == "evaluation" else 24
        with (
            Memory(holds, where, steps=(3, NEVER), rank=rank).installed() as memory,
            pytest.raises(OutOfMemory) as caught,
        ):
            train_two(inputs, tmp_path)
        assert len(memory.refused) == 1
        assert f"process {rank} of 2 is out of memory" in str(caught.value)
        assert "--resume" in str(caught.value)
        assert "of 32 tokens" in str(caught.value)
        assert RunFolder(tmp_path).token_budget() == 32
        assert saved_budgets(tmp_path) == {2: 64}
        assert train_two(inputs, tmp_path) == {0: 32, 1: 32}
        assert saved_budgets(tmp_path) == {2: 64, 4: 32, 6: 32, 8: 32}


def test_two_obey_the_command_line(place: Path, tmp_path: Path) -> None:
    RunFolder(tmp_path).set_token_budget(32)
    with alone_on_the_cpu(place / "datasets-cache"):
        assert train_two(inputs_of(place), tmp_path, 48, given=True) == {0: 48, 1: 48}


def test_a_single_example_that_does_not_fit_one_of_two(place: Path, tmp_path: Path) -> None:
    """Nothing smaller is asked for: no resumed run could do better."""
    with (
        alone_on_the_cpu(place / "datasets-cache"),
        Memory(0, rank=1).installed(),
        pytest.raises(OutOfMemory) as caught,
    ):
        train_two(inputs_of(place), tmp_path, 2)
    assert "even single examples do not fit" in str(caught.value)
    assert RunFolder(tmp_path).token_budget() is None


# --- the file by which they agree


def test_the_smallest_wish_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.token_budget() is None
    for asked, kept in ((512, 512), (1024, 512), (128, 128)):
        folder.set_token_budget(asked)
        assert folder.token_budget() == kept
        assert json.loads((tmp_path / "token_budget.json").read_text())["max_tokens_per_device"] == kept


@pytest.mark.parametrize("resume", [True, False])
def test_a_new_run_has_no_wishes(tmp_path: Path, resume: bool) -> None:
    folder = RunFolder(tmp_path)
    folder.set_token_budget(64)
    with opened(folder, resume=resume):
        pass
    assert folder.token_budget() == (64 if resume else None)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"max_tokens'])
def test_a_wish_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "token_budget.json").write_text(text)
    assert RunFolder(tmp_path).token_budget() is None
    RunFolder(tmp_path).set_token_budget(64)
    assert RunFolder(tmp_path).token_budget() == 64


WISHING = """
import sys, time
from pathlib import Path
from accel_trainer.run_folder import RunFolder

folder, end = RunFolder(Path(sys.argv[1])), time.monotonic() + 3
print("ready", flush=True)
sys.stdin.readline()
while time.monotonic() < end:
    folder.set_token_budget(64)
    assert folder.token_budget() == 64
"""


def test_two_wishes_at_once(tmp_path: Path) -> None:
    """Balanced shares run out of memory together."""
    command = [sys.executable, "-c", WISHING, str(tmp_path)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [subprocess.Popen(command, env=user_environment(tmp_path), text=True, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert errors == ["", ""]
    assert RunFolder(tmp_path).token_budget() == 64
    assert [path.name for path in tmp_path.iterdir()] == ["token_budget.json"]


# --- one of two, as a user starts them


def main() -> int:
    """The program on devices of the memory that the environment describes, with a derived budget of 64 tokens."""
    device_memory.token_budget = lambda *_: 64  # type: ignore[assignment]
    with contextlib.ExitStack() as stack:
        for described in json.loads(os.environ["MEMORY"]):
            stack.enter_context(
                Memory(**{**described, "error": {"CUDA": CUDA, "CPU": CPU}[described["error"]]}).installed()
            )
        return train.main()


# Process 1 has too little from the first step on, and less from the sixth, when checkpoint-4 is there.
MEMORY = [
    {"rank": 1, "holds": 32, "error": "CPU", "where": "backward", "steps": [0, NEVER]},
    {"rank": 1, "holds": 16, "error": "CUDA", "steps": [5, NEVER]},
]
CONFIG = ROOT / "accelerate_configs" / "multi_cpu.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
PATHS = [str(path) for path in (Path(__file__).parent, Path(__file__).parent.parent, ROOT)]


@pytest.fixture(scope="module")
def launches(place: Path) -> list[tuple[Outcome, dict[str, Any], int | None]]:
    """The same line three times: how each ended, what status.json said then, and what token_budget.json."""
    line = [*LAUNCH, "-m", Path(__file__).stem, "tiny.yaml", "--output_dir", "two"]
    environment = {"MEMORY": json.dumps(MEMORY), "PYTHONPATH": os.pathsep.join(PATHS)}
    outcomes = []
    for more in ([], ["--resume"], ["--resume"]):
        done = start([*line, *more], place, **environment)
        outcome = Outcome(done.code, place / "two", done.out, done.err)
        outcomes.append((outcome, outcome.json("status.json"), RunFolder(outcome.folder).token_budget()))
    return outcomes


@pytest.mark.launch
def test_one_of_two_real_processes_ends_both(launches: list[tuple[Outcome, dict[str, Any], int | None]]) -> None:
    for (outcome, _, budget), halved, says in zip(
        launches[:2], (32, 16), ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory"), strict=True
    ):
        assert outcome.code not in (0, None)
        assert budget == halved
        messages = [line for line in outcome.err.splitlines() if line.startswith("error: ") and "memory" in line]
        assert messages
        for message in messages:
            assert says in message
            assert "process 1 of 2 is out of memory" in message
            assert "--resume" in message
            assert f"it goes on with micro-batches of {halved} tokens" in message


@pytest.mark.launch
def test_the_same_line_with_resume_goes_on(
    launches: list[tuple[Outcome, dict[str, Any], int | None]], undisturbed: Outcome
) -> None:
    (_, second, last) = [outcome for outcome, *_ in launches]
    assert "no checkpoint in" in second.err
    assert "step 4 of 8" in last.err
    check_like(last, undisturbed)
    assert last.json("run.json")["max_tokens_per_device"] == 16
    assert last.json("run.json")["hardware"]["num_processes"] == 2
    assert saved_budgets(last.folder) == {2: 32, 4: 32, 6: 16, 8: 16}
    assert launches[-1][1] == {"state": "done", "exit_code": 0, "step": 8, "reason": None}


@pytest.mark.launch
def test_whoever_watches_is_told_what_happened(launches: list[tuple[Outcome, dict[str, Any], int | None]]) -> None:
    for (outcome, status, _), step in zip(launches[:2], (0, 5), strict=True):
        assert (status["state"], status["exit_code"], status["step"]) == ("failed", 1, step)
        assert "process 1 of 2 is out of memory" in status["reason"]
        assert "accel_trainer/train.py" not in outcome.err  # a traceback of ours; the launcher has one of its own


if __name__ == "__main__":
    collectives.end_process(main())
