"""The documents say what the program does: their tables are current, their recipes load, their names exist."""

from __future__ import annotations

import dataclasses
import logging
import re
import runpy
from collections import Counter
from math import prod

import pytest
from harness import ROOT

from accel_trainer.errors import RecipeError
from accel_trainer.recipe_fields import field_of
from accel_trainer.recipe_file import parse_recipe
from accel_trainer.spellings import ANSWERED, RENAMED, TRANSLATED

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "write_coming_from_trainer.py"))
DOCUMENT = SCRIPT["DOCUMENT"].read_text(encoding="utf-8")
TABLES = SCRIPT["tables"]().split("### Values")[0]
# The names in the first column of every table but that of values.
NAMES = Counter(
    name for line in TABLES.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
)
# Arguments of run_classification.py and run_glue.py, beside those of TrainingArguments.
SCRIPT_ARGUMENTS = re.findall(
    r"\w+",
    """
    dataset_name dataset_config_name do_regression text_column_names text_column_delimiter train_split_name
    validation_split_name test_split_name remove_splits remove_columns label_column_name max_seq_length
    preprocessing_num_workers overwrite_cache pad_to_max_length shuffle_train_dataset shuffle_seed max_train_samples
    max_eval_samples max_predict_samples metric_name train_file validation_file test_file task_name
    model_name_or_path config_name tokenizer_name cache_dir use_fast_tokenizer model_revision token use_auth_token
    trust_remote_code ignore_mismatched_sizes
    """,
)


def block(language: str, containing: str) -> str:
    """The only fenced block of a language that holds a text."""
    (found,) = (text for text in re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL) if containing in text)
    return found


def test_the_tables_of_names_are_current() -> None:
    assert SCRIPT["with_tables"](DOCUMENT) == DOCUMENT, "run python scripts/write_coming_from_trainer.py"


def test_the_reference_of_recipes_is_current() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_recipe_reference.py"))
    assert script["reference"]() == script["PATH"].read_text(encoding="utf-8"), "run make tables"


def test_every_argument_stands_in_one_table() -> None:
    from transformers import TrainingArguments

    arguments = {field.name for field in dataclasses.fields(TrainingArguments)} | set(SCRIPT_ARGUMENTS)
    assert len(arguments) > 140
    assert not (arguments | RENAMED.keys() | ANSWERED.keys()) - NAMES.keys()
    assert set(NAMES.values()) == {1}


def test_every_translated_value_is_shown_and_changes() -> None:
    spelt = SCRIPT["SPELT_THERE"]
    assert spelt.keys() == TRANSLATED.keys()
    assert all(read(spelt[key]) != spelt[key] for key, read in TRANSLATED.items())


def test_the_recipe_loads_and_says_what_the_command_says() -> None:
    recipe = parse_recipe(block("yaml", "# food.yaml"), "food.yaml", base=ROOT)
    given = dict(re.findall(r"--(\w+)[ \n]([^-\s\\]\S*)?", block("bash", "run_classification.py")))
    assert not given.keys() - NAMES.keys() - {"nproc_per_node"}
    batch = ("per_device_train_batch_size", "nproc_per_node", "gradient_accumulation_steps")
    assert recipe.training.global_batch_size == prod(int(given[name]) for name in batch)
    assert recipe.training.learning_rate == float(given["learning_rate"])
    assert recipe.training.num_train_epochs == float(given["num_train_epochs"])
    assert recipe.training.warmup_steps == float(given["warmup_steps"])
    assert recipe.training.weight_decay == float(given["weight_decay"])
    assert recipe.training.seed == int(given["seed"])
    assert recipe.dataset.max_length == int(given["max_seq_length"])
    assert recipe.dataset.text_column == given["text_column_names"]
    assert recipe.model.checkpoint == given["model_name_or_path"]
    assert recipe.evaluation.metrics == [given["metric_name"]]
    assert recipe.tracking.report_to == [given["report_to"]]
    assert recipe.tracking.logging_steps == int(given["logging_steps"])
    assert recipe.saving.save_total_limit == int(given["save_total_limit"])


def test_the_answers_shown_are_those_given(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = block("console", "accel-trainer check old.yaml").splitlines()[1:]
    monkeypatch.setattr(logging.getLogger("accel_trainer"), "propagate", True)  # a run in this process ends it
    with caplog.at_level(logging.INFO, "accel_trainer"), pytest.raises(RecipeError) as caught:
        parse_recipe(block("yaml", "# old.yaml"), "old.yaml")
    notes = dict.fromkeys(caplog.messages)  # once each, however many handlers other tests have left
    assert [*notes, *str(caught.value).splitlines()] == shown


def test_every_key_that_the_text_names_exists() -> None:
    sections = "dataset|model|training|evaluation|saving|tracking"
    keys = [tuple(key.split(".")) for key in re.findall(rf"`((?:{sections})(?:\.\w+)+)", DOCUMENT)]
    assert len(keys) > 40
    assert [key for key in keys if field_of(key) is None] == []


def test_every_link_within_the_document_leads_to_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", DOCUMENT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]*)\)", DOCUMENT)
    assert links
    assert not set(links) - anchors


def test_every_fault_of_the_table_has_a_test_that_exists() -> None:
    document = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = document.partition("| fault |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for readme, says in (("README.md", f"[{len(rows)} faults"), ("README.zh.md", f"[{len(rows)} 种故障")):
        assert says in (ROOT / readme).read_text(encoding="utf-8")
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, function in named:
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not function or re.search(rf"^def {function}\(", source, re.MULTILINE), (file, function)
