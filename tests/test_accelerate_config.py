"""The accelerate config is read as Accelerate reads it, and what passes here Accelerate's own launcher takes."""

from __future__ import annotations

import argparse
import json
import os
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from accelerate.commands import config as config_commands
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import launch, write_basic_config
from harness import ROOT
from sample_files import SCALARS

from accel_trainer.accelerate_config import AccelerateConfig, examine, of_launch, read
from accel_trainer.errors import HardwareError

# What `accelerate config` writes for one GPU.
QUESTIONNAIRE = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: 'NO'
downcast_bf16: 'no'
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_mode: default
enable_cpu_affinity: false
gpu_ids: all
machine_rank: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 1
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""


def write(folder: Path, text: str, name: str = "acc.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def told(path: Path) -> list[str]:
    return [str(mistake) for mistake in examine(path)[1]]


# --- what is read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_are_clean(path: Path) -> None:
    config, values = read(path), yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in ("distributed_type", "num_processes", "num_machines", "mixed_precision", "use_cpu"):
        assert getattr(config, name) == values[name]
    assert path.read_text(encoding="utf-8").splitlines()[config.lines["num_processes"] - 1].startswith("num_processes:")


def test_what_accelerates_questionnaire_writes_is_clean(tmp_path: Path) -> None:
    config = read(write(tmp_path, QUESTIONNAIRE))
    assert (config.mixed_precision, config.dynamo_backend) == ("bf16", "inductor")
    write_basic_config(save_location=str(tmp_path / "default.json"))
    assert isinstance(read(tmp_path / "default.json"), AccelerateConfig)


@pytest.mark.parametrize(
    ("lines", "name", "value"),
    [
        ("", "num_processes", 1),
        ("", "use_cpu", False),
        ("", "mixed_precision", "no"),
        ("mixed_precision: BF16", "mixed_precision", "bf16"),
        ("fp16: true", "mixed_precision", "fp16"),
        ("mixed_precision: null", "mixed_precision", "no"),
        ("dynamo_backend: EAGER", "dynamo_backend", "eager"),
        ("dynamo_config: {backend: eager}", "dynamo_backend", "eager"),
        ("dynamo_config:", "dynamo_backend", "no"),
        ("parallelism_config: {parallelism_config_tp_size: null}", "num_processes", 1),
        ("use_cpu: yes", "use_cpu", True),  # YAML 1.1, as Accelerate reads it
        ("num_processes: 0b1", "num_processes", 1),
    ],
)
def test_what_is_left_out_or_written_in_another_way(tmp_path: Path, lines: str, name: str, value: object) -> None:
    config = read(write(tmp_path, f"distributed_type: 'NO'\n{lines}\n"))
    assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("text", "says"), [("[" * 200_000, "recursion"), ('{"num_processes": ' + "1" * 5_000 + "}", "digits")]
)
def test_json_that_python_does_not_read(tmp_path: Path, text: str, says: str) -> None:
    (mistake,) = told(write(tmp_path, text, "acc.json"))
    assert mistake.startswith(f"{tmp_path}/acc.json: this is not JSON: ")
    assert says in mistake


def test_a_launch_without_a_config_takes_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_commands, "default_config_file", str(default))
    assert of_launch(None) is None
    write(tmp_path, "distributed_type: MULTI_GPU\nnum_processes: 2\n", default.name)
    found = of_launch(None)
    assert found is not None
    assert (found.path, found.num_processes) == (default, 2)
    given = of_launch(write(tmp_path, "distributed_type: 'NO'\n"))
    assert given is not None
    assert given.path == tmp_path / "acc.yaml"


@pytest.mark.parametrize(("written", "_"), SCALARS)
def test_a_value_is_what_yaml_1_1_makes_of_it(tmp_path: Path, written: str, _: object) -> None:
    from accel_trainer.accelerate_config import _read_mapping
    from accel_trainer.draft import Draft

    text = f"debug: {written}\nfsdp_config:\n  fsdp_version: {written}\n"
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:  # `=` means something to PyYAML
        expected = {"debug": written, "fsdp_config": {"fsdp_version": written}}
    assert _read_mapping(write(tmp_path, text), Draft("acc.yaml")) == expected


def test_json_is_read_and_its_mistakes_have_lines(tmp_path: Path) -> None:
    text = json.dumps({"distributed_type": "NO", "num_processes": 1, "mixed_precision": "bf17"}, indent="\t")
    assert told(write(tmp_path, text, "acc.json")) == [
        f"{tmp_path}/acc.json:4: mixed_precision: 'bf17' is no choice; did you mean bf16? choose from no, fp16, bf16, fp8"
    ]
    broken = write(tmp_path, text.replace("1,", "1"), "acc.json")
    (mistake,) = told(broken)
    assert mistake.startswith(f"{broken}:4: this is not JSON")


def test_read_tells_all_mistakes_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "distributed_type: MULTI_GPUS\nnum_processes: two\nmixed_prec: fp16\n")
    with pytest.raises(HardwareError) as caught:
        read(path)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"{path}:{n}" for n in (1, 2, 3)]


# --- what passes is taken -----------------------------------------------------------------------------------------------

SHARES = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": False,
    "reshard_after_forward": False,
}
# By key: values that may pass, and values that never do.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "distributed_type": (["NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "FSDP", False], ["multi_gpu", None, 3]),
    "mixed_precision": (["no", "bf16", "fp16", "FP16", None], [False, "half", 16]),
    "num_processes": ([1, 2, 3, 4], [0, -1, "2", None]),
    "num_machines": ([1, 2], [None, 0]),
    "machine_rank": ([0, 1], [None, -1]),
    "main_process_ip": (["10.0.0.1", None], [10]),
    "main_process_port": ([0, 29500, None], ["auto"]),
    "gpu_ids": (["all", "0,1", "0, 1,2", "0", "-1,-1", None], [0, "one"]),
    "use_cpu": ([True, False], ["both"]),
    "dynamo_backend": (["no", "inductor", "EAGER"], [False, "fast"]),
    "dynamo_config": ([{"dynamo_backend": "eager"}, {}, None, {"mode": "default"}], ["eager", {"backend": "fast"}]),
    "fsdp_config": ([{}, None, SHARES], [{"fsdp_version": 3}]),
    "unknown": ([], [1]),
}


def some_config(draw: Random) -> dict[str, Any]:
    """A few keys, of which none or one has a value that never passes."""
    asked = {"distributed_type", *draw.sample(sorted(VALUES), draw.randint(1, 6))}
    values = {name: draw.choice(VALUES[name][0]) for name in sorted(asked) if VALUES[name][0]}
    if values["distributed_type"] == "FSDP" and draw.random() < 0.8:
        values["fsdp_config"] = SHARES
    if draw.random() < 0.2:
        name = draw.choice(sorted(VALUES))
        values[name] = draw.choice(VALUES[name][1])
    return values


@cache
def parser() -> argparse.ArgumentParser:
    return launch_command_parser()


def start(path: Path) -> tuple[argparse.Namespace, dict[str, str]]:
    """What `accelerate launch` would start, and its environment; or whatever it raises."""
    arguments, _, _ = _validate_launch_command(parser().parse_args(["--config_file", str(path), "x.py"]))
    with patch.object(launch, "is_port_in_use", return_value=False):
        if arguments.multi_gpu or arguments.use_fsdp:
            return arguments, launch.prepare_multi_gpu_env(arguments)
        return arguments, launch.prepare_simple_launcher_cmd_env(arguments)[1]


def test_what_passes_is_started_by_accelerate_as_it_says(tmp_path: Path) -> None:
    passed: dict[str, int] = {}
    for seed in range(1_500):
        path = write(tmp_path, yaml.safe_dump(some_config(Random(seed))))
        config, mistakes = examine(path)
        if not mistakes:
            check_start(path, config)
            passed[config.distributed_type] = passed.get(config.distributed_type, 0) + 1
    assert passed.keys() == {"NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "FSDP"}
    assert min(passed.values()) > 5


def check_start(path: Path, config: AccelerateConfig) -> None:
    """That Accelerate takes a config, and starts what it is said to ask for."""
    before = dict(os.environ)
    try:
        arguments, environment = start(path)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert environment["ACCELERATE_MIXED_PRECISION"] == config.mixed_precision
    assert environment["ACCELERATE_DYNAMO_BACKEND"].lower() == config.dynamo_backend
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") is (config.distributed_type == "FSDP")
    started = int(arguments.nproc_per_node) * arguments.num_machines if arguments.multi_gpu or arguments.use_fsdp else 1
    assert started == config.num_processes
