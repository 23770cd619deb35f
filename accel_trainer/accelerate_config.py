"""An accelerate config as Accelerate reads it: what hardware it asks for, and every mistake in it at its line.

    text ──yaml_text──▶ Draft ──accelerate_keys──▶ known keys, right types ──rules──▶ AccelerateConfig

Accelerate itself ends at the first mistake it sees, with a traceback, and does not see most: a key that a section does not
have is passed over, and what does not fit together shows when the processes have started, or never.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from accel_trainer.accelerate_keys import (
    FSDP_MUST,
    FSDP_PRECISIONS,
    KEYS,
    ONE_PROCESS,
    OPTIONS,
    PER_DEVICE,
    REFUSED,
    SECTION,
    SECTIONS,
    Kind,
    fsdp_remedy,
)
from accel_trainer.draft import Draft, Keys, Unreadable, dotted, shown
from accel_trainer.errors import HardwareError, Mistake
from accel_trainer.recipe import Broken
from accel_trainer.recipe_paths import similar_files
from accel_trainer.yaml_text import read_yaml

MAX_BYTES = 1_000_000
FIRST_PORT = 29500  # the launcher's own choice

# What a key that is left out means.
_DEFAULTS: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "NO",
    "use_cpu": False,
    "num_processes": 1,
    "num_machines": 1,
    "machine_rank": 0,
    "gpu_ids": "all",
    "main_process_ip": None,
    "main_process_port": FIRST_PORT,
    "main_training_function": "main",
}
_NEVER_NULL = ("compute_environment", "distributed_type", "num_processes", "num_machines", "machine_rank")
_AT_LEAST_1 = ("num_processes", "num_machines")
_ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True)
class AccelerateConfig:
    """What a launch with this config puts in force; the launcher's own options may still change it."""

    path: Path
    distributed_type: str
    num_processes: int  # over all machines
    num_machines: int
    mixed_precision: str  # no, fp16, bf16, fp8
    use_cpu: bool
    dynamo_backend: str  # lower case; no: nothing is compiled
    lines: Mapping[str, int]  # of the keys at the top level, counted from 1


def read(path: str | Path) -> AccelerateConfig:
    """The accelerate config in a file: YAML, or JSON if its name ends in .json.

    Raises:
        HardwareError: every mistake of the file, each with its line.
    """
    config, mistakes = examine(path)
    if mistakes:
        raise HardwareError("\n".join(map(str, mistakes)))
    return config


def of_launch(path: str | Path | None) -> AccelerateConfig | None:
    """The config that `accelerate launch` takes: the one it is given, else the user's default; None where there is none.

    Raises:
        HardwareError: as `read`.
    """
    if path is None:
        from accelerate.commands.config import default_config_file  # as HF_HOME has it; takes seconds

        path = Path(default_config_file)
        if not path.is_file():
            return None
    return read(path)


def examine(path: str | Path) -> tuple[AccelerateConfig, list[Mistake]]:
    """The accelerate config in a file, as far as it can be read, and its mistakes in the order of their lines."""
    draft = Draft(str(path), subject="an accelerate config")
    try:
        draft.values = _read_mapping(Path(path), draft)
        _check_keys(draft)
        _check_rules(draft)
    except Unreadable:
        draft.values = {}
    values = _sound(draft)
    config = AccelerateConfig(
        path=Path(path),
        distributed_type=values["distributed_type"],
        num_processes=values["num_processes"],
        num_machines=values["num_machines"],
        mixed_precision=_precision(values),
        use_cpu=values["use_cpu"],
        dynamo_backend=_dynamo(values),
        lines={str(keys[0]): spot.line for keys, spot in draft.spots.items() if len(keys) == 1 and spot.line},
    )
    return config, sorted(draft.mistakes, key=lambda mistake: mistake.line or 0)


def _sound(draft: Draft) -> dict[str, Any]:
    """The values without a mistake of their own, and the defaults of those that are left out."""
    values = dict(_DEFAULTS)
    for key, value in draft.values.items():
        if (key,) in draft.faulty or value is None:
            continue
        if isinstance(value, dict):
            fit = ((name, below) for name, below in value.items() if (key, name) not in draft.faulty)
            value = {name: below for name, below in fit if below is not None}
        values[key] = value
    values["distributed_type"] = values["distributed_type"] or "NO"  # without quotes it is false, which does as well
    return values


def _precision(values: Mapping[str, Any]) -> str:
    return str(values.get("mixed_precision", "fp16" if values.get("fp16") else "no")).lower()


def _dynamo(values: Mapping[str, Any]) -> str:
    return str(values.get("dynamo_backend") or _below(values, "dynamo_config", "backend") or "no").lower()


def _below(values: Mapping[str, Any], section: str, key: str) -> Any:
    """The value of a section's key, with its prefix or without; None where it is left out."""
    prefix, keys = SECTIONS[section].prefix, values.get(section) or {}
    return keys.get(prefix + key, keys.get(key))


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_mapping(path: Path, draft: Draft) -> dict[str, Any]:
    text = _read_text(path, draft)
    is_json = path.suffix == ".json"  # by which Accelerate tells
    values = read_yaml(_json_as_yaml(text, draft) if is_json else text, draft)
    if not isinstance(values, dict):
        draft.fault((), "this is no accelerate config", "write keys such as num_processes: 1, one to a line")
        raise Unreadable
    if {"dataset", "model", "training"} <= values.keys():
        draft.fault((), "this is a recipe, no accelerate config", "name it without --config_file")
        raise Unreadable
    return values if is_json else {key: _by_yaml_1_1(value, (key,), draft) for key, value in values.items()}


def _read_text(path: Path, draft: Draft) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            draft.fault((), "the file is over 1 MB", f"give {draft.subject}")
            raise Unreadable
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        draft.fault((), "there is no such file", similar_files(path))
    except IsADirectoryError:
        draft.fault((), "this is a folder", similar_files(path / path.name))
    except UnicodeDecodeError:
        draft.fault((), "the file is not UTF-8 text", "save it as UTF-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        draft.fault((), f"the file cannot be read: {reason}", "check its name and permissions")
    raise Unreadable


def _json_as_yaml(text: str, draft: Draft) -> str:
    """The text, which YAML reads too once it is known to be JSON: but for tabs, which stand between its tokens alone."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:  # beyond mere syntax: a number too long, brackets nested too deep
        what, line = (error.msg, error.lineno) if isinstance(error, json.JSONDecodeError) else (str(error), None)
        draft.fault((), f"this is not JSON: {what}", "correct it, or write YAML into a file.yaml", line)
        raise Unreadable from None
    return text.replace("\t", " ")


def _by_yaml_1_1(value: Any, keys: Keys, draft: Draft) -> Any:
    """The value that Accelerate finds: it reads YAML 1.1, where `no` is false and `010` is eight."""
    if isinstance(value, dict):
        return {key: _by_yaml_1_1(below, (*keys, key), draft) for key, below in value.items()}
    written = draft.spot(keys).written
    if isinstance(value, list) or written.startswith(("'", '"', "|", ">")):
        return value
    try:
        return yaml.safe_load(written)
    except (yaml.YAMLError, ValueError):  # a date that is none
        return value


# --- each key by itself -----------------------------------------------------------------------------------------------


def _check_keys(draft: Draft) -> None:
    """Report unknown keys, and values that a key does not take."""
    if (
        draft.get(("compute_environment",)) == "AMAZON_SAGEMAKER"
    ):  # which has keys of its own, and is refused as a whole
        return
    for name, value in draft.values.items():
        if name in SECTIONS:
            if value is None:
                continue
            if not isinstance(value, dict):
                _check_value(draft, (name,), SECTION, value)
                continue
            for key, below in value.items():
                _check_nested(draft, name, key, below)
        elif name in KEYS:
            _check_value(draft, (name,), KEYS[name], value)
        else:
            _report_unknown(draft, (name,))


def _check_nested(draft: Draft, section: str, key: str, value: Any) -> None:
    keys, prefix = SECTIONS[section].keys, SECTIONS[section].prefix
    kind = keys.get(key if key.startswith(prefix) else prefix + key)
    if key == _ACCUMULATION:
        _report_accumulation(draft, (section, key), value)
    elif kind is None:
        _report_unknown(draft, (section, key))
    else:
        _check_value(draft, (section, key), kind, value)


def _report_accumulation(draft: Draft, keys: Keys, value: Any) -> None:
    if value not in (1, "1"):
        what = "accumulation is this program's own arithmetic, and Accelerate's would divide every gradient once more"
        draft.fault(
            keys, what, "leave it out: training.global_batch_size of the recipe says how many examples a step takes"
        )


def _report_unknown(draft: Draft, keys: Keys) -> None:
    section, name = (str(keys[0]) if len(keys) > 1 else ""), str(keys[-1])
    if name == _ACCUMULATION:
        _report_accumulation(draft, keys, None)
        return
    what = f"`{section}` has no such key, and Accelerate passes over it" if section else "Accelerate has no such key"
    known = [*SECTIONS[section].keys] if section else [*KEYS, *SECTIONS]
    prefix = SECTIONS[section].prefix if section else ""
    homes = [home for home, nested in SECTIONS.items() if {name, nested.prefix + name} & nested.keys.keys()]
    plain = name.lower().replace("-", "_")
    if plain in known or not (homes or name in KEYS or name in OPTIONS):
        near = get_close_matches(plain, [*known, *(key.removeprefix(prefix) for key in known)], 1, 0.6)
        draft.fault(keys, what, f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(known)}")
    elif name in KEYS:
        draft.fault(keys, what, "it belongs at the top level")
    elif homes:
        draft.fault(keys, what, f"it belongs in {' or '.join(f'`{home}`' for home in homes)}")
    else:
        draft.fault(keys, what, f"it is an option of the launcher: accelerate launch --{name}")


def _check_value(draft: Draft, keys: Keys, kind: Kind, value: Any) -> None:
    written = shown(draft.spot(keys).written) or "nothing"
    if value is None and keys[0] not in _NEVER_NULL:
        return
    if value is False and written.lower() == "no" and "no" in map(str.lower, kind.choices) and bool not in kind.types:
        # As a distributed_type false does as well, as it happens, where nothing is left for Accelerate to conclude from it.
        if keys != ("distributed_type",) or "num_processes" not in draft.values:
            draft.fault(keys, f"{written} without quotes is false to Accelerate", f'write "{written}"')
        return
    fits = isinstance(value, kind.types) and (not isinstance(value, bool) or bool in kind.types)
    if fits and kind.choices and not isinstance(value, bool):
        folded = {choice if kind.exact else choice.lower(): choice for choice in kind.choices}
        if (str(value) if kind.exact else str(value).lower()) not in folded:
            near = get_close_matches(str(value).lower(), [choice.lower() for choice in kind.choices], 1)
            hint = "".join(f"did you mean {choice}? " for choice in kind.choices if choice.lower() in near)
            draft.fault(keys, f"'{shown(str(value))}' is no choice", f"{hint}choose from {', '.join(kind.choices)}")
    elif not fits:
        remedy = f"give {kind.noun}"
        if kind.types == (str,) and isinstance(value, int) and not isinstance(value, bool):
            remedy = f'put it in quotes: "{written}"'
        elif isinstance(value, str) and value.isdecimal():
            remedy = "remove the quotes"
        draft.fault(keys, f"{written} is not {kind.noun}", remedy)
    elif keys[0] in _AT_LEAST_1 and value < 1:
        draft.fault(keys, f"{value} is too small", "give a whole number from 1")
    elif keys == ("machine_rank",) and value < 0:
        draft.fault(keys, f"{value} is too small", "give 0 on the first machine, 1 on the second")


# --- keys together ----------------------------------------------------------------------------------------------------


def _check_rules(draft: Draft) -> None:
    faulty = set(map(dotted, draft.faulty))
    for broken in _rules(_sound(draft), draft.values):
        if not faulty & {broken.field, *broken.also}:
            draft.fault(tuple(broken.field.split(".")), broken.what, broken.remedy)


def _rules(values: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Broken]:
    """What does not hold between the keys; `given` are those that the file has."""
    if values["compute_environment"] != "LOCAL_MACHINE":
        what = "SageMaker starts script files, and this program is a module"
        yield Broken("compute_environment", what, "write LOCAL_MACHINE and launch on the machine itself")
        return
    if "distributed_type" not in given:
        values = {**values, "distributed_type": ""}  # of which no rule says anything
        yield Broken(
            "distributed_type", "it is missing, and Accelerate asks for it", 'add distributed_type: "NO" or another'
        )
    elif (kind := values["distributed_type"]) in REFUSED:
        what, _, remedy = REFUSED[kind].partition("; ")
        yield Broken("distributed_type", f"{kind}: {what}", remedy)
    yield from _processes(values, given)
    yield from _machines(values)
    yield from _devices(values)
    if values["distributed_type"] == "FSDP":
        yield from _fsdp(values)
    yield from _unused_sections(values, given)
    yield from _parallelism(values)


def _processes(values: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Broken]:
    kind, count = values["distributed_type"], values["num_processes"]
    if "num_processes" not in given and kind not in ("", "NO"):
        remedy = "add num_processes: N, counted over all machines"
        yield Broken("num_processes", "it is missing, and Accelerate asks for it", remedy, ("distributed_type",))
    if kind == "MULTI_CPU" and (count > 1 or _below(values, "mpirun_config", "mpirun_hostfile")):
        what = "MULTI_CPU starts one process, or with MPI such that torch does not know of"
        remedy = "write MULTI_GPU beside use_cpu: true, as accelerate_configs/multi_cpu.yaml does"
        yield Broken("distributed_type", what, remedy, ("num_processes", "mpirun_config"))
    if kind == "NO" and count > 1:
        what = f"NO starts one process, not the {count} of num_processes"
        remedy = "write MULTI_GPU (for processors beside use_cpu: true), or num_processes: 1"
        yield Broken("distributed_type", what, remedy, ("num_processes",))
    if kind == "XLA" and values["main_training_function"] != "main":
        what = f"accel_trainer.train has no function '{shown(values['main_training_function'])}'"
        yield Broken("main_training_function", what, "write main", ("distributed_type",))


def _machines(values: Mapping[str, Any]) -> Iterator[Broken]:
    machines, count = values["num_machines"], values["num_processes"]
    if values["machine_rank"] >= machines:
        what = f"there is no machine {values['machine_rank']} among {machines}, which are counted from 0"
        yield Broken("machine_rank", what, f"give a number below {machines}, or more num_machines", ("num_machines",))
    if machines == 1:
        return
    if values["distributed_type"] in ONE_PROCESS:
        remedy = "write MULTI_GPU (for processors beside use_cpu: true)"
        yield Broken(
            "num_machines", "the distributed_type starts one process on one machine", remedy, ("distributed_type",)
        )
    if not values["main_process_ip"]:
        remedy = "add the address of machine 0, as the others reach it"
        yield Broken("main_process_ip", f"{machines} machines do not know where to meet", remedy, ("num_machines",))
    if values["main_process_port"] == 0:
        remedy = f"give one number for all, such as {FIRST_PORT}"
        yield Broken("main_process_port", "0 is another port on every machine", remedy, ("num_machines",))
    if count % machines:
        what = f"{count} processes cannot be shared equally by {machines} machines"
        remedy = f"give a multiple of {machines}: num_processes counts over all machines"
        yield Broken("num_processes", what, remedy, ("num_machines",))


def _devices(values: Mapping[str, Any]) -> Iterator[Broken]:
    kind, precision, ids = values["distributed_type"], _precision(values), values["gpu_ids"]
    if values["use_cpu"] and precision in ("fp16", "fp8"):
        field = "mixed_precision" if "mixed_precision" in values else "fp16"
        yield Broken(field, f"{precision} needs a GPU, and use_cpu is true", 'use bf16 or "no"', ("use_cpu",))
    if values["use_cpu"] and kind == "FSDP":
        remedy = "remove it, or use multi_cpu.yaml"
        yield Broken("use_cpu", "FSDP shards over GPUs alone", remedy, ("distributed_type",))
    chosen = [] if ids == "all" else [part.strip() for part in ids.split(",")]
    if not all(part.removeprefix("-").isdecimal() for part in chosen):
        yield Broken("gpu_ids", f"'{shown(ids)}' is no list of numbers", 'write all, or numbers such as "0,1"')
        return
    if kind not in (*PER_DEVICE, "FSDP"):
        return
    per_machine = values["num_processes"] // values["num_machines"]
    hidden = bool(chosen) and set(chosen) == {"-1"}
    if values["use_cpu"] and not hidden and kind != "FSDP":
        what = f"{kind} does not tell its processes: where there are GPUs they would run on them"
        yield Broken("use_cpu", what, 'add gpu_ids: "-1,-1", which hides the GPUs', ("distributed_type", "gpu_ids"))
    if len(chosen) == 1 and values["num_machines"] == 1 and kind != "FSDP":
        what = f"Accelerate refuses {kind} with one id"
        remedy = 'write "-1,-1"' if hidden else 'name two or more, or write distributed_type: "NO"'
        yield Broken("gpu_ids", what, remedy, ("distributed_type", "num_machines"))
    elif chosen and not hidden and len(set(chosen)) < per_machine:
        what = f"{per_machine} processes on a machine share {len(set(chosen))} GPUs; each needs one of its own"
        remedy = "name as many, or lower num_processes"
        yield Broken("gpu_ids", what, remedy, ("distributed_type", "num_processes", "num_machines"))


def _fsdp(values: Mapping[str, Any]) -> Iterator[Broken]:
    """What of FSDP this program does not keep its promise with."""
    section = values.get("fsdp_config") or {}
    for key, must in FSDP_MUST.items():
        name, other = (key, f"fsdp_{key}") if key in section else (f"fsdp_{key}", key)
        value = section.get(name)
        if str(must.left_out if value is None else value).lower() not in must.values:
            what = must.why if value is not None else f"left out it is {must.left_out}, and {must.why}"
            at = (f"fsdp_config.{other}", "fsdp_config", "distributed_type")
            yield Broken(f"fsdp_config.{name}", what, fsdp_remedy(key), at)
    if _precision(values) not in FSDP_PRECISIONS:
        field = "mixed_precision" if "mixed_precision" in values else "fp16"
        what = f"{_precision(values)} has not been tried with FSDP"
        yield Broken(field, what, 'use bf16 or "no"', ("distributed_type",))
    for field in ("dynamo_config", "dynamo_backend"):
        if _dynamo(values) != "no" and values.get(field):
            yield Broken(field, "compiling has not been tried with FSDP", "remove it", ("distributed_type",))
    if values.get("parallelism_config"):
        what = "FSDP in several dimensions has not been tried"
        yield Broken("parallelism_config", what, "remove it", ("distributed_type",))


def _unused_sections(values: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Broken]:
    """Sections that Accelerate takes no notice of because another key does not ask for them."""
    kind = values["distributed_type"]
    wanted = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED", "megatron_lm_config": "MEGATRON_LM"}
    for section, its_kind in (wanted | {"mpirun_config": "MULTI_CPU"}).items():
        if given.get(section) and kind not in ("", its_kind):
            what = f"no part of it is used with distributed_type {kind}"
            yield Broken(section, what, f"remove it; it goes with {its_kind}", ("distributed_type",))
    if given.get("fp8_config") and _precision(values) != "fp8":
        what = f"no part of it is used with mixed_precision {_precision(values)}"
        yield Broken("fp8_config", what, "remove it; it goes with fp8", ("mixed_precision",))


def _parallelism(values: Mapping[str, Any]) -> Iterator[Broken]:
    """Ways to divide one example over processes, which here have examples of their own."""
    section = values.get("parallelism_config") or {}
    for key in ("tp_size", "cp_size", "sp_size"):
        name = f"parallelism_config_{key}"
        if section.get(name, 1) > 1:
            what = "processes here share the examples of a step, and none shares an example"
            yield Broken(f"parallelism_config.{name}", what, "remove it, or write 1")
