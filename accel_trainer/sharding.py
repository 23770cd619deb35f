"""Weights in shares: with FSDP each process holds a part of every tensor, and a layer whole only while it computes.

Nothing that is written knows of it: tensors are gathered whole on their way to a file, and cut into shares on their way back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from accel_trainer.classifier import Classifier
from accel_trainer.errors import HardwareError
from accel_trainer.model import encoder_layers


def shards(accelerator: Accelerator) -> bool:
    """Whether the launch asks for shares."""
    return accelerator.distributed_type is DistributedType.FSDP


def is_sharded(model: nn.Module) -> bool:
    """Whether a prepared model is held in shares."""
    return isinstance(model, FSDPModule)


def make_ready(accelerator: Accelerator, classifier: Classifier) -> None:
    """Tell Accelerate, which is about to shard a classifier, what is gathered by itself, and in which precision it computes.

    Shares stay float32, and gradients are added up in it. A layer's weights travel and compute in bf16, for else every layer's
    bf16 copy would be kept until its backward pass, on every process. What stands between them is autocast's, which Accelerate
    leaves out under FSDP; its own policy would have all of it in bf16, the sums of gradients too.

    Raises:
        HardwareError: it has weights that cannot be shared out.
    """
    met: dict[nn.Parameter, str] = {}
    for name, parameter in classifier.model.named_parameters(remove_duplicate=False):
        if parameter.dim() == 0:
            raise HardwareError(f"model: FSDP cannot share out {name}, which is a single number; use multi_gpu.yaml")
        if met.setdefault(parameter, name) != name:
            raise HardwareError(
                f"model: FSDP cannot share out {name}, which is {met[parameter]} too; use multi_gpu.yaml"
            )
    # The families' own lists lack the layers of some, and name smaller parts, which are not always called as modules.
    names = {type(layer).__name__ for layer in encoder_layers(classifier.model) or ()}
    classifier._no_split_modules = sorted(names)  # type: ignore[assignment]  # where Accelerate looks
    if accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        classifier.forward = accelerator.autocast()(classifier.forward)  # type: ignore[method-assign]


def put_back(model: nn.Module) -> None:
    """Let a model hold nothing but its shares, as after a backward pass: a forward pass alone leaves weights whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together of its shares, or as it is. Collective where there are shares."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors, those of shares on the CPU. Collective where there are shares.

    Args:
        tensors: the same names in the same order on every process.
        keep: whether this process wants those of shares; each of them passes by it in any case, one at a time.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if not isinstance(tensor, DTensor):
            found[name] = tensor
        elif keep:
            found[name] = complete.cpu()
    return found


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor that every process has, cut as `like` is; all of it where that is whole."""
    if not isinstance(like, DTensor):
        return tensor
    # The copy, for a share that is a part of the whole would keep all of it in memory.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None).clone()
