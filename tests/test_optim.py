"""Parameter groups, schedules, and an optimizer that goes on after a checkpoint as if nothing had happened."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
from harness import FAMILIES
from transformers import AutoConfig, AutoModelForSequenceClassification, get_scheduler

from accel_trainer.optim import (
    build_optimizer,
    build_scheduler,
    load_state_by_name,
    parameter_groups,
    state_by_name,
    undecayed,
)
from accel_trainer.plan import TrainingPlan
from accel_trainer.recipe import TrainingSection

CPU = torch.device("cpu")


def model_of(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{"vocab_size": 50, "pad_token_id": 0, **FAMILIES[family], **more})
    return AutoModelForSequenceClassification.from_config(config)


def section_of(**more: Any) -> TrainingSection:
    return TrainingSection(**{"global_batch_size": 8, "max_steps": 12, "learning_rate": 0.01, **more})


def names_by(model: torch.nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group[key] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layerwise", [None, 0.9])
def test_every_trainable_parameter_is_in_one_group(family: str, layerwise: float | None) -> None:
    if family == "albert" and layerwise is not None:
        pytest.skip("ALBERT has no separate layers; test_model looks at its message")
    model = model_of(family)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    groups = parameter_groups(model, section_of(layerwise_lr_decay=layerwise))
    placed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters() if p is not frozen)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_biases_and_norms_escape_decay(family: str) -> None:
    model = model_of(family)
    groups = parameter_groups(model, section_of(weight_decay=0.3))
    decay = names_by(model, groups, "weight_decay")
    # Written down apart from the code: vectors that scale or shift, and nothing with two dimensions.
    exempt = {name for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert {name for name, value in decay.items() if value == 0.0} == exempt == undecayed(model)
    assert set(decay.values()) == {0.0, 0.3}


def test_bert_rates_by_depth() -> None:
    model = model_of("bert")
    rates = names_by(model, parameter_groups(model, section_of(layerwise_lr_decay=0.5)), "lr")
    assert set(rates) == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        depth = 0 if ".embeddings." in name else 1 if ".layer.0." in name else 2 if ".layer.1." in name else 3
        assert rate == pytest.approx(0.01 * 0.5 ** (3 - depth)), name
    assert rates["bert.pooler.dense.weight"] == rates["classifier.weight"] == 0.01


def test_distilbert_rates_by_depth() -> None:
    model = model_of("distilbert")
    rates = names_by(model, parameter_groups(model, section_of(layerwise_lr_decay=0.5)), "lr")
    assert rates["distilbert.embeddings.word_embeddings.weight"] == pytest.approx(0.01 / 8)
    assert rates["distilbert.transformer.layer.0.attention.q_lin.weight"] == pytest.approx(0.01 / 4)
    assert rates["distilbert.transformer.layer.1.output_layer_norm.bias"] == pytest.approx(0.01 / 2)
    assert rates["pre_classifier.weight"] == rates["classifier.bias"] == 0.01


def test_electra_projection_belongs_to_the_embeddings() -> None:
    model = model_of("electra")
    rates = names_by(model, parameter_groups(model, section_of(layerwise_lr_decay=0.5)), "lr")
    assert rates["electra.embeddings_project.weight"] == pytest.approx(0.01 / 8)
    assert rates["classifier.dense.weight"] == 0.01


def test_without_layerwise_decay_there_is_one_rate() -> None:
    model = model_of("bert")
    assert set(names_by(model, parameter_groups(model, section_of()), "lr").values()) == {0.01}


def train_steps(model: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    model.eval()
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(5, 50, (4, 6), generator=generator)
        loss = model(input_ids=ids, labels=torch.randint(0, 2, (4,), generator=generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = typing.get_args(TrainingSection.model_fields["optim"].annotation)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_state_by_name_goes_on_bitwise(optim: str, tmp_path: Any) -> None:
    from accel_trainer.checkpoint import load_checkpoint, save_checkpoint

    section = section_of(optim=optim, weight_decay=0.1)

    def fresh(layerwise: float | None = None) -> tuple[Any, torch.optim.Optimizer]:
        model = model_of("bert")
        groups = parameter_groups(model, section.model_copy(update={"layerwise_lr_decay": layerwise}))
        for group in groups:
            group["lr"] = section.learning_rate
        return model, build_optimizer(groups, section, CPU)

    whole, optimizer = fresh()
    train_steps(whole, optimizer, 0, 3)
    tensors, values = state_by_name(optimizer, whole)
    path = save_checkpoint(tmp_path, 3, whole.state_dict(), tensors, {"values": values})
    train_steps(whole, optimizer, 3, 6)

    for layerwise in (None, 1.0):  # grouped otherwise: keyed by name, the state must find its parameter all the same
        saved_weights, saved_tensors, saved = load_checkpoint(path)
        again, other = fresh(layerwise)
        again.load_state_dict(saved_weights)
        load_state_by_name(other, again, saved_tensors, saved["values"])
        train_steps(again, other, 3, 6)
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), (optim, name)

    forgetful, bare = fresh()
    forgetful.load_state_dict(saved_weights)
    train_steps(forgetful, bare, 3, 6)
    same = all(torch.equal(w, forgetful.state_dict()[n]) for n, w in whole.state_dict().items())
    assert same == (optim == "sgd")  # the others keep a state, or this test could not fail


def test_optimizers_are_what_they_are_called() -> None:
    names = {
        optim: type(build_optimizer(parameter_groups(model_of("bert"), section_of()), section_of(optim=optim), CPU))
        for optim in OPTIMIZERS
    }
    assert {name: kind.__name__ for name, kind in names.items()} == {
        "adamw_torch": "AdamW",
        "adafactor": "Adafactor",
        "sgd": "SGD",
    }


def test_adamw_settings_reach_it() -> None:
    section = section_of(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer(parameter_groups(model_of("bert"), section), section, CPU)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.95), 1e-6)}


SCHEDULES: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{}, {"num_cycles": 2}],
    "polynomial": [{}, {"lr_end": 0.001, "power": 2.0}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 20}],
    "cosine_with_min_lr": [{"min_lr": 0.001}, {"min_lr_rate": 0.2, "num_cycles": 1.0}],
    "warmup_stable_decay": [
        {"num_decay_steps": 4},
        {"num_decay_steps": 3, "decay_type": "linear", "min_lr_ratio": 0.1},
    ],
}


def test_every_schedule_is_listed() -> None:
    assert set(SCHEDULES) == set(typing.get_args(TrainingSection.model_fields["lr_scheduler_type"].annotation))


@pytest.mark.parametrize(("name", "kwargs"), [(name, kwargs) for name, many in SCHEDULES.items() for kwargs in many])
def test_schedules_are_those_of_transformers(name: str, kwargs: dict[str, Any]) -> None:
    section = section_of(
        lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=3 if name != "constant" else 0
    )
    plan = TrainingPlan(50, 8, 7, 12, 3, 10, None, None)
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    ours = torch.optim.SGD(parameters, lr=0.01)
    theirs = torch.optim.SGD(parameters, lr=0.01)
    schedule = build_scheduler(ours, section, plan)
    reference = get_scheduler(
        name, theirs, num_warmup_steps=3, num_training_steps=12, scheduler_specific_kwargs=dict(kwargs)
    )
    rates = []
    for _ in range(12):
        rates.append(schedule.get_last_lr())
        assert schedule.get_last_lr() == reference.get_last_lr()
        for optimizer, moving in ((ours, schedule), (theirs, reference)):
            optimizer.step()
            moving.step()
    warms_up = name != "constant"
    assert (rates[0][0] < rates[3][0]) == warms_up
    assert max(rate for (rate,) in rates) == pytest.approx(0.01)
    if kwargs:  # the arguments reach it
        plain = {k: v for k, v in kwargs.items() if k in ("num_decay_steps",)}
        if name != "cosine_with_min_lr" and plain != kwargs:
            other = get_scheduler(name, torch.optim.SGD(parameters, lr=0.01), 3, 12, scheduler_specific_kwargs=plain)
            changed = []
            for _ in range(12):
                changed.append(other.get_last_lr())
                other.optimizer.step()
                other.step()
            assert changed != rates
