"""The tables of an accelerate config's keys are those of the installed Accelerate."""

from __future__ import annotations

import argparse
from functools import cache

from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, DynamoBackend, PrecisionType, constants

from accel_trainer import accelerate_keys as keys


@cache
def parser() -> argparse.ArgumentParser:
    return launch_command_parser()


def options() -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser()._actions}


def group(title: str) -> set[str]:
    (found,) = [group for group in parser()._action_groups if title.lower() in (group.title or "").lower()]
    return {action.dest for action in found._group_actions}


def test_the_keys_are_those_of_accelerate() -> None:
    of_earlier_versions = {"fp16", "dynamo_backend"}
    assert {*keys.KEYS, *keys.SECTIONS} - of_earlier_versions == set(ClusterConfig.__dataclass_fields__)


def test_the_sections_keys_are_the_launchers_options() -> None:
    by_prefix = {
        "fsdp_config": "fsdp_",
        "fp8_config": "fp8_",
        "dynamo_config": "dynamo_",
        "parallelism_config": "parallelism_config_",
        "megatron_lm_config": "megatron_lm_",
    }
    expected = {
        section: {dest for dest in options() if dest.startswith(prefix)} for section, prefix in by_prefix.items()
    }
    expected["deepspeed_config"] = group("DeepSpeed Arguments")
    expected["mpirun_config"] = group("MPI Arguments")
    expected["fsdp_config"].add("fsdp_ignored_modules")  # no option, and read from the config all the same
    assert {section: set(nested.keys) for section, nested in keys.SECTIONS.items()} == expected


def test_the_choices_are_accelerates() -> None:
    assert set(keys.DISTRIBUTED_TYPES) == {kind.value for kind in DistributedType}
    assert set(keys.PRECISIONS) == set(map(str, PrecisionType.list()))
    assert {name.upper() for name in keys.DYNAMO_BACKENDS} == {backend.value for backend in DynamoBackend}
    assert set(keys.DYNAMO_MODES) >= set(constants.TORCH_DYNAMO_MODES)
    fsdp = keys.SECTIONS["fsdp_config"].keys
    assert fsdp["fsdp_auto_wrap_policy"].choices == tuple(constants.FSDP_AUTO_WRAP_POLICY)
    assert fsdp["fsdp_backward_prefetch"].choices == tuple(constants.FSDP_BACKWARD_PREFETCH)
    assert fsdp["fsdp_state_dict_type"].choices == tuple(constants.FSDP_STATE_DICT_TYPE)
    kinds = {name: kind for nested in keys.SECTIONS.values() for name, kind in nested.keys.items()}
    for name, action in options().items():
        if action.choices and name in kinds and name != "dynamo_backend":  # whose list has a slip of the pen
            assert {*map(str, action.choices)} <= {*kinds[name].choices}, name


def test_options_that_no_config_holds_are_the_launchers() -> None:
    assert set(keys.OPTIONS) <= {*options()}
    assert not set(keys.OPTIONS) & {*keys.KEYS, *keys.SECTIONS}


def test_what_is_refused_says_what_to_do_instead() -> None:
    assert set(keys.REFUSED) <= set(keys.DISTRIBUTED_TYPES)
    assert all("; " in reason for reason in keys.REFUSED.values())
