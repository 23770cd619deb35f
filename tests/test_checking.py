"""Every mistake that can be known before anything starts is found by one call, at its line and with what to do."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple

import pytest
from harness import ROOT, python
from support import reviews, write_csv

from accel_trainer import yaml_text
from accel_trainer.checking import check_all
from accel_trainer.errors import Mistake
from accel_trainer.recipe import SHIPPED_METRICS, shipped_metric_meant

RECIPE = """\
description: a base
# spare top
dataset:
  data_files:
    train: data/train.csv
    dev: data/dev.csv
    test: data/test.csv
  splits:
    train: train
    validation: dev
    test: test
  text_column: text
  label_column: label
  labels: [negative, positive]
  max_length: 32
  # spare dataset
model:
  checkpoint: models/tiny
  hidden_dropout: 0.1
  freeze_layers: 0
  # spare model
training:
  seed: 1
  global_batch_size: 8
  max_steps: 10
  learning_rate: 1e-5
  lr_scheduler_type: linear
  lr_scheduler_kwargs: {}
  warmup_steps: 0
  optim: adamw_torch
  weight_decay: 0.0
  # spare training
evaluation:
  eval_strategy: epoch
  metrics: [accuracy, f1]
  average: binary
  metric_for_best_model: loss
  # spare evaluation
saving:
  save_strategy: epoch
  # spare saving
tracking:
  logging_steps: 10
  report_to: []
"""
CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: false
gpu_ids: all
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
mixed_precision: bf16
dynamo_config:
  dynamo_backend: "no"
  # spare dynamo
# spare config
"""


DATA = "data_files:\n    train: data/train.csv\n    dev: data/dev.csv\n    test: data/test.csv"
SPLITS = "train: train\n    validation: dev\n    test: test"
SCHEDULE = "lr_scheduler_type: linear\n  lr_scheduler_kwargs: {}"


class Plant(NamedTuple):
    """A mistake in the place of one line, and what must be said about it."""

    line: str  # of RECIPE or CONFIG, without its indentation, that it replaces
    written: str  # several lines where there are line ends
    key: str
    says: str  # part of the mistake, as shown
    looks_at: tuple[str, ...] = ()  # other lines that the mistake depends on
    at: str | None = None  # the line that it is reported at, where that is another one; "" for none


IN_RECIPE = [
    # names of keys
    Plant("# spare top", "datasets: {}", "datasets", "did you mean `dataset`?"),
    Plant("# spare training", "learning_rat: 1", "training.learning_rat", "did you mean `learning_rate`?"),
    Plant("# spare training", "metrics: [f1]", "training.metrics", "it belongs in `evaluation`"),
    Plant("# spare training", "revision: main", "training.revision", "it belongs in `dataset` or `model`"),
    Plant("# spare training", "qqqq: 1", "training.qqqq", "it takes seed, global_batch_size"),
    Plant("# spare training", "per_device_train_batch_size: 8", "training.per_device_train_batch_size", "global_batch_size ="),
    Plant("# spare training", "warmup_ratio: 0.1", "training.warmup_ratio", "it means the same as training.warmup_steps, in line", ("warmup_steps: 0",)),
    Plant("warmup_steps: 0", "warmup_ratio: 2", "training.warmup_ratio", "2 is no share of the run"),
    Plant("# spare dataset", "evaluation_strategy: steps", "dataset.evaluation_strategy", "write it as `eval_strategy`", ("eval_strategy: epoch",)),
    Plant("# spare top", "training.seed: 1", "training.seed", "write `seed` indented below `training`", ("seed: 1",)),
    Plant("# spare dataset", "max_length: 9", "dataset.max_length", "stands here and in line", ("max_length: 32",)),
    # types and choices
    Plant("global_batch_size: 8", "# none", "training.global_batch_size", "it is missing; add it: examples per", ("# spare training",), "training:"),
    Plant("learning_rate: 1e-5", "learning_rate: fast", "training.learning_rate", "'fast' is not a number; give a number above 0"),
    Plant("learning_rate: 1e-5", "learning_rate: .inf", "training.learning_rate", "not a finite number"),
    Plant("learning_rate: 1e-5", "learning_rate: 0", "training.learning_rate", "0 is too small"),
    Plant("max_steps: 10", "max_steps: 2.0", "training.max_steps", "2.0 is not a whole number; write 2"),
    Plant("hidden_dropout: 0.1", "hidden_dropout: 1", "model.hidden_dropout", "1 is too large"),
    Plant("optim: adamw_torch", "optim: adamw_tirch", "training.optim", "did you mean adamw_torch?"),
    Plant("optim: adamw_torch", "optim: adafactr", "training.optim", "did you mean adafactor?"),
    Plant("lr_scheduler_type: linear", "lr_scheduler_type: cosin", "training.lr_scheduler_type", "did you mean cosine?"),
    Plant("lr_scheduler_type: linear", "lr_scheduler_type: reduce_lr_on_plateau", "training.lr_scheduler_type", "a function of the step"),
    Plant("average: binary", "average: micr", "evaluation.average", "did you mean micro?"),
    Plant("# spare model", "train_tokenizer: 3", "model.train_tokenizer", "3 is no section; write its keys"),
    Plant("report_to: []", "report_to: tensorbord", "tracking.report_to", "'tensorbord' is no choice; did you mean tensorboard?"),
    Plant("report_to: []", "report_to: all", "tracking.report_to", "name the trackers, such as [tensorboard]"),
    # rules between keys
    Plant("test: test", "test: test[0]", "dataset.splits.test", "write it like train[:8000]"),
    Plant("test: test", "test: 0.1", "dataset.splits.train", "stand beside shares of one table; use one kind", ("train: train", "validation: dev"), "train: train"),
    Plant(DATA, "# none", "dataset.path", "give path (Hub id, folder or file) or data_files", ("# spare dataset",), "dataset:"),
    Plant(SPLITS, "train: 0.8\nvalidation: 0.8", "dataset.splits.train", "make them add up to 1 or less", (DATA, "metric_for_best_model: loss"), "train: 0.8"),
    Plant("labels: [negative, positive]", "labels: [a]", "dataset.labels", "fewer than two classes"),
    Plant("labels: [negative, positive]", "labels: [a, a, b]", "dataset.labels", "a class is named twice"),
    Plant("# spare dataset", "text_pair_column: text", "dataset.text_pair_column", "it is text_column again", ("text_column: text",)),
    Plant("label_column: label", "label_column: text", "dataset.label_column", "it is text_column too", ("text_column: text",)),
    Plant("# spare model", "from_config: {model_type: bert}\ntokenizer: org/t", "model.checkpoint", "both stand here", ("checkpoint: models/tiny",), "checkpoint: models/tiny"),
    Plant("checkpoint: models/tiny", "from_config: {a: 1}\ntokenizer: org/t", "model.from_config", "add it, such as model_type: bert", ("# spare model",)),
    Plant("checkpoint: models/tiny", "from_config: {model_type: bert}", "model.from_config", "give one of tokenizer and train_tokenizer", ("# spare model",)),
    Plant("# spare model", "train_tokenizer: {vocab_size: 9}", "model.train_tokenizer", "use it with from_config only", ("checkpoint: models/tiny",)),
    Plant("max_steps: 10", "# none", "training.num_train_epochs", "give num_train_epochs or max_steps", ("warmup_steps: 0", "lr_scheduler_kwargs: {}"), "training:"),
    Plant("warmup_steps: 0", "warmup_steps: 1.5", "training.warmup_steps", "1.5 is no number of steps"),
    Plant("warmup_steps: 0", "warmup_steps: 99", "training.warmup_steps", "longer than max_steps, 10; shorten it", ("max_steps: 10",)),
    Plant(f"{SCHEDULE}\n  warmup_steps: 0", "lr_scheduler_type: constant\nwarmup_ratio: 0.1", "training.warmup_steps", "use constant_with_warmup", (), "warmup_ratio: 0.1"),
    Plant("lr_scheduler_kwargs: {}", "lr_scheduler_kwargs: {num_cycle: 2}", "training.lr_scheduler_kwargs", "linear does not know num_cycle; it takes no argument", ("lr_scheduler_type: linear",)),
    *(
        Plant(SCHEDULE, f"lr_scheduler_type: {kind}\nlr_scheduler_kwargs: {kwargs}", "training.lr_scheduler_kwargs", says, ("learning_rate: 1e-5", "max_steps: 10"), f"lr_scheduler_kwargs: {kwargs}")
        for kind, kwargs, says in [
            ("cosine_with_min_lr", "{}", "needs min_lr or min_lr_rate; add one"),
            ("warmup_stable_decay", "{}", "add num_decay_steps: N"),
            ("cosine", "{num_cycles: half}", "'half' is not a number; give a number"),
            ("cosine", "{num_cycles: -1}", "num_cycles: -1 is below 0"),
            ("polynomial", "{lr_end: 1}", "lr_end: 1 is no end below the learning_rate, 1e-05"),
            ("cosine_with_min_lr", "{min_lr: 1e-6, min_lr_rate: 0.1}", "in two ways; keep one"),
            ("warmup_stable_decay", "{num_decay_steps: 2, decay_type: square}", "'square' is no curve; choose from linear"),
            ("warmup_stable_decay", "{num_decay_steps: 2.5}", "2.5 is no number of steps"),
            ("warmup_stable_decay", "{num_decay_steps: 99}", "the decay is longer than max_steps, 10"),
        ]
    ),
    Plant("metric_for_best_model: loss", "metric_for_best_model: acuracy", "evaluation.metric_for_best_model", "did you mean accuracy? choose from loss", ("metrics: [accuracy, f1]", "validation: dev")),
    Plant("validation: dev", "# none", "evaluation.metric_for_best_model", "add dataset.splits.validation", ("# spare evaluation", "train: train", "test: test"), "metric_for_best_model: loss"),
    Plant("eval_strategy: epoch", "eval_strategy: no\nearly_stopping_patience: 2", "evaluation.early_stopping_patience", "set eval_strategy to steps", ("validation: dev",), "early_stopping_patience: 2"),
    Plant("labels: [negative, positive]", "labels: [a, b, c]", "evaluation.average", "binary with 3 labels; use macro", ("average: binary",), "average: binary"),
    Plant("save_strategy: epoch", "save_strategy: steps", "saving.save_steps", "give the optimizer steps between", (), "saving:"),
    # metrics
    Plant("metrics: [accuracy, f1]", "metrics: [acuracy]", "evaluation.metrics", "did you mean accuracy?"),
    Plant("metrics: [accuracy, f1]", "metrics: [f1_score]", "evaluation.metrics", "did you mean f1?"),
    Plant("metrics: [accuracy, f1]", "metrics: [macro_f1]", "evaluation.metrics", "did you mean f1? write it so, and give evaluation.average"),
    Plant("metrics: [accuracy, f1]", "metrics: [f1, f1]", "evaluation.metrics", "a metric is named twice"),
    Plant("metrics: [accuracy, f1]", "metrics: [loss]", "evaluation.metrics", "loss is always reported; leave it out"),
    Plant("metrics: [accuracy, f1]", "metrics: [owner/mine.py]", "evaluation.metrics", "'owner/mine.py' is no name of a metric"),
    Plant("metrics: [accuracy, f1]", "metrics: [./mine.py]", "evaluation.metrics", "'./mine.py' is no name of a metric; choose from"),
    # what is named, and is not there
    Plant("report_to: []", "report_to: [wandb]", "tracking.report_to[0]", "wandb is not installed here; pip install wandb"),
    Plant("report_to: []", "report_to: wandb", "tracking.report_to", "wandb is not installed here"),
    Plant("train: data/train.csv", "train: data/trian.csv", "dataset.data_files.train", "did you mean data/train.csv?"),
    Plant("train: data/train.csv", "train: data/none*.csv", "dataset.data_files.train", "no such file or folder"),
    Plant("train: data/train.csv", "# none", "dataset.splits.train", "the files are the splits dev, test", (DATA, "train: train"), "train: train"),
    Plant("validation: dev", "validation: devel", "dataset.splits.validation", "no file stands for the split 'devel'; did you mean dev?", (DATA,)),
    Plant("validation: dev", "validation: validation", "dataset.splits.validation", "the files are the splits train, dev, test", (DATA,)),
    Plant("text_column: text", "text_column: txet", "dataset.text_column", "did you mean text? it has text, label", (DATA,)),
    Plant("label_column: label", "label_column: stars", "dataset.label_column", "has no column 'stars'; it has text, label", (DATA,)),
    Plant("# spare dataset", "text_pair_column: second", "dataset.text_pair_column", "has no column 'second'", (DATA,)),
    Plant("checkpoint: models/tiny", "checkpoint: models/tinny", "model.checkpoint", "did you mean models/tiny?"),
    Plant("checkpoint: models/tiny", "checkpoint: ./modles/tiny", "model.checkpoint", "no such file or folder: './modles/tiny'; did you mean models/tiny?"),
    Plant("checkpoint: models/tiny", "checkpoint: ./nothing/like/it", "model.checkpoint", "no such file or folder: './nothing/like/it'; looked in"),
    Plant("checkpoint: models/tiny", "checkpoint: models/empty", "model.checkpoint", "the folder lacks config.json, weights (model.safetensors; pickled ones are not read), a tokenizer", ("# spare model",)),
    Plant("checkpoint: models/tiny", "checkpoint: models/pickled", "model.checkpoint", "the folder lacks weights"),
    Plant("checkpoint: models/tiny", "checkpoint: models/run", "model.checkpoint", "this is the folder of a run; name its model: "),
    Plant("checkpoint: models/tiny", "checkpoint: data/train.csv", "model.checkpoint", "this is a file; name the folder"),
    Plant("# spare model", "tokenizer: models/empty", "model.tokenizer", "the folder lacks a tokenizer"),
    Plant("# spare model", "revision: hf_abcdefghijklmnopqrstuvwxyz", "model.revision", "there is a token or a password in it"),
]  # fmt: skip

IN_CONFIG = [
    Plant("# spare config", "num_process: 2", "num_process", "did you mean `num_processes`?"),
    Plant("# spare config", "fsdp_version: 2", "fsdp_version", "it belongs in `fsdp_config`"),
    Plant("# spare config", "num_cpu_threads_per_process: 2", "num_cpu_threads_per_process", "accelerate launch --num_cpu_threads_per_process"),
    Plant("# spare config", "qqqq: 2", "qqqq", "it takes compute_environment, distributed_type"),
    Plant("# spare config", "gradient_accumulation_steps: 4", "gradient_accumulation_steps", "training.global_batch_size of the recipe"),
    Plant("# spare config", "num_processes: 3", "num_processes", "stands here and in line 6; keep one", ("num_processes: 2",)),
    Plant("# spare dynamo", "dynamo_bakend: eager", "dynamo_config.dynamo_bakend", "Accelerate passes over it; did you mean `dynamo_backend`?"),
    Plant("# spare dynamo", "num_machines: 3", "dynamo_config.num_machines", "it belongs at the top level"),
    Plant("# spare dynamo", "use_dynamic: maybe", "dynamo_config.use_dynamic", "maybe is not true or false"),
    Plant("# spare dynamo", "mode: fast", "dynamo_config.mode", "choose from default, reduce-overhead"),
    Plant('dynamo_backend: "no"', "dynamo_backend: no", "dynamo_config.dynamo_backend", 'no without quotes is false to Accelerate; write "no"'),
    Plant("mixed_precision: bf16", "mixed_precision: bf61", "mixed_precision", "did you mean bf16? choose from no, fp16, bf16, fp8"),
    Plant("mixed_precision: bf16", "mixed_precision: no", "mixed_precision", 'write "no"'),
    Plant("mixed_precision: bf16", "mixed_precision: *half", "mixed_precision", "*half is an alias; an accelerate config is flat"),
    Plant("distributed_type: MULTI_GPU", "distributed_type: multi_gpu", "distributed_type", "did you mean MULTI_GPU?"),
    Plant("distributed_type: MULTI_GPU", "# none", "distributed_type", "it is missing, and Accelerate asks for it", (), ""),
    Plant("distributed_type: MULTI_GPU", "distributed_type: DEEPSPEED", "distributed_type", "DeepSpeed owns the optimizer step"),
    Plant("distributed_type: MULTI_GPU", "distributed_type: MEGATRON_LM", "distributed_type", "owns the training loop; use multi_gpu.yaml"),
    Plant("distributed_type: MULTI_GPU", "distributed_type: MULTI_CPU", "distributed_type", "MULTI_CPU starts one process", ("num_processes: 2",)),
    Plant("distributed_type: MULTI_GPU", 'distributed_type: "NO"', "distributed_type", "NO starts one process, not the 2", ("num_processes: 2",)),
    Plant("distributed_type: MULTI_GPU", "distributed_type: XLA\nmain_training_function: train", "main_training_function", "has no function 'train'; write main", (), "main_training_function: train"),
    Plant("use_cpu: false", "use_cpu: true", "use_cpu", 'add gpu_ids: "-1,-1"', ("gpu_ids: all", "distributed_type: MULTI_GPU", "mixed_precision: bf16")),
    Plant("gpu_ids: all", "gpu_ids: 1", "gpu_ids", 'put it in quotes: "1"'),
    Plant("gpu_ids: all", "gpu_ids: first", "gpu_ids", "'first' is no list of numbers"),
    Plant("gpu_ids: all", 'gpu_ids: "1"', "gpu_ids", "Accelerate refuses MULTI_GPU with one id; name two", ("distributed_type: MULTI_GPU", "num_machines: 1")),
    Plant("num_processes: 2", "num_processes: two", "num_processes", "two is not a whole number"),
    Plant("num_processes: 2", "num_processes: '2'", "num_processes", "remove the quotes"),
    Plant("num_processes: 2", "num_processes: 0", "num_processes", "0 is too small; give a whole number from 1"),
    Plant("num_processes: 2", "# none", "num_processes", "add num_processes: N", ("distributed_type: MULTI_GPU",), ""),
    Plant("gpu_ids: all\nnum_machines: 1\nnum_processes: 2", "gpu_ids: '0,1,2'\nnum_machines: 1\nnum_processes: 4", "gpu_ids", "4 processes on a machine share 3 GPUs", ("distributed_type: MULTI_GPU",)),
    Plant("num_machines: 1", "num_machines:", "num_machines", "nothing is not a whole number"),
    Plant("machine_rank: 0", "machine_rank: 1", "machine_rank", "there is no machine 1 among 1", ("num_machines: 1",)),
    Plant("machine_rank: 0", "machine_rank: -1", "machine_rank", "give 0 on the first machine"),
    Plant("num_machines: 1", "num_machines: 2\nmain_process_ip: a", "main_process_port", "such as 29500", ("main_process_port: 0", "num_processes: 2", "distributed_type: MULTI_GPU"), "main_process_port: 0"),
    Plant("# spare config", "fsdp_config: {fsdp_version: 2}", "fsdp_config", "no part of it is used with distributed_type MULTI_GPU", ("distributed_type: MULTI_GPU",)),
    Plant("# spare config", "fp8_config: {backend: te}", "fp8_config", "remove it; it goes with fp8", ("mixed_precision: bf16",)),
    Plant("# spare config", "fsdp_config: [2]", "fsdp_config", "[2] is not a section of keys"),
    Plant("# spare config", "parallelism_config: {parallelism_config_tp_size: 2}", "parallelism_config.parallelism_config_tp_size", "none shares an example; remove it"),
    Plant("compute_environment: LOCAL_MACHINE", "compute_environment: AMAZON_SAGEMAKER", "compute_environment", "write LOCAL_MACHINE", (CONFIG,)),
]  # fmt: skip

# Whole files: (recipe or config), content, key, what is said, and at which line.
WHOLE: list[tuple[str, str | bytes, str, int | None, str]] = [
    ("recipe", "", "", None, "the file is empty"),
    ("recipe", "- a\n", "", None, "this is no recipe"),
    ("recipe", b"a: \xff\n", "", 1, "the file is not UTF-8"),
    ("recipe", " " * 1_000_001, "", None, "the file is over 1 MB"),
    ("recipe", "a: [b\nc: d\n", "", 2, "a bracket is not closed"),
    ("recipe", "a: 'b\n", "", 2, "a quote is not closed"),
    ("recipe", "%YAML 3.0\n---\na: 1\n", "", 1, "this cannot be read as YAML"),
    ("recipe", "[" * 99, "[0][0]", 1, "nested more than 20 levels deep"),
    ("recipe", f"a: [{'1,' * 600}]\n", "a[498]", 1, "more than 500 values"),
    ("recipe", RECIPE + "---\na: 1\n", "", len(RECIPE.splitlines()) + 1, "a second document starts here"),
    ("recipe", RECIPE + "&a b: 1\n", "", len(RECIPE.splitlines()) + 1, "a key with an anchor"),
    ("recipe", RECIPE + "[a]: 1\n", "", len(RECIPE.splitlines()) + 1, "a key must be text"),
    ("recipe", RECIPE + "1: 1\n", "", len(RECIPE.splitlines()) + 1, "the key 1 is not text; put it in quotes"),
    ("recipe", RECIPE + "<<: {}\n", "", len(RECIPE.splitlines()) + 1, "<< is a merge key"),
    ("recipe", RECIPE.replace("a base", "&a !!str x"), "description", 1, "&a is an anchor"),
    ("recipe", RECIPE.replace("a base", "!!str x"), "description", 1, "str is a tag"),
    ("recipe", RECIPE.replace("a base", r'"\ud800"'), "description", 1, "half a character stands here"),
    ("recipe", RECIPE.replace("a base", "x\ud800").encode("utf-8", "surrogatepass"), "", 1, "the file is not UTF-8"),
    ("recipe", RECIPE.replace("a base", "2024"), "description", 1, "put it in quotes"),
    ("recipe", RECIPE.replace("1e-5", "'2e-5'"), "training.learning_rate", 26, "remove the quotes"),
    ("recipe", RECIPE.replace("[accuracy, f1]", "f1"), "evaluation.metrics", 35, "write a list: [f1]"),
    ("recipe", RECIPE.replace("model:\n", "modle:\n"), "modle", 17, "did you mean `model`?"),
    ("recipe", RECIPE[: RECIPE.index("saving")] + "saving: never\n", "saving", 39, "'never' is no section"),
    ("recipe", RECIPE[: RECIPE.index("model:")] + "\n", "model", None, "it is missing; add it, with checkpoint"),
    ("config", "", "", None, "this is no accelerate config; write keys"),
    ("config", RECIPE, "", None, "this is a recipe, no accelerate config; name it without --config_file"),
    ("recipe", CONFIG, "", None, "this is an accelerate config, no recipe; give it by --config_file"),
    ("config", b"a: \xff\n", "", None, "the file is not UTF-8"),
    ("config", " " * 1_000_001, "", None, "the file is over 1 MB"),
    ("config", "a: [b\nc: d\n", "", 2, "a bracket is not closed"),
]


def lay_out(folder: Path) -> None:
    """Data and models that RECIPE names, and some that it may name by mistake."""
    (folder / "data").mkdir()
    for split in ("train", "dev", "test"):
        write_csv(folder / "data" / f"{split}.csv", reviews(6))
    for name, files in {
        "tiny": ("config.json", "model.safetensors", "tokenizer.json"),
        "empty": (),
        "pickled": ("config.json", "pytorch_model.bin", "tokenizer.json"),
        "run/model": ("config.json", "model.safetensors", "tokenizer.json"),
    }.items():
        (folder / "models" / name).mkdir(parents=True)
        for file in files:
            (folder / "models" / name / file).touch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("checking")
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(yaml_text, "MAX_VALUES", 500)  # thousands take their time
        yield folder


def planted(base: str, plants: list[Plant]) -> tuple[str, dict[Plant, int | None]]:
    """The text with mistakes in it, and the line at which each must be reported."""
    text = base
    for plant in plants:
        start = text.index(f"{plant.line}\n")
        indent = " " * (start - text.rfind("\n", 0, start) - 1)
        text = text[:start] + plant.written.replace("\n", f"\n{indent}") + text[start + len(plant.line) :]
    lines = [line.strip() for line in text.splitlines()]
    reported: dict[Plant, int | None] = {}
    for plant in plants:
        line = plant.written.partition("\n")[0] if plant.at is None else plant.at
        reported[plant] = 1 + lines.index(line) if line else None
    return text, reported


def check(config: Path) -> list[Mistake]:
    return [mistake for mistakes in check_all(["recipe.yaml"], [], config).values() for mistake in mistakes]


def find(recipe: str | bytes, config: str | bytes, *overrides: str) -> list[Mistake]:
    for name, text in (("recipe.yaml", recipe), ("acc.yaml", config)):
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    by_name = check_all(["recipe.yaml"], overrides, Path("acc.yaml"))
    found = [mistake for mistakes in by_name.values() for mistake in mistakes]
    assert all(mistake.remedy for mistake in found), list(map(str, found))
    return found


def check_planted(in_recipe: list[Plant], in_config: list[Plant]) -> None:
    """That exactly these are found, each at its line."""
    recipe, recipe_lines = planted(RECIPE, in_recipe)
    config, config_lines = planted(CONFIG, in_config)
    left = find(recipe, config)
    for source, lines in (("recipe.yaml", recipe_lines), ("acc.yaml", config_lines)):
        of_file = [mistake for mistake in left if mistake.source == source]
        assert [mistake.line or 0 for mistake in of_file] == sorted(mistake.line or 0 for mistake in of_file) or any(
            mistake.line is None for mistake in of_file
        )
        for plant, line in lines.items():
            hits = [m for m in of_file if (m.key, m.line) == (plant.key, line) and plant.says in str(m)]
            assert hits, (plant, list(map(str, left)))
            left.remove(hits[0])
    assert not left, list(map(str, left))


def test_nothing_is_found_where_nothing_is_wrong(folder: Path) -> None:
    assert find(RECIPE, CONFIG) == []


@pytest.mark.parametrize("plant", IN_RECIPE, ids=lambda plant: plant.written)
def test_a_mistake_in_the_recipe(folder: Path, plant: Plant) -> None:
    check_planted([plant], [])


@pytest.mark.parametrize("plant", IN_CONFIG, ids=lambda plant: plant.written)
def test_a_mistake_in_the_accelerate_config(folder: Path, plant: Plant) -> None:
    check_planted([], [plant])


def some_of(plants: list[Plant], draw: Random) -> list[Plant]:
    """Plants that have nothing to do with each other, in any number."""
    chosen: list[Plant] = []
    for plant in draw.sample(plants, len(plants)):
        around = {line.strip() for part in (plant.line, *plant.looks_at) for line in part.splitlines()}
        if not any(
            around & {line.strip() for part in (other.line, *other.looks_at) for line in part.splitlines()}
            for other in chosen
        ):
            chosen.append(plant)
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_mistakes_planted_together_are_all_found_at_once(folder: Path, seed: int) -> None:
    draw = Random(seed)
    in_recipe, in_config = some_of(IN_RECIPE, draw), some_of(IN_CONFIG, draw)
    assert len(in_recipe) + len(in_config) > 12
    check_planted(in_recipe, in_config)


@pytest.mark.parametrize(("kind", "text", "key", "line", "says"), WHOLE)
def test_a_file_of_which_little_can_be_read(
    folder: Path, kind: str, text: str | bytes, key: str, line: int | None, says: str
) -> None:
    found = find(text, CONFIG) if kind == "recipe" else find(RECIPE, text)
    source = {"recipe": "recipe.yaml", "config": "acc.yaml"}[kind]
    assert any((m.source, m.key, m.line) == (source, key, line) and says in str(m) for m in found), list(
        map(str, found)
    )


# The override, a line of RECIPE and what stands there instead, and the mistake.
OVERRIDES = [
    ("training.seed", "", "", "", "an override has no = (in `training.seed`); write section.key=value"),
    ("=3", "", "", "", "an override needs a key before its ="),
    ("a." * 25 + "b=1", "", "", "", "a key of 26 parts"),
    ("learning_rate=2e-5", "", "", "learning_rate", "(in `learning_rate=2e-5`); write training.learning_rate=2e-5"),
    ("--learning_rate=2e-5", "", "", "--learning_rate", "write training.learning_rate=2e-5"),
    ("--lr=2e-5", "", "", "--lr", "write training.learning_rate=2e-5"),
    ("--fp16=true", "", "", "--fp16", "set mixed_precision in the accelerate config"),
    ("learnin_rate=2e-5", "", "", "learnin_rate", "did you mean `training.learning_rate`?"),
    ("revision=main", "", "", "revision", "it belongs in `dataset` or `model`"),
    ("training.sed=3", "", "", "training.sed", "did you mean `seed`?"),
    ("training.num_train_epochs=2", "", "", "training.num_train_epochs", "it has no effect: max_steps wins, 10 in line"),
    ("training.seed=fast", "", "", "training.seed", "'fast' is not a whole number (in `training.seed=fast`)"),
    ("training.seed.x=3", "", "", "training.seed.x", "training.seed holds one value, with nothing below it"),
    ("dataset.labels={a: b, a: c}", "", "", "dataset.labels.a", "given twice"),
    ("dataset.labels=[a", "", "", "dataset.labels", "a bracket is not closed"),
    ("dataset.data_files.train=data/dev.csv", DATA, "data_files: data/dev.csv", "dataset.data_files.train", "set it whole"),
    ("model.checkpoint=./modles/tiny", "", "", "model.checkpoint", "did you mean models/tiny?"),
    ("tracking.report_to=wandb", "", "", "tracking.report_to", "wandb is not installed here (in `tracking.report_to=wandb`)"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "line", "written", "key", "says"), OVERRIDES, ids=lambda value: value[:30])
def test_an_override_is_shown_as_typed(
    folder: Path, override: str, line: str, written: str, key: str, says: str
) -> None:
    recipe = RECIPE.replace(line, written) if line else RECIPE
    found = [mistake for mistake in find(recipe, CONFIG, override) if mistake.source == "command line"]
    assert [(m.line, m.key) for m in found] == [(None, key)]
    assert says in str(found[0])


def test_no_token_is_shown(folder: Path) -> None:
    token = "hf_" + "abcdefghij" * 3
    found = find(
        RECIPE, CONFIG.replace("# spare config", f"key: {token}"), f"learning_rate={token}", f"model.revision={token}"
    )
    assert len(found) == 3
    assert token not in "".join(map(str, found))


FSDP = """\
distributed_type: FSDP
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
"""
# Configs whose keys fit one by one and not together, or that depend on more lines than one.
TOGETHER = [
    (f"{FSDP}use_cpu: true\n", ["use_cpu"]),
    (FSDP, []),
    (f"{FSDP}mixed_precision: bf16\n", []),
    (f"{FSDP}mixed_precision: fp16\n", ["mixed_precision"]),
    (f"{FSDP}fp16: true\n", ["fp16"]),
    (f"{FSDP}dynamo_backend: inductor\n", ["dynamo_backend"]),
    (f"{FSDP}dynamo_config: {{backend: inductor}}\n", ["dynamo_config"]),
    (f"{FSDP}dynamo_config: {{backend: 'no'}}\n", []),
    (f"{FSDP}gpu_ids: '0'\n", ["gpu_ids"]),
    (f"{FSDP}parallelism_config: {{parallelism_config_dp_replicate_size: 2}}\n", ["parallelism_config"]),
    ("distributed_type: FSDP\nnum_processes: 2\n", [f"fsdp_config.fsdp_{key}" for key in ("version", "auto_wrap_policy", "cpu_ram_efficient_loading")]),
    ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: [2]\n", ["fsdp_config"]),
    (FSDP.replace("version: 2", "version: 1"), ["fsdp_config.fsdp_version"]),
    (FSDP.replace("version: 2", "version: 3"), ["fsdp_config.fsdp_version"]),
    (FSDP.replace("fsdp_version: 2", "version: '2'"), []),
    (FSDP.replace("fsdp_version: 2", "version: 1"), ["fsdp_config.version"]),
    (FSDP.replace("_loading: false", "_loading: 'off'"), []),
    (FSDP.replace("_loading: false", "_loading: 'on'"), ["fsdp_config.fsdp_cpu_ram_efficient_loading"]),
    (FSDP.replace("TRANSFORMER", "SIZE"), ["fsdp_config.fsdp_auto_wrap_policy"]),
    (f"{FSDP}  fsdp_offload_params: true\n", ["fsdp_config.fsdp_offload_params"]),
    (f"{FSDP}  offload_params: 'yes'\n", ["fsdp_config.offload_params"]),
    (f"{FSDP}  fsdp_activation_checkpointing: true\n", ["fsdp_config.fsdp_activation_checkpointing"]),
    (f"{FSDP}  fsdp_activation_checkpointing_offload: true\n", ["fsdp_config.fsdp_activation_checkpointing_offload"]),
    (f"{FSDP}  fsdp_ignored_modules: pooler\n", ["fsdp_config.fsdp_ignored_modules"]),
    (f"{FSDP}  fsdp_transformer_layer_cls_to_wrap: BertLayer\n", ["fsdp_config.fsdp_transformer_layer_cls_to_wrap"]),
    (f"{FSDP}  fsdp_reshard_after_forward: false\n", []),
    (f"{FSDP}  fsdp_reshard_after_forward: FULL_SHARD\n", ["fsdp_config.fsdp_reshard_after_forward"]),
    (f"{FSDP}  fsdp_state_dict_type: FULL_STATE_DICT\n", []),
    (f"{FSDP}  fsdp_state_dict_type: LOCAL_STATE_DICT\n", ["fsdp_config.fsdp_state_dict_type"]),
    ("distributed_type: 'NO'\nuse_cpu: true\nmixed_precision: fp16\n", ["mixed_precision"]),
    ("distributed_type: 'NO'\nuse_cpu: true\nfp16: true\n", ["fp16"]),
    ("distributed_type: NO\nnum_processes: 1\n", []),
    ("distributed_type: NO\n", ["distributed_type"]),
    ("distributed_type: 'NO'\nnum_machines: 2\nnum_processes: 1\n", ["num_machines", "num_processes", "main_process_ip"]),
    ("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 3\n", ["num_processes", "main_process_ip"]),
    ("distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 4\nmain_process_ip: a\n", []),
    ("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\ngpu_ids: '-1,-1'\n", []),
    ("distributed_type: MULTI_GPU\nnum_processes: 2\nuse_cpu: true\ngpu_ids: '-1'\n", ["gpu_ids"]),
    ("distributed_type: MULTI_CPU\nmpirun_config: {mpirun_hostfile: h}\nnum_processes: 1\n", ["distributed_type"]),
    ("distributed_type: MULTI_CPU\nnum_processes: 1\n", []),
    ("distributed_type: MULTI_GPU\nnum_processes: 2\ndeepspeed_config: {gradient_accumulation_steps: 1}\n", ["deepspeed_config"]),
    ("distributed_type: MULTI_GPU\nnum_processes: 2\nfsdp_config: {}\n", []),
    ("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {gradient_accumulation_steps: 4}\n", ["distributed_type", "deepspeed_config.gradient_accumulation_steps"]),
    ("distributed_type: MULTI_GPU\nnum_processes: 2\nfsdp_config: {shard: 1}\n", ["fsdp_config", "fsdp_config.shard"]),
    ("distributed_type: MULTI_GPU\nnum_processes: 9\n", ["num_processes"]),
    ("num_procs: 2\nmixed_precision: half\n", ["num_procs", "mixed_precision", "distributed_type"]),
]  # fmt: skip


@pytest.mark.parametrize(("config", "keys"), TOGETHER)
def test_keys_of_a_config_together(folder: Path, config: str, keys: list[str]) -> None:
    assert sorted(mistake.key for mistake in find(RECIPE, config)) == sorted(keys)


def test_more_processes_than_examples_names_both_places(folder: Path) -> None:
    config = "distributed_type: MULTI_GPU\nnum_processes: 16\n"
    (mistake,) = find(RECIPE, config)
    line = RECIPE.splitlines().index("  global_batch_size: 8") + 1
    assert str(mistake) == (
        f"acc.yaml:2: num_processes: 16 processes share the 8 examples of a step (training.global_batch_size, "
        f"recipe.yaml:{line}): 8 would never have one; use 8 processes at most, or a larger global_batch_size, with which "
        "the recipe is another one"
    )
    assert find(RECIPE, config, "training.global_batch_size=16") == []

    (mistake,) = find(RECIPE, config, "training.global_batch_size=15")
    assert "(training.global_batch_size, command line)" in str(mistake)
    # Where the batch is none, nothing is known.
    assert {m.key for m in find(RECIPE, config, "training.global_batch_size=0")} == {"training.global_batch_size"}


def test_adafactor_in_shares_names_both_places(folder: Path) -> None:
    assert find(RECIPE, FSDP) == []
    assert find(RECIPE, CONFIG, "training.optim=adafactor") == []
    (mistake,) = find(RECIPE, FSDP, "training.optim=adafactor")
    assert str(mistake) == (
        "acc.yaml:1: distributed_type: adafactor (training.optim, command line) averages over rows and columns of "
        "whole weights, of which FSDP leaves no process more than a share; use multi_gpu.yaml"
    )


def test_what_is_not_there_at_all(folder: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    found = check_all(["recipe.yaml", "no/such"], [], Path("acc.yml"))
    assert list(found) == ["recipe.yaml", "no/such", "acc.yml"]
    assert found["recipe.yaml"] == []
    assert "no such recipe" in found["no/such"][0].what
    assert "there is no such file; its folder has acc.yaml" in str(found["acc.yml"][0])
    assert "this is a folder" in str(check(Path("data"))[0])
    assert "cannot be read" in str(check(Path("a\0b"))[0])
    Path("acc.json").write_text('{\n"num_processes": 1,\n}\n', encoding="utf-8")
    assert "acc.json:3: this is not JSON" in str(check(Path("acc.json"))[0])


def test_a_folder_named_like_a_tracker_is_no_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "wandb").mkdir()  # as a tracker leaves it
    monkeypatch.syspath_prepend(str(folder))
    (mistake,) = find(RECIPE.replace("report_to: []", "report_to: [wandb, tensorboard]"), CONFIG)
    assert mistake.key == "tracking.report_to[0]"


def test_folders_of_data(folder: Path) -> None:
    recipe = RECIPE.replace(DATA, "path: models/empty").replace(SPLITS, "train: 0.9")
    (mistake,) = find(recipe.replace("metric_for_best_model: loss", ""), CONFIG)
    assert (mistake.key, mistake.line) == ("dataset.path", 4)
    assert "holds no data files; known are .csv" in str(mistake)
    assert (
        find(recipe.replace("path: models/empty", "path: data").replace("metric_for_best_model: loss", ""), CONFIG)
        == []
    )
    file = recipe.replace("path: models/empty", "path: data/dev.csv").replace("metric_for_best_model: loss", "")
    assert find(file, CONFIG) == []
    assert [m.key for m in find(file.replace("text_column: text", "text_column: x"), CONFIG)] == ["dataset.text_column"]


# --- names of metrics -------------------------------------------------------------------------------------------------

# Of evaluate's own namespace on the Hub.
OF_EVALUATE = [
    *("accuracy", "bertscore", "bleu", "bleurt", "brier_score", "cer", "character", "charcut_mt", "chrf"),
    *(
        "code_eval",
        "comet",
        "competition_math",
        "confusion_matrix",
        "coval",
        "cuad",
        "exact_match",
        "f1",
        "frugalscore",
    ),
    *("glue", "google_bleu", "indic_glue", "mae", "mahalanobis", "mape", "mase", "matthews_correlation", "mauve"),
    *("mean_iou", "meteor", "mse", "nist_mt", "pearsonr", "perplexity", "poseval", "precision", "r_squared"),
    *("recall", "rl_reliability", "roc_auc", "rouge", "sacrebleu", "sari", "seqeval", "smape", "spearmanr"),
    *("squad", "squad_v2", "super_glue", "ter", "trec_eval", "wer", "wiki_split", "xnli", "xtreme_s"),
]


@pytest.mark.parametrize("name", [*sorted({*OF_EVALUATE} - {*SHIPPED_METRICS}), "owner/accuracy", "Owner/my-f1.v2"])
def test_a_foreign_metric_passes(folder: Path, name: str) -> None:
    assert find(RECIPE.replace("[accuracy, f1]", f"[accuracy, {name}]"), CONFIG) == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("acuracy", "accuracy"), ("Accuracy", "accuracy"), ("acc", "accuracy"), ("eval_accuracy", "accuracy")),
        *(("F1", "f1"), ("f1-score", "f1"), ("f1_macro", "f1"), ("weighted_f1", "f1"), ("precison", "precision")),
        *(("recal", "recall"), ("mcc", "matthews_correlation"), ("matthews_corrcoef", "matthews_correlation")),
    ],
)
def test_other_spellings_of_shipped_metrics(name: str, meant: str) -> None:
    assert shipped_metric_meant(name) == meant


# --- what ships -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_library_and_the_configs_are_clean(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipes = sorted(map(str, (ROOT / "recipes").rglob("*.yaml")))
    assert len(recipes) >= 7
    found = check_all(recipes, [], config)
    assert [str(mistake) for mistakes in found.values() for mistake in mistakes] == []
    assert list(found) == [*recipes, str(config)]


LIGHT = """
import sys
from pathlib import Path
from accel_trainer.checking import check_all
assert not any(check_all(["recipe.yaml"], ["tracking.report_to=[tensorboard]"], Path("acc.yaml")).values())
heavy = {"torch", "transformers", "datasets", "accelerate", "pandas", "pyarrow", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""


def test_checking_is_light(folder: Path) -> None:
    find(RECIPE, CONFIG)
    done = python(LIGHT, folder)
    assert done.code == 0, done.err


# --- completeness -----------------------------------------------------------------------------------------------------

MODULES = (
    *("recipe", "recipe_check", "recipe_paths", "recipe_file", "respelling", "yaml_text"),
    *("accelerate_config", "on_disk", "checking"),
)
# The recipe's file was found before it is read; what then befalls it is the other reader's matter (test_recipe_file).
ELSEWHERE = {("recipe_file", "_content")}


def says_something(node: ast.AST, function: str) -> bool:
    """Whether something is reported here: a fault noted, a broken rule, a mistake, or the words of a refused value."""
    if isinstance(node, ast.Return):
        return function == "_explained"
    called = node.func if isinstance(node, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return name in ("fault", "Broken", "Mistake")


def sites() -> set[tuple[str, str, int]]:
    """Module, function and line of everything that the code can report."""
    found: set[tuple[str, str, int]] = set()
    for module in MODULES:
        tree = ast.parse((ROOT / "accel_trainer" / f"{module}.py").read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and (module, function.name) not in ELSEWHERE:
                lines = (node.lineno for node in ast.walk(function) if says_something(node, function.name))
                found |= {(module, function.name, line) for line in lines}
    return found


def test_everything_that_can_be_reported_is_planted(folder: Path) -> None:
    reported: set[tuple[str, str, int]] = set()
    files = {importlib.import_module(f"accel_trainer.{module}").__file__: module for module in MODULES}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        module = files.get(frame.f_code.co_filename)
        if module and event == "line":
            reported.add((module, frame.f_code.co_name, frame.f_lineno))
        return trace if module else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for plant in IN_RECIPE:
            find(planted(RECIPE, [plant])[0], CONFIG)
        for plant in IN_CONFIG:
            find(RECIPE, planted(CONFIG, [plant])[0])
        for kind, text, *_ in WHOLE:
            find(*(text, CONFIG) if kind == "recipe" else (RECIPE, text))
        for override, line, written, *_ in OVERRIDES:
            find(RECIPE.replace(line, written) if line else RECIPE, CONFIG, override)
        for config, _ in TOGETHER:
            find(RECIPE, config)
        test_adafactor_in_shares_names_both_places(folder)
        test_what_is_not_there_at_all(folder)
        test_folders_of_data(folder)
    finally:
        sys.settrace(before)
    everything = sites()
    assert len(everything) > 100
    assert not everything - reported, sorted(everything - reported)
    assert len(IN_RECIPE) + len(IN_CONFIG) + len(WHOLE) + len(OVERRIDES) >= 40
