"""Shares and the whole: what is cut is the whole again, none is kept beside its share, and what cannot be cut is told."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from harness import FAMILIES
from torch import Tensor, distributed, nn
from torch.distributed import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForSequenceClassification

from accel_trainer import sharding
from accel_trainer.classifier import Classifier
from accel_trainer.errors import HardwareError
from accel_trainer.model import encoder_layers


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """A group of one process."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    distributed.destroy_process_group()


@pytest.fixture(params=[0, 1, 2])
def one_of_three(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """A process of three, whose others answer nothing and need not be asked."""
    distributed.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=3)
    yield DeviceMesh("cpu", [0, 1, 2])
    distributed.destroy_process_group()


def classifier_of(family: str) -> Classifier:
    special = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 1)
    config = AutoConfig.for_model(
        family, vocab_size=50, pad_token_id=0, **FAMILIES[family], **(special if family == "modernbert" else {})
    )
    return Classifier(AutoModelForSequenceClassification.from_config(config))


def accelerator_of(precision: str = "no") -> Any:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(mixed_precision_policy=None))
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    return SimpleNamespace(mixed_precision=precision, state=state, autocast=autocast)


@pytest.mark.parametrize("rows", [7, 6, 2, 1])
def test_a_share_is_a_copy_of_its_rows_alone(one_of_three: DeviceMesh, rows: int) -> None:
    whole = torch.arange(4.0 * rows).reshape(rows, 4)
    like = distribute_tensor(torch.zeros(rows, 4), one_of_three, [Shard(0)], src_data_rank=None)
    part = sharding.share(whole, like)
    assert isinstance(part, DTensor)
    parts = whole.chunk(3)
    index = distributed.get_rank()
    expected = parts[index] if index < len(parts) else whole[:0]
    assert torch.equal(part.to_local(), expected)
    assert part.shape == whole.shape
    assert part.to_local().untyped_storage().nbytes() == expected.nbytes
    like.copy_(part)  # as `load_state_dict` does
    assert torch.equal(like.to_local(), expected)


def test_what_is_whole_stays_as_it_is() -> None:
    tensor = torch.arange(3.0)
    assert sharding.share(tensor, torch.zeros(3)) is tensor
    assert sharding.whole(tensor) is tensor
    assert sharding.gathered({"a": tensor}, keep=False) == {"a": tensor}
    assert not sharding.is_sharded(nn.Linear(1, 1))
    sharding.put_back(nn.Linear(1, 1))


@pytest.mark.parametrize("keep", [True, False])
def test_gathering_gives_back_what_was_cut(alone: DeviceMesh, keep: bool) -> None:
    whole = torch.randn(5, 3)
    parts = {"count": torch.tensor(4.0), "cut": distribute_tensor(whole, alone, [Shard(0)])}
    found: dict[str, Tensor] = sharding.gathered(parts, keep=keep)
    assert found.keys() == ({"count", "cut"} if keep else {"count"})
    assert found["count"] is parts["count"]
    if keep:
        assert not isinstance(found["cut"], DTensor)
        assert torch.equal(found["cut"], whole)


def test_a_forward_pass_alone_leaves_nothing_whole_after_putting_back(alone: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(model[0], mesh=alone, reshard_after_forward=False)
    fully_shard(model, mesh=alone)
    assert sharding.is_sharded(model)
    with torch.no_grad():
        model(torch.ones(1, 2))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    sharding.put_back(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_is_gathered_by_itself(family: str) -> None:
    classifier = classifier_of(family)
    accelerator = accelerator_of()
    sharding.make_ready(accelerator, classifier)
    layers = encoder_layers(classifier.model)
    named = [module for module in classifier.modules() if type(module).__name__ in classifier._no_split_modules]  # type: ignore[operator]
    assert named == list(layers or ())
    assert (layers is None) is (family == "albert")
    assert accelerator.state.fsdp_plugin.mixed_precision_policy is None


def test_in_bf16_shares_and_sums_of_gradients_are_float32() -> None:
    classifier, accelerator = classifier_of("bert"), accelerator_of("bf16")
    sharding.make_ready(accelerator, classifier)
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs
    ids = torch.full((1, 5), 3)
    logits = classifier.eval()({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}


def test_weights_that_cannot_be_shared_out_are_named() -> None:
    classifier = classifier_of("bert")
    classifier.model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(HardwareError, match="share out scale, which is a single number; use multi_gpu"):
        sharding.make_ready(accelerator_of(), classifier)
    classifier = classifier_of("bert")
    classifier.model.tied = nn.Linear(16, 2, bias=False)
    classifier.model.tied.weight = classifier.model.classifier.weight
    with pytest.raises(HardwareError, match=r"share out tied\.weight, which is classifier\.weight too"):
        sharding.make_ready(accelerator_of(), classifier)


def test_only_fsdp_shards() -> None:
    for kind in DistributedType:
        accelerator: Any = SimpleNamespace(distributed_type=kind)
        assert sharding.shards(accelerator) is (kind is DistributedType.FSDP)
