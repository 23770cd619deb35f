"""Which layout a run takes: packed where the model computes the same so, padded where it does not, none where neither holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import FAMILIES, SIZES
from keyed import DISENTANGLED, build

from accel_trainer import layout as module
from accel_trainer.classifier import Classifier
from accel_trainer.data import Split
from accel_trainer.errors import UserError
from accel_trainer.layout import choose_layout
from accel_trainer.tokenization import Tokens

CPU, XLA = torch.device("cpu"), torch.device("xla")
MOBILE = {**SIZES, "intra_bottleneck_size": 16, "embedding_size": 16}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "xlm": (
        {"emb_dim": 16, "n_layers": 2, "n_heads": 2},
        r"draws random numbers .* set model\.hidden_dropout=0\.0 model\.attention_dropout=0\.0",
    ),
    "fnet": (
        {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "max_position_embeddings": 32},
        "depends on the padding beside it",
    ),
}
LENGTHS = np.asarray([9, 4, 16, 5, 12, 7, 10, 3, 14, 6])


@pytest.fixture(scope="module")
def split() -> Split:
    draw = np.random.default_rng(0)
    texts = [draw.integers(5, 50, length).tolist() for length in LENGTHS]
    rows: Any = type("Rows", (), {"__len__": lambda self: len(LENGTHS)})()
    return Split(rows, Tokens({"input_ids": texts}, LENGTHS, truncated=0, pad_token_id=0))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The layouts that a model is tried in, whether packed, in their order."""
    tries: list[bool] = []
    on_rows = module.on_rows

    def noted(*arguments: Any, packed: bool) -> float:
        tries.append(packed)
        return on_rows(*arguments, packed=packed)

    monkeypatch.setattr(module, "on_rows", noted)
    return tries


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user is told."""
    told: list[str] = []
    monkeypatch.setattr(module.logger, "info", lambda message, *values: told.append(message % values))
    return told


@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_are_not_tried(family: str, split: Split, tried: list[bool], notes: list[str]) -> None:
    classifier = Classifier(build(family))
    assert choose_layout(classifier, split, "auto", CPU)
    assert choose_layout(classifier, split, "packed", CPU)
    assert not choose_layout(classifier, split, "padded", CPU)
    # XLA compiles for every new length, unless the user wants that.
    assert not choose_layout(classifier, split, "auto", XLA)
    assert choose_layout(classifier, split, "packed", XLA)
    assert tried == []
    assert notes == []


@pytest.mark.parametrize("family", ["camembert", "ernie"])
def test_another_family_is_tried_and_packed(family: str, split: Split, tried: list[bool], notes: list[str]) -> None:
    classifier = Classifier(build(family, **FAMILIES["roberta"]))
    assert choose_layout(classifier, split, "auto", CPU)
    assert tried == [True]
    assert choose_layout(classifier, split, "packed", CPU)
    assert tried == [True, True]
    for layout, device in (("padded", CPU), ("auto", XLA)):
        tried.clear()
        assert not choose_layout(classifier, split, layout, device)
        assert tried == [False]
    assert notes == []


@pytest.mark.parametrize(
    ("family", "sizes", "packed_first", "reason"),
    [
        ("mpnet", {}, False, "its attention is its own"),
        ("deberta-v2", DISENTANGLED, False, "its attention is its own"),
        ("gpt2", {}, True, "it fails: model: a decoder's attention cannot be packed"),
        ("mobilebert", MOBILE, True, r"its logits move by \de-0\d"),  # it looks at neighbouring tokens
    ],
)
def test_what_cannot_be_packed_is_padded_with_a_note(
    family: str,
    sizes: dict[str, Any],
    packed_first: bool,
    reason: str,
    split: Split,
    tried: list[bool],
    notes: list[str],
) -> None:
    classifier = Classifier(build(family, **sizes))
    assert not choose_layout(classifier, split, "auto", CPU)
    assert tried == [True, False][not packed_first :]
    with pytest.raises(UserError, match=rf"^--layout packed: .* cannot be packed \({reason}.*\); leave") as refused:
        choose_layout(classifier, split, "packed", CPU)
    why = str(refused.value).partition("(")[2].partition("); leave")[0]
    assert notes == [f"note: a {family} classifier is trained padded: packed, {why}"]
    assert not choose_layout(classifier, split, "padded", CPU)
    assert len(notes) == 1
    assert bool(classifier.forward_pass.shared) == (family == "deberta-v2")  # learnt, though packed came first


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize(("family", "p"), [("xlm", 0.1), ("fnet", 0.0)])
def test_what_keeps_the_promise_in_no_layout_is_refused(
    family: str, p: float, layout: str, split: Split, tried: list[bool]
) -> None:
    """XLM draws dropout of its own; FNet mixes padding into the text, whatever is set."""
    sizes, said = REFUSED[family]
    with pytest.raises(UserError, match=rf"^model: .*{said}"):
        choose_layout(Classifier(build(family, p, p, **sizes)), split, layout, CPU)
    assert tried[-1] is False
