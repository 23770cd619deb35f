"""Logits of a split are those of a plain forward, each row once, whatever the budget and the number of processes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from harness import FAMILIES, OneOfMany, alone_on_the_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification

from accel_trainer.batching import divide_split
from accel_trainer.classifier import Classifier
from accel_trainer.evaluation import predict_logits
from accel_trainer.packing import Packing
from accel_trainer.tokenization import Tokens

layouts = pytest.mark.parametrize("packed", [True, False])
LENGTHS = [5, 3, 9, 3, 16, 4, 7, 7, 12, 3, 6]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=50, num_labels=3, pad_token_id=0, **FAMILIES["bert"])
    return AutoModelForSequenceClassification.from_config(config)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, 50, length).tolist() for length in LENGTHS]
    return Tokens({"input_ids": rows}, np.asarray(LENGTHS), truncated=0, pad_token_id=0)


@pytest.fixture(scope="module")
def plain(model: Any, tokens: Tokens) -> np.ndarray:
    """All rows at once, padded."""
    with torch.no_grad():
        return model.eval()(**tokens.inputs(np.arange(len(tokens)))).logits.numpy()


class Recorder(torch.nn.Module):
    """A model that counts: logits are the row's first token and its length, so that a misplaced row shows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []  # examples, and places computed for them
        self.modes: list[bool] = []

    def forward(self, inputs: dict[str, torch.Tensor], packing: Packing | None = None) -> torch.Tensor:
        ids = inputs["input_ids"]
        if packing is None:
            first, lengths = ids[:, 0], inputs["attention_mask"].sum(-1)
        else:
            first, lengths = ids[0, packing.starts], packing.cu_seqlens.diff()
        self.calls.append((len(first), ids.numel()))
        self.modes.append(self.training)
        return torch.stack([first, lengths], dim=1).double()


def expected_of(tokens: Tokens) -> np.ndarray:
    return np.asarray([[row[0], len(row)] for row in tokens.columns["input_ids"]], dtype=np.float32)


@layouts
@pytest.mark.parametrize("max_tokens", [1, 7, 16, 33, 60, 10_000])
def test_equals_a_plain_forward(
    model: Any, tokens: Tokens, plain: np.ndarray, max_tokens: int, packed: bool, tmp_path: Any
) -> None:
    with alone_on_the_cpu(tmp_path):
        classifier = Classifier(copy.deepcopy(model))
        logits = predict_logits(Accelerator(cpu=True), classifier, tokens, max_tokens, packed=packed)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, plain, rtol=0, atol=1e-6)


@layouts
@pytest.mark.parametrize("max_tokens", [1, 16, 40, 10_000])
def test_budget_is_kept(tokens: Tokens, max_tokens: int, packed: bool) -> None:
    recorder = Recorder()
    predict_logits(OneOfMany(0, 1), recorder, tokens, max_tokens, packed=packed)  # type: ignore[arg-type]
    assert all(places <= max_tokens or rows == 1 for rows, places in recorder.calls)
    padding = sum(places for _, places in recorder.calls) - sum(LENGTHS)
    assert padding == 0 if packed or max_tokens == 1 else padding > 0
    assert sum(rows for rows, _ in recorder.calls) == len(LENGTHS)


@layouts
@pytest.mark.parametrize("count", [2, 3, 5, 15])
@pytest.mark.parametrize("max_tokens", [1, 20, 10_000])
def test_many_processes_give_every_row_once_and_in_order(
    tokens: Tokens, count: int, max_tokens: int, packed: bool
) -> None:
    sent, calls, shapes = [], [], []
    for index in range(count):
        process, recorder = OneOfMany(index, count), Recorder()
        predict_logits(process, recorder, tokens, max_tokens, packed=packed)  # type: ignore[arg-type]
        assert len(process.sent) == 1
        sent.append(process.sent[0])
        calls.append(len(recorder.calls))
        shapes.append(process.sent[0].shape)
    assert len(set(calls)) == 1, "a forward may be a collective"
    assert len(set(shapes)) == 1, "gather needs equal shapes"
    gathered = torch.cat(sent)
    for index in range(count):
        process = OneOfMany(index, count, gathered)
        logits = predict_logits(process, Recorder(), tokens, max_tokens, packed=packed)  # type: ignore[arg-type]
        np.testing.assert_array_equal(logits, expected_of(tokens))
    division = divide_split(tokens.costs(packed=packed), count, max_tokens, packed=packed)
    fillers = sum(m.fillers for part in division for m in part)
    assert fillers or (count, max_tokens) != (15, 10_000)  # the case with idle processes is among them


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 5),
    st.sampled_from([1, 7, 60, 700, 10_000]),
)
def test_in_few_shapes_every_row_once_and_in_order(lengths: list[int], count: int, max_tokens: int) -> None:
    rows = [[row + 1] * length for row, length in enumerate(lengths)]
    tokens = Tokens({"input_ids": rows}, np.asarray(lengths), truncated=0, pad_token_id=0)
    shapes = tokens.shapes(len(tokens), count, max_tokens)

    def computed(index: int, gathered: torch.Tensor | None = None) -> tuple[OneOfMany, Recorder, np.ndarray]:
        process, recorder = OneOfMany(index, count, gathered), Recorder()
        logits = predict_logits(process, recorder, tokens, max_tokens, packed=False, shapes=shapes)  # type: ignore[arg-type]
        return process, recorder, logits

    done = [computed(index) for index in range(count)]
    assert len({len(recorder.calls) for _, recorder, _ in done}) == 1, "a forward may be a collective"
    assert len({process.sent[0].shape for process, _, _ in done}) == 1, "gather needs equal shapes"
    places = {(rows, rows * length) for rows, length in shapes}
    assert {call for _, recorder, _ in done for call in recorder.calls} <= places
    gathered = torch.cat([process.sent[0] for process, _, _ in done])
    for index in range(count):
        np.testing.assert_array_equal(computed(index, gathered)[2], expected_of(tokens))


@layouts
@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_as_it_was(tokens: Tokens, training: bool, packed: bool) -> None:
    recorder = Recorder().train(training)
    predict_logits(OneOfMany(0, 1), recorder, tokens, 20, packed=packed)  # type: ignore[arg-type]
    assert recorder.training is training
    assert not any(recorder.modes)


@layouts
def test_no_graph_is_kept(model: Any, tokens: Tokens, packed: bool, tmp_path: Any) -> None:
    classifier = Classifier(copy.deepcopy(model))
    with alone_on_the_cpu(tmp_path):
        predict_logits(Accelerator(cpu=True), classifier, tokens, 100, packed=packed)
    assert all(parameter.grad is None for parameter in classifier.parameters())
    batch = tokens.batch(np.asarray([0, 4]), packed=packed)
    classifier.eval()(
        batch.inputs, packing=batch.packing
    ).sum().backward()  # inference mode did not stick to the weights
    assert classifier.model.classifier.weight.grad is not None
