"""What ships beside the code: recipes, accelerate configs, the embedded reviews."""

from __future__ import annotations

import csv
import os
import random
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from harness import FAMILIES, ROOT, run_trainer
from support import reviews, write_csv

from accel_trainer.library import schema_address
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe

RECIPES = {
    path.relative_to(ROOT / "recipes").with_suffix("").as_posix(): path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
}
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
MODELINE = "# yaml-language-server: $schema="


@dataclass(frozen=True)
class Published:
    """A dataset as its publisher describes it; what is like this fits the recipe, so the recipe fits what is published."""

    texts: str  # columns
    splits: str = "train validation test"
    label: str = "label"
    classes: int = 2
    typed: str = "ClassLabel"  # ids with names; or int64; or text
    names: str = ""  # in the cells, where they are text
    hidden: str = ""  # the split whose labels are all -1


PUBLISHED = {
    "nyu-mll/glue cola": Published("sentence", hidden="test"),
    "nyu-mll/glue mnli": Published(
        "premise hypothesis",
        "train validation_matched validation_mismatched test_matched test_mismatched",
        classes=3,
        hidden="test_matched",
    ),
    "nyu-mll/glue mrpc": Published("sentence1 sentence2"),
    "nyu-mll/glue qnli": Published("question sentence", hidden="test"),
    "nyu-mll/glue rte": Published("sentence1 sentence2", hidden="test"),
    "nyu-mll/glue sst2": Published("sentence", hidden="test"),
    "stanfordnlp/imdb": Published("text", "train test unsupervised", hidden="unsupervised"),
    "fancyzhx/ag_news": Published("text", "train test", classes=4),
    "cornell-movie-review-data/rotten_tomatoes": Published("text"),
    "dair-ai/emotion split": Published("text", classes=6),
    "clinc/clinc_oos plus": Published("text", label="intent", classes=151),
    "papluca/language-identification": Published(
        "text",
        label="labels",
        classes=20,
        typed="text",
        names="ar bg de el en es fr hi it ja nl pl pt ru sw th tr ur vi zh",
    ),
    "lansinuote/ChnSentiCorp": Published("text", typed="int64"),
    "C-MTEB/LCQMC": Published("sentence1 sentence2", label="score", typed="int64"),
    "C-MTEB/OnlineShopping-classification": Published("text", "train test", typed="int64"),
    "clue/clue afqmc": Published("sentence1 sentence2", hidden="test"),
    "clue/clue iflytek": Published("sentence", classes=119, hidden="test"),
    "clue/clue tnews": Published("sentence", classes=15, hidden="test"),
    "banking_data": Published("text", "train test", "category", 77, "text", " ".join(f"intent_{i}" for i in range(77))),
    "waimai_10k": Published("review", "train", typed="text", names="0 1"),
}
CHECKPOINTS = {
    "FacebookAI/roberta-base": "roberta",
    "FacebookAI/xlm-roberta-base": "xlm-roberta",
    "albert/albert-base-v2": "albert",
    "answerdotai/ModernBERT-base": "modernbert",
    "distilbert/distilbert-base-uncased": "distilbert",
    "google-bert/bert-base-cased": "bert",
    "google-bert/bert-base-chinese": "bert",
    "google-bert/bert-base-uncased": "bert",
    "google-bert/bert-large-uncased": "bert",
    "google/electra-base-discriminator": "electra",
    "google/electra-small-discriminator": "electra",
    "hfl/chinese-macbert-base": "bert",
    "hfl/chinese-roberta-wwm-ext": "bert",
}
ROWS = 400  # of each split: so many that the smallest slice, 2.5 %, has both classes


def published(recipe: Recipe) -> str | None:
    """Key in PUBLISHED of a recipe's data; None where they ship with it."""
    dataset = recipe.dataset
    if dataset.path is None or "://" in dataset.path or Path(dataset.path).is_absolute():
        named = f"{dataset.path} {dataset.data_files}"
        return next((key for key in PUBLISHED if f"/{key}/" in named), None)
    return " ".join(filter(None, (dataset.path, dataset.name)))


def test_the_lists_are_complete() -> None:
    assert len(RECIPES) >= 25
    tasks = {name.partition("/")[0] for name in RECIPES}
    assert tasks == {
        *("quickstart", "imdb", "sst2", "rotten_tomatoes", "emotion", "ag_news", "banking77", "clinc_oos"),
        *("cola", "mnli", "mrpc", "qnli", "rte", "language_identification"),
        *("food_reviews", "waimai", "online_shopping", "chnsenticorp", "tnews", "iflytek", "afqmc", "lcqmc"),
    }
    recipes = [load_recipe(path) for path in RECIPES.values()]
    assert {recipe.model.checkpoint for recipe in recipes} == {*CHECKPOINTS, None}
    assert set(CHECKPOINTS.values()) == set(FAMILIES)
    assert {published(recipe) for recipe in recipes} == {*PUBLISHED, None}
    assert {path.stem for path in CONFIGS} == {
        *("cpu", "multi_cpu", "multi_cpu_multi_node"),
        *("single_gpu", "multi_gpu", "multi_node", "mps", "tpu", "fsdp"),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_tells_what_it_is(name: str) -> None:
    path = RECIPES[name]
    recipe, lines = load_recipe(path), path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert recipe.description
    assert recipe.source or name == "quickstart"
    assert header[0] == MODELINE + schema_address(path)
    assert any(re.search(rf" -m accel_trainer\.train recipes/{name}\.yaml( |$)", line) for line in header)
    assert recipe.evaluates
    assert recipe.evaluation.metric_for_best_model in recipe.evaluation.metrics


def test_editors_find_the_schema_in_a_checkout_and_in_a_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    schema = (ROOT / "accel_trainer" / "recipe.schema.json").read_bytes()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        for name, path in RECIPES.items():
            address = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix(MODELINE)
            assert (path.parent / address).read_bytes() == schema
            inside = PurePosixPath("accel_trainer/recipes", f"{name}.yaml")
            assert wheel.read(inside.as_posix()) == path.read_bytes()
            assert wheel.read(os.path.normpath(inside.parent / address)) == schema


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_config_and_the_comment_says_how(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    said = load_config_from_file(str(path)).to_dict()  # raises on an unknown key
    for key, value in yaml.safe_load(text).items():
        assert said[key] == value, key
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert comments[0].endswith((".", ":"))  # when to use it
    assert any(line.startswith("Edit: ") for line in comments)
    # The command is one that Accelerate's launcher reads, once its places are filled.
    (command,) = re.findall(r"accelerate launch (--config_file .* RECIPE)", " ".join(comments).replace("\\ ", " "))
    words = re.sub(r"\bN\b", "1", command).replace("ADDRESS", "10.0.0.1").split()
    launch = launch_command_parser().parse_args(words)
    assert Path(launch.config_file) == path.relative_to(ROOT)
    assert (launch.module, launch.training_script, launch.training_script_args) == (
        True,
        "accel_trainer.train",
        ["RECIPE"],
    )


def test_the_page_of_hardware_has_a_row_for_every_config() -> None:
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.partition("| config |")[2].partition("\n\n")[0].splitlines()[2:]]
    assert sorted(row[1].strip(" `") for row in rows) == [path.name for path in CONFIGS]
    assert all(re.search(r"20\d\d-\d\d-\d\d|not run", row[-2]) for row in rows)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_and_evaluates_on_a_stand_in(name: str, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    recipe = load_recipe(RECIPES[name])
    overrides = ["training.max_steps=2", *stand_ins(recipe, tmp_path)]
    if recipe.training.warmup_steps >= 1:
        overrides.append("training.warmup_steps=1")
    if recipe.model.checkpoint:
        overrides.append(f"model.checkpoint={checkpoints[CHECKPOINTS[recipe.model.checkpoint]]}")

    run = run_trainer(RECIPES[name], tmp_path / "run", *overrides)

    assert run.code == 0, run.err
    assert run.json("results.json")["train"]["steps"] == 2
    scores = run.json("results.json")["validation"]
    assert {*recipe.evaluation.metrics, "loss"} <= set(scores)
    names = recipe.dataset.label_names()
    assert names is None or list(scores["per_class"]) == names
    key = published(recipe)
    assert key is None or len(scores["per_class"]) == PUBLISHED[key].classes
    # What was not replaced, and is not pinned by every run, is what the recipe says.
    replaced = {override.partition("=")[0] for override in overrides}
    pinned = {"dataset.revision", "dataset.sha256", "model.revision", "model.tokenizer_revision", "model.sha256"}
    open_ = {key for key in ("labels", "max_length") if getattr(recipe.dataset, key) is None}
    left_out = (*replaced, *pinned, *(f"dataset.{key}" for key in open_))
    ran = load_recipe(run.folder / "recipe.yaml")
    assert without(ran, left_out) == without(recipe, left_out)


def without(recipe: Recipe, keys: tuple[str, ...]) -> dict[str, Any]:
    """The recipe as plain data, less the values of some dotted keys."""
    values = recipe.model_dump(mode="json")
    for key in keys:
        section, field, *_ = key.split(".")
        values[section].pop(field, None)
    return values


def stand_ins(recipe: Recipe, folder: Path) -> list[str]:
    """Overrides that put local tables, typed and split as the published ones, in the place of what is downloaded."""
    if (key := published(recipe)) is None:
        return []
    original, dataset = PUBLISHED[key], recipe.dataset
    downloads = dataset.path is None or "://" in dataset.path
    files = {
        split: write_split(original, split, folder, "csv" if downloads else "parquet")
        for split in original.splits.split()
    }
    if dataset.data_files is not None:
        assert isinstance(dataset.data_files, dict)
        return [f"dataset.data_files.{split}={files[split]}" for split in dataset.data_files]
    if downloads:
        return [f"dataset.path={files['train']}"]
    roles = {role: str(source) for role, source in dataset.splits.roles().items()}
    # 80 rows of 400, as 8,000 of 25,000
    scaled = {role: re.sub(r"(?<=[\[:])(\d+)00(?=[\]:])", r"\1", source) for role, source in roles.items()}
    counts = [f"dataset.splits.{role}={scaled[role]}" for role in roles if scaled[role] != roles[role]]
    return ["dataset.path=null", *(f"dataset.data_files.{split}={file}" for split, file in files.items()), *counts]


def write_split(original: Published, split: str, folder: Path, suffix: str) -> Path:
    """A table of one split, every class in it."""
    count = max(ROWS, 3 * original.classes)
    draw = random.Random(split)
    texts = {
        column: [f"{text} {split}" for text, _ in reviews(count, draw.randrange(100))]
        for column in original.texts.split()
    }
    ids = [i % original.classes for i in range(count)]
    draw.shuffle(ids)
    names = original.names.split() or [f"class {i}" for i in range(original.classes)]
    cells: list[Any] = [names[i] for i in ids] if original.typed == "text" else ids
    columns = {**texts, original.label: [-1] * count if split == original.hidden else cells}
    path = folder / f"{split}.{suffix}"
    if suffix == "csv":
        return write_csv(path, list(zip(*columns.values(), strict=True)), list(columns))
    table = datasets.Dataset.from_dict(columns)
    if original.typed == "ClassLabel":
        table = table.cast_column(original.label, datasets.ClassLabel(names=names))
    table.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family, as a folder: an encoder without a head, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    from accel_trainer.recipe import TokenizerTraining
    from accel_trainer.tokenization import train_word_pieces

    word_pieces = train_word_pieces(TokenizerTraining(vocab_size=200), [text for text, _ in reviews(100)])
    folders = {}
    for family, arguments in FAMILIES.items():
        folders[family] = tmp_path_factory.mktemp(family)
        with_pairs = family in ("albert", "bert", "electra")  # which tell first and second text apart
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=word_pieces.backend_tokenizer,
            model_input_names=["input_ids", *(["token_type_ids"] if with_pairs else []), "attention_mask"],
            **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
        )
        sizes = {**arguments, "max_position_embeddings": 520}  # the longest recipe's 512 tokens, and RoBERTa's offset
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
        AutoModel.from_config(config).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def embedded(split: str) -> list[dict[str, str]]:
    with (ROOT / "recipes" / "data" / "food_reviews" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def clauses(text: str) -> set[str]:
    """Stretches between punctuation that are long enough to be somebody's sentence: 6 words, or 10 Chinese characters."""
    pieces = re.split(r"[^\w\s'’-]+", text.lower())
    long = {" ".join(piece.split()) for piece in pieces}
    return {piece for piece in long if len(piece.split()) >= 6 or len(re.findall(r"[一-鿿]", piece)) >= 10}


def test_the_embedded_reviews_are_held_out_honestly() -> None:
    train, validation, test = embedded("train"), embedded("validation"), embedded("test")
    assert len(train) >= 1000
    assert {row["language"] for row in test} == {"en", "zh"}
    texts = [row["review"] for row in [*train, *validation, *test]]
    assert len(set(texts)) == len(texts)
    known = set().union(*(clauses(row["review"]) for row in train))
    shared = [row["review"] for row in test if clauses(row["review"]) & known]
    assert not shared
    for rows in (train, validation, test):
        assert 0.4 < sum(row["label"] == "positive" for row in rows) / len(rows) < 0.6
