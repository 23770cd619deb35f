"""What ships beside the code: recipes, accelerate configs, the embedded reviews."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from harness import ROOT, run_trainer
from support import reviews, write_csv

from accel_trainer.recipe_file import load_recipe

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_the_lists_are_complete() -> None:
    names = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in RECIPES}
    assert names == {
        "quickstart",
        "food_reviews/bert-base-chinese",
        "imdb/bert-base-uncased",
        "imdb/distilbert",
        "sst2/bert-base-uncased",
        "sst2/bert-large-uncased",
        "sst2/distilbert",
    }
    assert {path.stem for path in CONFIGS} == {"cpu", "multi_cpu", "single_gpu", "multi_gpu"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_has_no_mistakes_and_its_header_names_its_own_command(path: Path) -> None:
    assert load_recipe(path).description
    assert str(path.relative_to(ROOT)) in path.read_text(encoding="utf-8").split("\ndescription:")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_config_and_the_comment_says_how(path: Path) -> None:
    load_config_from_file(str(path))  # raises on an unknown key
    text = path.read_text(encoding="utf-8")
    assert f"--config_file accelerate_configs/{path.name}" in text
    assert "mixed_precision" in yaml.safe_load(text)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_tutorial_recipe_runs_with_path_and_checkpoint_replaced(path: Path, tmp_path: Path, checkpoint: Path) -> None:
    recipe = load_recipe(path)
    columns = recipe.dataset.text_column, recipe.dataset.label_column
    rows = [(text, int(label == "positive")) for text, label in reviews(400)]
    if isinstance(recipe.dataset.splits.train, str):
        data = tmp_path / "data"
        data.mkdir()
        # 80 rows instead of 10,000, so that slices of the recipe's splits are given anew where they count rows.
        for split in ("train", "validation", "test"):
            write_csv(data / f"{split}.csv", rows, columns)
        replaced = ["dataset.name=null"] if recipe.dataset.name else []
        if path.stem == "distilbert" and path.parent.name == "imdb":
            replaced += ["dataset.splits.train=train[:320]", "dataset.splits.validation=train[320:]"]
    else:
        data, replaced = write_csv(tmp_path / "reviews.csv", rows, columns), []
    run = run_trainer(
        path,
        tmp_path / "run",
        f"dataset.path={data}",
        f"model.checkpoint={checkpoint}",
        "training.max_steps=2",
        "evaluation.eval_strategy=no",
        *replaced,
    )
    assert run.code == 0, run.err
    # What was not replaced is what the recipe says.
    ran = yaml.safe_load((run.folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert ran["training"]["learning_rate"] == recipe.training.learning_rate
    assert ran["training"]["global_batch_size"] == recipe.training.global_batch_size
    assert ran["dataset"]["max_length"] == recipe.dataset.max_length


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with 512 positions, as a folder."""
    from transformers import BertConfig, BertModel

    from accel_trainer.recipe import TokenizerTraining
    from accel_trainer.tokenization import train_word_pieces

    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_word_pieces(TokenizerTraining(vocab_size=200), [text for text, _ in reviews(100)])
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
