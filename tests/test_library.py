"""Recipes by path or by name: ./recipes, then the team's libraries, then the shipped one."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from accel_trainer import library
from accel_trainer.errors import UserError
from accel_trainer.library import VARIABLE, Library, entries, find_recipe, libraries, schema_address, shipped
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe

COMMIT = "c" * 40


def put(folder: Path, *names: str, text: str = "dataset:\nmodel:\n") -> Path:
    """Files in a folder; what passes for a recipe unless a text is given."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def folders() -> list[Path]:
    return [found.folder for found in libraries() if isinstance(found, Library)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with recipes, a team's library beside it, and a shipped one."""
    built_in = put(tmp_path / "shipped", "imdb/distilbert.yaml", "imdb/bert.yaml", "quickstart.yaml")
    monkeypatch.setattr(library, "shipped", lambda name: built_in)
    put(tmp_path / "team", "imdb/distilbert.yaml", "imdb/bert.yaml", "tickets.yml")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "team"))
    work = put(tmp_path / "work", "recipes/imdb/distilbert.yaml", "recipes/own.yaml")
    monkeypatch.chdir(work)
    return work


def test_names_where_they_are_from_and_what_they_shadow(here: Path) -> None:
    team = str(here.parent / "team")
    assert [(entry.name, entry.path, entry.origin, entry.shadows) for entry in entries()] == [
        ("imdb/bert", here.parent / "team" / "imdb" / "bert.yaml", team, ("shipped",)),
        ("imdb/distilbert", Path("recipes/imdb/distilbert.yaml"), "./recipes", (team, "shipped")),
        ("own", Path("recipes/own.yaml"), "./recipes", ()),
        ("quickstart", here.parent / "shipped" / "quickstart.yaml", "shipped", ()),
        ("tickets", here.parent / "team" / "tickets.yml", team, ()),
    ]


def test_every_name_that_is_listed_finds_its_file_and_the_file_its_name(here: Path) -> None:
    for entry in entries():
        assert find_recipe(entry.name) == (entry.name, entry.path)
        assert find_recipe(str(entry.path)) == (entry.name, entry.path)


def test_a_file_that_another_one_shadows_has_its_own_name_alone(here: Path) -> None:
    hidden = here.parent / "shipped" / "imdb" / "bert.yaml"
    assert find_recipe(str(hidden)) == ("bert", hidden)
    elsewhere = put(here, "elsewhere.yaml") / "elsewhere.yaml"
    assert find_recipe("elsewhere.yaml") == ("elsewhere", Path("elsewhere.yaml"))
    assert find_recipe(str(elsewhere)) == ("elsewhere", elsewhere)


def test_a_path_wins_over_a_name(here: Path) -> None:
    put(here, "quickstart")
    assert find_recipe("quickstart") == ("quickstart", Path("quickstart"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("imdb/distilbret", "imdb/distilbert"),
        ("quikstart", "quickstart"),
        ("recipes/imdb/distilbret.yaml", "imdb/distilbert"),
        ("bert", "imdb/bert"),
        ("sst2/bert", "imdb/bert"),
        ("tikets", "tickets"),
        ("./recipes/imdb/brt.yml", "imdb/bert or imdb/distilbert"),
    ],
)
def test_a_typo_is_answered_with_names_of_every_library(here: Path, typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"no such recipe \(did you mean {meant}\b.*accel-trainer list") as caught:
        find_recipe(typed)
    assert str(caught.value).startswith(f"{typed}: ")


@pytest.mark.parametrize("typed", ["imdb", "imdb/", "recipes/imdb", "./recipes/imdb/"])
def test_a_folder_is_answered_with_its_recipes(here: Path, typed: str) -> None:
    with pytest.raises(UserError, match=r"is a folder of recipes; give one of them: imdb/bert, imdb/distilbert$"):
        find_recipe(typed)


def test_a_folder_elsewhere_is_answered_with_its_files(here: Path) -> None:
    put(here / "runs" / "a", "recipe.yaml")
    with pytest.raises(UserError, match=r"give one of them: runs/a/recipe\.yaml$"):
        find_recipe("runs/a")
    put(here / "many", *(f"{i}.yaml" for i in range(25)))
    with pytest.raises(UserError, match=r"many/8\.yaml and 5 more$|many/\d+\.yaml and 5 more$"):
        find_recipe("many")


def test_nothing_in_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "shipped", lambda name: tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no names are in reach"):
        find_recipe("zzz")
    assert entries() == []


def test_one_folder_under_two_names_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped("recipes").parent)
    monkeypatch.setenv(VARIABLE, str(Path.cwd()))
    assert {entry.origin for entry in entries()} == {"./recipes"}
    assert {entry.shadows for entry in entries()} == {()}


@given(st.text(st.characters(exclude_categories=()), max_size=300) | st.sampled_from(["", ".", "..", "/", "~nobody/x"]))
def test_whatever_is_typed_is_found_or_answered(typed: str) -> None:
    try:
        _, path = find_recipe(typed)
    except UserError:
        return
    assert path.is_file()


@pytest.mark.parametrize("typed", ["../shipped/quickstart", "imdb/../quickstart", "imdb//bert", "/quickstart", ""])
def test_a_name_stays_inside_its_library(here: Path, typed: str) -> None:
    for name in (typed, f"{here.parent}/shipped/quickstart"):
        with pytest.raises(UserError, match=r"no such recipe|folder of recipes"):
            find_recipe(name)


def test_every_shipped_recipe_is_sound() -> None:
    recipes = sorted(shipped("recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        load_recipe(path)


# --- what is a recipe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_recipe"),
    [
        ("dataset:\n  path: a.csv\nmodel:\n  checkpoint: b\n", True),
        ("# a comment\r\ntraining :\r\n\r\nmodel: {}\r\n", True),
        ("modle:\ndataset:\ntraining:\n  - [\n", True),  # misspelt and broken: to be listed with its mistakes
        ("dataset:\ndataset:\n", False),
        ("training:\n  dataset: 1\n  model: 2\n", False),  # parameters of another tool
        ("compute_environment: LOCAL_MACHINE\nmixed_precision: bf16\n", False),
        ("on: push\njobs:\n  check:\n", False),
        ("", False),
    ],
)
def test_other_yaml_files_have_no_names(here: Path, text: str, is_recipe: bool) -> None:
    put(here / "recipes", "x.yaml", text=text)
    assert ("x" in [entry.name for entry in entries()]) is is_recipe
    if is_recipe:
        assert find_recipe("x") == ("x", Path("recipes/x.yaml"))
    else:
        with pytest.raises(UserError, match="x: no such recipe"):
            find_recipe("x")
        assert find_recipe("recipes/x.yaml")[1] == Path("recipes/x.yaml")  # its mistakes can be asked for


def test_a_file_that_is_no_recipe_hides_none(here: Path) -> None:
    put(here / "recipes", "quickstart.yaml", text="jobs:\n")
    assert find_recipe("quickstart")[1] == here.parent / "shipped" / "quickstart.yaml"


def test_the_sections_looked_for_are_the_recipes() -> None:
    sections = {
        name
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    assert library._SECTION.pattern.decode().partition("(")[2].partition(")")[0].split("|") == [
        name for name in Recipe.model_fields if name in sections
    ]


def test_hidden_folders_and_links_to_folders_are_left_out(here: Path) -> None:
    put(here / "recipes", ".github/a.yaml", ".b.yaml", "deep/er/c.yaml")
    (here / "recipes" / "loop").symlink_to(here / "recipes", target_is_directory=True)
    (here / "recipes" / "gone.yaml").symlink_to(here / "nowhere.yaml")
    (here / "recipes" / "linked.yaml").symlink_to(here / "recipes" / "own.yaml")
    (here / "recipes" / "folder.yaml").mkdir()
    os.mkfifo(here / "recipes" / "pipe.yaml")
    ours = {entry.name for entry in entries() if entry.origin == "./recipes"}
    assert ours == {"imdb/distilbert", "own", "deep/er/c", "linked"}
    assert find_recipe("recipes/linked.yaml")[0] == "linked"


def test_a_folder_with_too_many_files_is_given_up_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("accel_trainer"), "propagate", True)
    monkeypatch.setattr(library, "MOST_FILES", 50)
    put(here.parent / "team", *(f"{i}.txt" for i in range(60)))
    assert {"own", "quickstart"} <= {entry.name for entry in entries()}
    assert f"{here.parent / 'team'}: more than 50 files" in caplog.text
    assert find_recipe("tickets")[0] == "tickets"  # a name needs no search


def test_what_cannot_be_read_is_passed_over(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "imdb":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [entry.name for entry in entries()] == ["own", "quickstart", "tickets"]


# --- the variable -----------------------------------------------------------------------------------------------------


def test_entries_are_looked_up_in_turn(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = put(here / "a", "x.yaml"), put(here / "b", "x.yaml", "y.yaml")
    monkeypatch.setenv(VARIABLE, os.pathsep.join(["", "a", str(second), ""]))
    assert folders() == [Path("recipes"), Path("a"), second, here.parent / "shipped"]
    assert find_recipe("x") == ("x", Path("a/x.yaml"))
    assert find_recipe("y") == ("y", second / "y.yaml")
    assert next(entry for entry in entries() if entry.name == "x").shadows == (str(second),)
    assert first.is_dir()


def test_a_home_folder_and_the_recipes_folder_of_a_repository(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    put(here / "team" / "recipes", "x.yaml")
    put(here / "team", "accelerate.yaml")
    monkeypatch.setenv(VARIABLE, "~/team")
    assert find_recipe("x")[1] == here / "team" / "recipes" / "x.yaml"
    assert "accelerate" not in [entry.name for entry in entries()]
    assert next(entry.origin for entry in entries() if entry.name == "x") == "~/team"


@pytest.mark.parametrize(
    "entry", ["nowhere", "team/recipes", "https://github.com/team/recipes", "hf://models/team/x", "s3://bucket/recipes"]
)
def test_an_entry_that_does_not_exist(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, entry: str
) -> None:
    monkeypatch.setattr(logging.getLogger("accel_trainer"), "propagate", True)
    monkeypatch.setenv(VARIABLE, os.pathsep.join([entry, str(here.parent / "team")]))
    said = f"{VARIABLE}: {entry}: no such folder; correct it, or give a folder"
    with pytest.raises(UserError) as caught:
        find_recipe("tickets")
    assert str(caught.value).startswith(said)
    assert find_recipe("own")[0] == "own"  # found before the entry is needed
    assert find_recipe("recipes/own.yaml")[0] == "own"
    assert {"tickets", "quickstart"} <= {found.name for found in entries()}
    assert said in caplog.text


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_checkout_tells_its_branch_and_version(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    team = put(here / "checkout", "recipes/x.yaml")
    monkeypatch.setenv(VARIABLE, str(team))

    def origin() -> str:
        return next(entry.origin for entry in entries() if entry.name == "x").removeprefix(str(team))

    assert origin() == ""
    git(team, "init")
    git(team, "add", ".")
    git(team, "commit", "-m", "x")
    head = subprocess.run(["git", "-C", str(team), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert origin() == f" (main at {head.stdout[:7]})"
    git(team, "tag", "v1")
    assert origin() == " (main at v1)"
    put(team, "recipes/x.yaml", text="dataset:\ntraining:\n")
    assert origin() == " (main at v1, changed)"
    git(team, "checkout", "--detach", "--force")
    assert origin() == " (v1)"


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list[tuple[str, str | None]]]:
    """Lets the Hub answer with a folder or an error; gives the list of what is asked of it."""
    library._snapshot.cache_clear()
    asked: list[tuple[str, str | None]] = []

    def answer_with(answer: object) -> list[tuple[str, str | None]]:
        def download(repository: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
            assert repo_type == "dataset"
            assert {"*.yaml", "*.yml"} <= set(allow_patterns)
            asked.append((repository, revision))
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return asked

    return answer_with


@pytest.mark.parametrize(
    ("entry", "repository", "revision"),
    [
        ("hf://datasets/team/recipes", "team/recipes", None),
        ("hf://datasets/team/recipes@v1.2", "team/recipes", "v1.2"),
        ("hf://datasets/team/recipes@refs/pr/3", "team/recipes", "refs/pr/3"),
        ("team/my.recipes@v1", "team/my.recipes", "v1"),
        (f"team/recipes@{COMMIT}", "team/recipes", COMMIT),
    ],
)
def test_a_repository_of_the_hub(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub: Callable[[object], list[tuple[str, str | None]]],
    entry: str,
    repository: str,
    revision: str | None,
) -> None:
    snapshot = put(here / "cache" / COMMIT, "recipes/x.yaml", "recipes/own.yaml", "other.yaml")
    asked = hub(snapshot)
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(here.parent / "team"), entry]))
    assert find_recipe("own")[1] == Path("recipes/own.yaml")
    assert find_recipe("tickets")[0] == "tickets"
    assert find_recipe("recipes/own.yaml")[0] == "own"
    assert asked == []  # nobody needed it so far
    assert find_recipe("x") == ("x", snapshot / "recipes" / "x.yaml")
    found = {item.name: item for item in entries()}
    assert found["x"].origin == f"{entry} (ccccccc)"
    assert found["own"].shadows == (f"{entry} (ccccccc)",)
    assert "other" not in found
    assert asked == [(repository, revision)]  # once for all lookups


def test_a_folder_of_that_name_is_no_repository(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(here / "team" / "recipes@v1", "x.yaml")
    monkeypatch.setenv(VARIABLE, "team/recipes@v1")
    assert find_recipe("x")[1] == Path("team/recipes@v1/x.yaml")


def http_error(kind: type[huggingface_hub.errors.HfHubHTTPError], status: int) -> Exception:
    client = pytest.importorskip(huggingface_hub.errors.HTTPError.__module__.partition(".")[0])
    return kind("said by the Hub", response=client.Response(status, request=client.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            lambda: http_error(huggingface_hub.errors.RevisionNotFoundError, 404),
            "there is no revision v1; give a branch",
        ),
        (
            lambda: http_error(huggingface_hub.errors.RepositoryNotFoundError, 401),
            "no such dataset repository.*hf auth",
        ),
        (lambda: http_error(huggingface_hub.errors.GatedRepoError, 403), "no such dataset repository.*hf auth login"),
        (
            lambda: huggingface_hub.errors.LocalEntryNotFoundError("x"),
            r"cannot be fetched \(the Hub is not reached\).*connect once",
        ),
        (lambda: OSError(28, "No space left"), r"cannot be fetched \(the Hub is not reached\) and is not"),
    ],
)
def test_a_repository_that_cannot_be_had(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub: Callable[[object], list[tuple[str, str | None]]],
    error: Callable[[], Exception],
    said: str,
) -> None:
    hub(error())
    entry = "hf://datasets/team/recipes@v1"
    monkeypatch.setenv(VARIABLE, entry)
    with pytest.raises(UserError, match=rf"^{VARIABLE}: {entry}: .*{said}"):
        find_recipe("quickstart")
    assert "quickstart" in [found.name for found in entries()]


# --- the schema's address ---------------------------------------------------------------------------------------------


def test_the_schema_of_the_repository_comes_before_the_installed_one(tmp_path: Path) -> None:
    installed = Path(library.__file__).with_name("recipe.schema.json")
    recipe = tmp_path / "team" / "recipes" / "support" / "tickets.yaml"
    assert schema_address(recipe) == str(installed)
    (tmp_path / "team" / ".git").mkdir(parents=True)
    (tmp_path / "recipe.schema.json").write_text("{}")  # beyond the repository: not there on other machines
    assert schema_address(recipe) == str(installed)
    (tmp_path / "team" / "recipe.schema.json").write_text("{}")
    assert schema_address(recipe) == "../../recipe.schema.json"
    checkout = installed.parent.parent
    assert schema_address(checkout / "recipes" / "imdb" / "x.yaml") == "../recipe.schema.json"


def test_the_shipped_library_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, path = find_recipe("quickstart")
    assert name == "quickstart"
    assert path.is_absolute()
    assert find_recipe(str(path))[0] == "quickstart"
    assert {entry.origin for entry in entries()} == {"shipped"}
