"""The optimizer and its schedule, by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler
from transformers.optimization import Adafactor

from accel_trainer import xla
from accel_trainer.errors import UserError
from accel_trainer.model import layer_depths
from accel_trainer.plan import TrainingPlan
from accel_trainer.recipe import TrainingSection
from accel_trainer.sharding import whole

CLIP_EPSILON = 1e-6  # torch divides by norm + this, so that a little below the bound it clips already


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: biases, and all of a normalisation layer."""
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    return norms | {name for name, _ in model.named_parameters() if name.endswith("bias")}


def parameter_groups(model: PreTrainedModel, section: TrainingSection) -> list[dict[str, Any]]:
    """Trainable parameters grouped by learning rate and decay.

    With `layerwise_lr_decay` γ, a parameter at depth d of L + 1 learns at learning_rate · γ^(L + 1 - d)
    (Howard and Ruder, "Universal language model fine-tuning", ACL 2018).
    """
    exempt = undecayed(model)
    depths = layer_depths(model) if section.layerwise_lr_decay is not None else {}
    top = max(depths.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth, decays = depths.get(name, top), name not in exempt
        factor = 1.0 if section.layerwise_lr_decay is None else section.layerwise_lr_decay ** (top - depth)
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "lr": section.learning_rate * factor,
                "weight_decay": section.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    groups: Iterable[dict[str, Any]], section: TrainingSection, device: torch.device, *, sharded: bool = False
) -> Optimizer:
    """The recipe's optimizer over `parameter_groups`, fused where the device has it.

    Raises:
        UserError: it cannot work on shares.
    """
    groups, is_fused = list(groups), device.type in ("cpu", "cuda", "mps", "xpu")
    if section.optim == "adamw_torch":
        return torch.optim.AdamW(
            groups,
            lr=section.learning_rate,
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_epsilon,
            fused=is_fused,
        )
    if section.optim == "adafactor" and sharded:
        raise UserError(
            "training.optim: adafactor averages over rows and columns of whole weights, of which FSDP leaves no process more "
            "than a share; use multi_gpu.yaml"
        )
    if section.optim == "adafactor":  # fixed learning rate, as the recipe's schedule demands
        return Adafactor(  # type: ignore[no-untyped-call]
            groups, lr=section.learning_rate, scale_parameter=False, relative_step=False
        )
    return torch.optim.SGD(
        groups, lr=section.learning_rate, fused=is_fused and not sharded
    )  # torch 2.13 has none for shares


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale the whole gradient down to a norm of `max_norm` where it exceeds it, once per step.

    Args:
        accelerator: the run's, which undoes the loss scale of fp16 and knows of sharded gradients.
        model: the prepared model.
        max_norm: None only measures.

    Returns:
        the norm before, a scalar.
    """
    if accelerator.device.type != "cpu" or accelerator.scaler is not None:
        xla.renew_gradients(model)
        bound = float("inf") if max_norm is None else max_norm
        return whole(torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), bound)))
    # Nobody waits for a look at a number on a CPU, and it mostly saves a pass over all gradients to multiply them by 1.
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(
        torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    )
    if max_norm is not None and norm + CLIP_EPSILON > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def build_scheduler(optimizer: Optimizer, section: TrainingSection, plan: TrainingPlan) -> LambdaLR:
    """The recipe's schedule over `plan.total_steps`; to be stepped once per update, whatever the number of processes."""
    scheduler: LambdaLR = get_scheduler(
        section.lr_scheduler_type,
        optimizer,
        num_warmup_steps=plan.warmup_steps,
        num_training_steps=plan.total_steps,
        scheduler_specific_kwargs=dict(section.lr_scheduler_kwargs),
    )
    return scheduler


def state_by_name(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The optimizer's state keyed by parameter name, so that it outlives regrouping and wrapping.

    Returns:
        tensors, `"{parameter} {entry}"` → tensor; and plain values, parameter → entry → number.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name} {entry}"] = value
            else:
                values.setdefault(name, {})[entry] = value
    return tensors, values


def load_state_by_name(
    optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor], values: dict[str, dict[str, Any]]
) -> None:
    """Give back to `optimizer` what `state_by_name` took; the parameters' own device, the state's own dtype."""
    states: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in values.items()}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(" ")
        states.setdefault(name, {})[entry] = tensor
    for name, parameter in model.named_parameters():
        if name in states:
            optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU unless fused or capturable; everything else lies by the weights.
                entry: value.to(parameter.device)
                if isinstance(value, Tensor) and (value.dim() or _step_on_device(optimizer))
                else value
                for entry, value in states[name].items()
            }


def _step_on_device(optimizer: Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
