"""A copied recipe is the old one but for what was asked, wherever it lies, and says where it comes from."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from support import reviews, tiny_recipe, write_csv

from accel_trainer import copying
from accel_trainer.copying import OUTDATED_BY, copy_recipe
from accel_trainer.errors import RecipeError, UserError
from accel_trainer.library import recipes_in, schema_address, shipped
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe, to_yaml

NAMES = sorted(recipes_in(shipped("recipes")))
RESULT = "results: [{date: '2026-01-02', step: 3, metrics: {test: {f1: 0.5}}}]\n"


@pytest.fixture(autouse=True)
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """The shipped library, in the working directory."""
    shutil.copytree(shipped("recipes"), tmp_path / "recipes")
    return tmp_path / "recipes"


def values(recipe: Recipe) -> dict[str, object]:
    return recipe.model_dump(exclude={"derived_from", "results"})


def test_there_are_recipes() -> None:
    assert len(NAMES) > 5


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_can_be_copied(name: str, library: Path) -> None:
    source = library / f"{name}.yaml"
    new = copy_recipe(name, "team/deep/er", ["training.seed=7"])
    assert new == Path("recipes/team/deep/er.yaml")
    old, copied = load_recipe(source, ["training.seed=7"]), load_recipe(new)
    assert values(copied) == values(old)
    assert copied.derived_from == f"{name}@sha256:{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    assert copied.results == []
    text = new.read_text(encoding="utf-8")
    assert "recipes/team/deep/er.yaml" in text
    assert f"{name}.yaml" not in text
    kept = {line.strip() for line in text.splitlines()}
    lost = [
        line
        for line in source.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith("#") and line.strip() not in kept
    ]
    assert all("$schema=" in line or f"{name}.yaml" in line for line in lost)
    assert text.startswith(f"# yaml-language-server: $schema={schema_address(new)}\n")
    assert text.count("yaml-language-server") == 1


def test_what_lies_in_the_working_directory_moves_with_it(
    library: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = copy_recipe("quickstart", "mine/q.yaml")
    assert "train: ../recipes/data/food_reviews/train.csv\n" in new.read_text(encoding="utf-8")
    moved = tmp_path_factory.mktemp("moved") / "work"
    shutil.move(tmp_path, moved)
    monkeypatch.chdir("/")
    files = load_recipe(moved / new).dataset.data_files
    assert isinstance(files, dict)
    assert files["train"] == str(moved / "recipes" / "data" / "food_reviews" / "train.csv")


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A recipe with a table, a checkpoint and a glob beside it, outside of the working directory."""
    folder = tmp_path / "other [place]" / "recipes"
    (folder / "parts").mkdir(parents=True)
    write_csv(folder / "reviews.csv", reviews(30))
    write_csv(folder / "parts" / "1.csv", reviews(30))
    (folder / "checkpoint").mkdir()
    recipe = tiny_recipe(Path("reviews.csv"))
    recipe["model"] = {"checkpoint": "checkpoint", "tokenizer": "org/tokenizer"}
    (folder / "r.yaml").write_text(RESULT + yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "r.yaml"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("target", ["x", "deep/x.yaml", "/absolute"])
def test_files_beside_the_old_recipe_are_found_from_the_new(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, target: str
) -> None:
    work = tmp_path if there else tmp_path / "work"
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)
    files = "dataset.data_files={train: parts/*.csv, test: reviews.csv}"
    overrides = [files, "dataset.path=null", "dataset.splits={train: train, test: test}"]
    target = str(tmp_path / "absolute.yaml") if target == "/absolute" else target
    old = load_recipe(beside, overrides)
    new = copy_recipe(str(beside), target, overrides).absolute()
    written = yaml.safe_load(new.read_text(encoding="utf-8"))
    assert Path(written["model"]["checkpoint"]).is_absolute() != there
    assert written["model"]["tokenizer"] == "org/tokenizer"
    monkeypatch.chdir("/")
    assert values(load_recipe(new)) == values(old)


def test_a_file_that_an_override_names_is_the_one_seen_from_here(beside: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "reviews.csv", reviews(40, seed=1))
    new = copy_recipe(str(beside), "team/x", ["dataset.path=reviews.csv"])
    assert load_recipe(new).dataset.path == str(tmp_path / "reviews.csv")
    assert "path: ../../reviews.csv\n" in new.read_text(encoding="utf-8")


def test_results_and_byte_order_marks_are_left_out(beside: Path) -> None:
    beside.write_bytes(b"\xef\xbb\xbf" + beside.read_bytes().replace(b"\n", b"\r\n"))
    text = copy_recipe(str(beside), "x").read_bytes().decode()
    assert "results" not in text
    assert text.startswith("# yaml-language-server: ")
    assert text.count("\n") == text.count("\r\n")


def test_the_recipe_of_a_run_is_a_source(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(to_yaml(load_recipe(write_recipe()), header="Resolved."), encoding="utf-8")
    new = copy_recipe("runs/one/", "from_run")
    sha256 = hashlib.sha256((run / "recipe.yaml").read_bytes()).hexdigest()
    assert load_recipe(new).derived_from == f"runs/one@sha256:{sha256[:12]}"
    assert "# Resolved.\n" in new.read_text(encoding="utf-8")


LOCKED = """\
dataset:
  path: org/data
  revision: aaa
  splits: {train: train}
  sha256: {train: bbb}
model:
  checkpoint: org/model
  revision: ccc
  tokenizer: org/tokenizer
  tokenizer_revision: ddd
  sha256: {config.json: eee}
training: {global_batch_size: 8, max_steps: 10, learning_rate: 1e-5}
"""


@pytest.mark.parametrize(
    ("override", "left_out"),
    [
        ("training.seed=1", set()),
        ("dataset.max_length=16", set()),
        ("model.hidden_dropout=0.5", set()),
        ("dataset.path=org/other", {"dataset.revision", "dataset.sha256"}),
        ("dataset.splits.train=train[:9]", {"dataset.sha256"}),
        ("dataset.shuffle_seed=1", {"dataset.sha256"}),
        ("dataset.revision=main", {"dataset.sha256"}),
        ("dataset.sha256={train: fff}", set()),
        ("model.checkpoint=org/other", {"model.revision", "model.sha256"}),
        ("model.revision=main", {"model.sha256"}),
        ("model.tokenizer=org/other", {"model.tokenizer_revision", "model.sha256"}),
        ("model={checkpoint: org/other, sha256: {config.json: ggg}}", set()),
        ("model.checkpoint=org/other model.sha256={'config.json':'hhh'}", {"model.revision"}),
    ],
)
def test_locks_to_what_was_replaced_are_left_out(
    override: str, left_out: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "r.yaml").write_text(LOCKED, encoding="utf-8")
    overrides = override.split() if override.count("=") > 1 else [override]
    wanted = load_recipe("r.yaml", overrides).model_dump()
    with caplog.at_level(logging.INFO, "accel_trainer"):
        copied = load_recipe(copy_recipe("r.yaml", "x", overrides)).model_dump()
    for section, key in OUTDATED_BY:
        is_left_out = f"{section}.{key}" in left_out
        assert copied[section][key] == (None if is_left_out else wanted[section][key])
        assert (f"{section}.{key} is left out" in caplog.text) == is_left_out


def test_whatever_hashes_depend_on_is_known() -> None:
    no_matter = {"sha256", "max_length"}
    dataset = Recipe.model_fields["dataset"].annotation
    assert dataset is not None
    assert set(OUTDATED_BY["dataset", "sha256"]) == set(dataset.model_fields) - no_matter


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("there", "there.yaml: it is there already"),
        ("recipes/there.yaml", "there.yaml: it is there already"),
        ("../x", "this is no name for a recipe"),
        ("/x", "this is no name for a recipe"),
        ("", "this is no name for a recipe"),
        ("a//b", "this is no name for a recipe"),
        ("x/", "this is no name for a recipe"),
        ("recipes/there.yaml/x.yaml", "cannot write"),
        ("~nobody-of-that-name/y.yaml", "there is no home of ~nobody-of-that-name"),
        ("x" * 300, "cannot write"),
        ("x" * 300 + "/y", "cannot write"),
    ],
)
def test_targets_that_are_refused(target: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "there.yaml").write_text("mine", encoding="utf-8")
    (tmp_path / "r.yaml").write_text(LOCKED, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        copy_recipe("r.yaml", target)
    assert (tmp_path / "recipes" / "there.yaml").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["r.yaml", "recipes", "there.yaml"]


def test_mistakes_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(LOCKED, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"training\.sed: .*did you mean `seed`"):
        copy_recipe("r.yaml", "x", ["training.sed=1"])
    for source in ("nowhere", "~nobody-of-that-name", "x" * 300):
        with pytest.raises(UserError, match="no such recipe"):
            copy_recipe(source, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_of_two_that_write_one_file_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text(LOCKED, encoding="utf-8")
    (tmp_path / "x.yaml").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(copying.os.path, "lexists", Mock(side_effect=[False, True]))  # it comes after the first look
    with pytest.raises(UserError, match=r"x\.yaml: it is there already"):
        copy_recipe("r.yaml", "x.yaml")
    assert (tmp_path / "x.yaml").read_text(encoding="utf-8") == "mine"


HEADERS = [
    ("# accelerate launch -m accel_trainer.train recipes/a/b.yaml", "# accelerate launch -m accel_trainer.train recipes/x.yaml"),
    ("# accelerate launch -m accel_trainer.train a/b training.seed=1", "# accelerate launch -m accel_trainer.train recipes/x.yaml training.seed=1"),
    ("# see `recipes/a/b.yaml`.", "# see `recipes/x.yaml`."),
    ("# recipes/aa/b.yaml recipes/a/b.yaml.old a/b", "# recipes/aa/b.yaml recipes/a/b.yaml.old a/b"),
    ("# yaml-language-server: $schema=https://example.org/s.json", "# yaml-language-server: $schema=https://example.org/s.json"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "becomes"), HEADERS)
def test_the_header_names_the_new_file(line: str, becomes: str, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "a").mkdir(parents=True)
    below = "# recipes/a/b.yaml, below a key\n"
    (tmp_path / "recipes" / "a" / "b.yaml").write_text(f"{line}\n\n{LOCKED}{below}", encoding="utf-8")
    text = copy_recipe("a/b", "x").read_text(encoding="utf-8")
    assert becomes in text.splitlines()
    assert text.endswith(below)
