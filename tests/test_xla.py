"""XLA's room, as far as it can be seen without torch_xla; tests/xla goes the whole way."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import Outcome, alone_on_the_cpu, run_trainer, write_recipe_in
from support import reviews

from accel_trainer import collectives, predict, tokenization, xla
from accel_trainer.predict import load_predictor
from accel_trainer.shapes import choose_shapes

FULL = RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.")


@pytest.fixture
def as_on_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is told to be an XLA device: the same steps in few shapes, with the same ends of graphs."""
    monkeypatch.setattr(xla, "computes_on", lambda device: True)
    monkeypatch.setattr(xla, "keep_float32", lambda accelerator: None)
    monkeypatch.setattr(xla, "end_graph", lambda device: None)
    monkeypatch.setattr(xla, "compilations", lambda: 12)


@pytest.fixture
def full_at(as_on_xla: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the end of a graph find the memory full: by the function that ends it, those of its ends that do."""

    def full_at(caller: str, ends: range) -> None:
        met = 0

        def end_graph(device: torch.device) -> None:
            nonlocal met
            if sys._getframe(1).f_code.co_name == caller:
                met += 1
                if met in ends:
                    raise RuntimeError(*FULL.args)

        monkeypatch.setattr(xla, "end_graph", end_graph)

    return full_at


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Eight steps, dropout on, the last batch a short one; evaluated at the fourth."""
    folder = tmp_path_factory.mktemp("cpu")
    recipe = write_recipe_in(folder, evaluation={"eval_strategy": "steps", "eval_steps": 4})
    return run_trainer(recipe, folder / "run")


def trained(cpu: Outcome, folder: Path, *arguments: str) -> Outcome:
    return run_trainer(cpu.folder.parent / "tiny.yaml", folder / "run", *arguments)


def assert_same(one: Outcome, other: Outcome) -> None:
    assert other.code == 0, other.err
    assert [line["step"] for line in one.lines] == [line["step"] for line in other.lines]
    for a, b in zip(one.lines, other.lines, strict=True):
        assert b == pytest.approx(a, abs=5e-6)
    for name, weight in one.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=1e-5, atol=1e-6)


def test_bytes_have_few_lengths() -> None:
    lengths = {len(xla.filled(torch.ones(size, dtype=torch.uint8), size)) for size in range(1, 5000)}
    assert lengths == {1024, 2048, 4096, 8192}
    assert xla.filled(torch.tensor([7, 8]), 3).tolist() == [7, 8, *[0] * 1022]


def test_other_devices_see_nothing_of_it() -> None:
    weight = torch.nn.Linear(1, 1)
    weight(torch.ones(1)).backward()
    before = weight.weight.grad
    xla.renew_gradients(weight)
    xla.end_graph(torch.device("cpu"))
    assert weight.weight.grad is before


@pytest.mark.parametrize("spawned", [True, False])
def test_a_launcher_of_functions_is_told_by_what_is_raised(monkeypatch: pytest.MonkeyPatch, spawned: bool) -> None:
    monkeypatch.setattr(xla, "is_spawned", lambda: spawned)
    assert xla.end_function(0) == 0
    if spawned:
        with pytest.raises(SystemExit) as ended:
            xla.end_function(75)
        assert ended.value.code == 75
    else:
        assert xla.end_function(75) == 75


@pytest.mark.parametrize("by", xla.BF16)
def test_bf16_is_heard_and_stays_autocast(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """Whichever variable the launcher sets, and though a launch in float32 finds it set."""
    for name in (*xla.BF16, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    xla.hear_precision()
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    monkeypatch.setenv(by, "1")
    xla.hear_precision()
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for precision in ("bf16", "no"):
        monkeypatch.setenv(by, "1")
        accelerator: Any = SimpleNamespace(device=torch.device("xla"), mixed_precision=precision, native_amp=False)
        xla.keep_float32(accelerator)
        assert [os.environ[name] for name in xla.BF16] == ["0", "0"]
        assert accelerator.native_amp == (precision == "bf16")


@pytest.mark.parametrize("budget", [None, 24])
def test_few_shapes_are_the_same_training(cpu: Outcome, as_on_xla: None, tmp_path: Path, budget: int | None) -> None:
    """The larger budget has fillers inside its micro-batches, the smaller one two shapes."""
    done = trained(cpu, tmp_path, *([] if budget is None else ["--max_tokens_per_device", str(budget)]))
    assert_same(cpu, done)
    facts = done.json("run.json")
    assert (facts["layout"], facts["compilations"]) == ("padded", 12)
    assert done.err.count("12 graphs compiled\n") == 1
    assert set(facts["shapes"]) == {"training", "validation", "test"}
    shapes = facts["shapes"]["training"]
    assert len(shapes) == (1 if budget is None else 2)
    positions = done.json("results.json")["train"]
    if budget is None:  # the last batch, of four rows, takes as many places as the others
        longest = cpu.json("results.json")["train"]["tokens"] / (
            1 - cpu.json("results.json")["train"]["padding_avoided"]
        )
        assert (1 - positions["padding_avoided"]) * longest == pytest.approx(8 * shapes[0][0] * shapes[0][1])


def test_shapes_are_chosen_once(cpu: Outcome, as_on_xla: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each evaluation of a split anew."""
    chosen: list[tuple[int, ...]] = []

    def choose(lengths: np.ndarray, *asked: int) -> list[tuple[int, int]]:
        chosen.append((len(lengths), *asked))
        return choose_shapes(lengths, *asked)

    monkeypatch.setattr(tokenization, "choose_shapes", choose)
    done = trained(cpu, tmp_path, "--max_tokens_per_device", "24", "evaluation.eval_steps=2")
    assert len(done.evaluations) == 4
    assert sorted(chosen) == [(10, 10, 1, 24), (20, 20, 1, 24), (60, 8, 1, 24)]


@pytest.mark.parametrize("stops", [True, False])
def test_compilations_are_told_however_a_run_ends(cpu: Outcome, full_at: Any, tmp_path: Path, stops: bool) -> None:
    if not stops:
        full_at("apply_gradients", range(3, 4))
    done = trained(cpu, tmp_path, "--stop_after", "3")
    assert done.code == (75 if stops else 1)
    assert done.json("run.json")["compilations"] == 12
    assert stops or "the optimizer's state does not fit" in done.err


@pytest.mark.parametrize(("caller", "end"), [("add_gradients", 4), ("predict_logits", 1)])
def test_a_full_memory_shows_at_the_end_of_a_graph(
    cpu: Outcome, full_at: Any, tmp_path: Path, caller: str, end: int
) -> None:
    full_at(caller, range(end, end + 1))  # of the second step's micro-batch; in the first evaluation
    done = trained(cpu, tmp_path)
    assert_same(cpu, done)
    assert done.err.count("out of memory: going on with micro-batches of") == 1
    facts = done.json("run.json")
    for shapes in facts["shapes"].values():
        assert all(rows * length <= facts["max_tokens_per_device"] < 200 for rows, length in shapes)


def test_checkpointing_of_activations_is_neither_taken_nor_recommended(
    cpu: Outcome, full_at: Any, tmp_path: Path
) -> None:
    refused = trained(cpu, tmp_path, "--gradient_checkpointing")
    assert refused.code == 2
    assert "--gradient_checkpointing" in refused.err
    assert "Traceback" not in refused.err
    full_at("predict_logits", range(1, 99))
    small = trained(cpu, tmp_path / "small")
    assert small.code == 1
    assert "even single examples do not fit" in small.err
    assert "--gradient_checkpointing" not in small.err


def test_texts_are_labelled_in_few_shapes(cpu: Outcome, as_on_xla: None, tmp_path: Path) -> None:
    """However many, and of whatever lengths: the same shapes, and the same numbers as packed."""
    texts = [text for text, _ in reviews(70, seed=3)] + ["soup", "warm soup"]
    few = [texts, texts[:1], texts[5:12], texts[-2:]]
    with pytest.MonkeyPatch.context() as patch, alone_on_the_cpu(tmp_path / "packed"):
        patch.setattr(xla, "computes_on", lambda device: False)
        packed = load_predictor(str(cpu.folder))
        assert packed.packed
        assert packed.shapes is None
        expected = [packed.logits(some) for some in few]
    with alone_on_the_cpu(tmp_path / "padded"):
        predictor = load_predictor(str(cpu.folder), max_tokens_per_device=100)
        met: set[tuple[int, ...]] = set()
        predictor.model.register_forward_pre_hook(lambda model, given: met.add(tuple(given[0]["input_ids"].shape)))
        for some, wanted in zip(few, expected, strict=True):
            np.testing.assert_allclose(predictor.logits(some), wanted, rtol=0, atol=1e-6)
        assert predictor.shapes == [(100, 1), (50, 2), (25, 4), (12, 8), (6, 16)]
        assert len(met) > 1
        assert met <= set(predictor.shapes)


@pytest.mark.parametrize(("error", "code"), [(None, 2), (ValueError("odd"), 1)])
def test_the_launcher_is_told_that_predicting_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception | None, code: int
) -> None:
    monkeypatch.setattr(xla, "is_spawned", lambda: True)
    monkeypatch.setattr(collectives, "is_first_process", lambda: True)
    if error is not None:
        monkeypatch.setattr(predict, "prepare", lambda *arguments: (_ for _ in ()).throw(error))
    with alone_on_the_cpu(tmp_path / "cache"), pytest.raises(SystemExit) as ended:
        predict.main([str(tmp_path / "nowhere"), "--input", "no.csv", "--output", str(tmp_path / "out")])
    assert ended.value.code == code
