"""A team's own library as docs/recipes.md tells to keep it: the document's files, its commands, what they answer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from harness import ROOT, Outcome, start
from support import reviews, write_csv

from accel_trainer.library import VARIABLE
from accel_trainer.recipe_file import parse_recipe
from accel_trainer.results_table import BEGIN, END

DOCUMENT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DOCUMENT, re.DOTALL)
NAME = "support/tickets"
NOT_REACHED = "the Hub is not reached (ConnectError): what is cached on this machine is used\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # the document's


def file_of(name: str) -> str:
    """The document's only file of that name, which its first comment tells."""
    (text,) = (text for _, text in BLOCKS if text.startswith(f"# {name}\n"))
    return text


def consoles() -> list[tuple[str, str]]:
    """Commands of the document and what it shows of their output."""
    texts = (text.removeprefix("$ ").split("\n", 1) for language, text in BLOCKS if language == "console")
    return [(command, output) for command, output in texts]


def accel_trainer(work: Path, *arguments: str, **environment: str) -> Outcome:
    return start([sys.executable, "-m", "accel_trainer.cli", *arguments], work, **environment)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def write_library(folder: Path) -> Path:
    """The files of the document's layout."""
    for name in ("recipes/support/tickets.yaml", ".pre-commit-config.yaml", ".github/workflows/recipes.yaml"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file_of(name), encoding="utf-8")
    rows = [(text, {"positive": "later", "negative": "urgent"}[label]) for text, label in reviews(60)]
    write_csv(folder / "recipes" / "support" / "tickets.csv", rows, ("subject", "urgency"))
    shutil.copy(ROOT / "accel_trainer" / "recipe.schema.json", folder / "recipes")
    (folder / "recipes" / "README.md").write_text(f"# Ours\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    (folder / "accelerate_configs").mkdir()
    shutil.copy(ROOT / "accelerate_configs" / "multi_gpu.yaml", folder / "accelerate_configs")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A member's home: `~/src/team-recipes` is a clone of the team's repository at its tag v1; `~/work` is empty."""
    home = tmp_path_factory.mktemp("home")
    (home / "upstream").mkdir()
    upstream = write_library(home / "upstream")
    git(upstream, "init")
    git(upstream, "add", ".")
    git(upstream, "commit", "-m", "The first recipe")
    git(upstream, "tag", "v1")
    (home / "src").mkdir()
    git(home, "clone", str(upstream), str(home / "src" / "team-recipes"))
    (home / "work").mkdir()
    return home


@pytest.fixture
def member(home: Path) -> dict[str, str]:
    """What is in a member's environment; the shell has expanded nothing."""
    return {"HOME": str(home), VARIABLE: "~/src/team-recipes"}


def test_the_recipe_of_the_document_is_found_by_name(home: Path, member: dict[str, str]) -> None:
    listed = accel_trainer(home / "work", "list", **member)
    assert listed.code == 0, listed.err
    lines = [line.split() for line in listed.out.splitlines()]
    assert [NAME, "~/src/team-recipes"] in [line[:1] + line[3:4] for line in lines]
    assert any(line[0] == "quickstart" and line[-1] == "shipped" for line in lines)
    checked = accel_trainer(home / "work", "check", NAME, **member)
    assert checked.code == 0, checked.err
    assert "no mistakes" in checked.out
    shown = accel_trainer(home / "work", "show", NAME, "training.seed=7", **member)
    assert shown.code == 0, shown.err
    table = home / "src" / "team-recipes" / "recipes" / "support" / "tickets.csv"
    recipe = parse_recipe(shown.out, "shown")
    assert (recipe.dataset.path, recipe.training.seed) == (str(table), 7)
    missing = accel_trainer(home / "work", "check", NAME)
    assert missing.code == 2
    assert f"{NAME}: no such recipe" in missing.err


def test_the_commands_of_the_document_answer_as_shown(home: Path, member: dict[str, str]) -> None:
    tried = 0
    for command, shown in consoles():
        if command.startswith("accel-trainer"):
            done = accel_trainer(home / "work", *shlex.split(command)[1:], **member)
            assert done.code == (0 if done.out else 2), done.err
            assert (done.out or done.err).removesuffix("\n") == shown.removesuffix("\n")
            tried += 1
    assert tried == 3


def test_an_older_version_beside_the_newest(home: Path, member: dict[str, str]) -> None:
    pinned = home / "pinned"
    if not pinned.exists():
        git(home, "clone", "--branch", "v1", str(home / "upstream"), str(pinned))
    both = os.pathsep.join([str(pinned), member[VARIABLE]])
    done = accel_trainer(home / "work", "list", "support/*", HOME=str(home), ACCEL_TRAINER_RECIPES=both)
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].split("  ")[-2:] == [f"{pinned} (v1)", "~/src/team-recipes (main at v1)"]


def test_every_verb_is_told(home: Path) -> None:
    shown = accel_trainer(home / "work", "--help").out.partition("verbs:\n")[2]
    verbs = set(re.findall(r"^  (\w+)  ", shown, re.MULTILINE))
    told = set(re.findall(r"^\*\*`(\w+) ", DOCUMENT, re.MULTILINE))
    assert told <= verbs
    assert told == {"list", "show", "check", "plan", "diff", "copy", "lock", "record", "reproduce"}
    assert set(re.findall(r"^accel-trainer (\w+)", DOCUMENT, re.MULTILINE)) <= verbs


def test_the_places_that_the_document_names(home: Path) -> None:
    assert f"{BEGIN}\n{END}\n" in [text for _, text in BLOCKS]
    address = re.search(r"\$schema=(\S+)", file_of(f"recipes/{NAME}.yaml"))
    assert address is not None
    recipe = home / "upstream" / "recipes" / f"{NAME}.yaml"
    assert (recipe.parent / address[1]).resolve() == (home / "upstream" / "recipes" / "recipe.schema.json").resolve()
    copy = next(text for _, text in BLOCKS if text.startswith("cp "))
    done = start(["bash", "-c", f"mkdir -p recipes; {copy}"], home, PATH=path_with_commands(home))
    assert done.code == 0, done.err
    copied, shipped = home / "recipes" / "recipe.schema.json", ROOT / "accel_trainer" / "recipe.schema.json"
    assert copied.read_bytes() == shipped.read_bytes()


def test_the_workflow_checks_every_recipe(home: Path) -> None:
    jobs = yaml.safe_load(file_of(".github/workflows/recipes.yaml"))["jobs"]
    (command,) = (step["run"] for step in jobs["check"]["steps"] if "accel-trainer check" in step.get("run", ""))
    environment = {"PATH": path_with_commands(home), "HOME": str(home)}
    done = start(["bash", "-c", command], home / "upstream", **environment)
    assert done.code == 0, done.err
    assert f"recipes/{NAME}.yaml: no mistakes" in done.out


def path_with_commands(home: Path) -> str:
    """A PATH that starts with `python` and `accel-trainer` of this interpreter."""
    commands = home / "bin"
    commands.mkdir(exist_ok=True)
    for name, arguments in (("python", ""), ("accel-trainer", "-m accel_trainer.cli ")):
        (commands / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        (commands / name).chmod(0o755)
    return f"{commands}{os.pathsep}{os.environ['PATH']}"


# --- pre-commit -------------------------------------------------------------------------------------------------------


def test_pre_commit_finds_the_mistake_in_what_is_committed(home: Path, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"  # this project, as far as pre-commit looks at it
    hooks.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    git(hooks, "init")
    git(hooks, "add", ".")
    git(hooks, "commit", "-m", "x")
    git(hooks, "tag", "v0.1.0")
    team = tmp_path / "team"
    git(tmp_path, "clone", str(home / "upstream"), str(team))
    config = team / ".pre-commit-config.yaml"
    config.write_text(re.sub(r"repo: \S+", f"repo: {hooks}", config.read_text()))
    # What a check of files of its own would refuse, outside of the library and without a hook's pattern.
    (team / "docker-compose.yaml").write_text("services:\n")

    def pre_commit() -> Outcome:
        git(team, "add", ".")
        return start(
            [sys.executable, "-m", "pre_commit", "run", "--verbose"],
            team,
            PATH=path_with_commands(home),
            PRE_COMMIT_HOME=str(tmp_path / "cache"),
            HOME=str(home),
        )

    recipe = team / "recipes" / f"{NAME}.yaml"
    sound = recipe.read_text(encoding="utf-8")
    recipe.write_text(sound.replace("3e-5", "2e-5"), encoding="utf-8")
    done = pre_commit()
    assert done.code == 0, done.out + done.err
    assert f"recipes/{NAME}.yaml: no mistakes" in done.out
    assert "docker-compose" not in done.out
    recipe.write_text(sound.replace("global_batch_size", "globl_batch_size"), encoding="utf-8")
    done = pre_commit()
    assert done.code == 1
    (shown,) = (output for command, output in consoles() if command.startswith("git commit"))
    assert "- exit code: 2" in done.out
    assert set(filter(None, shown.splitlines())) <= set(done.out.splitlines())


def test_the_hook_takes_recipes_of_any_library_and_nothing_else() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook["id"] == "accel-trainer-check"
    assert hook["id"] in file_of(".pre-commit-config.yaml")
    taken = ["recipes/a.yaml", "recipes/support/tickets.yml", "nlp/recipes/a.yaml"]
    left = ["recipes/README.md", "recipes/support/tickets.csv", "accelerate_configs/cpu.yaml", "norecipes/a.yaml"]
    assert [bool(re.search(hook["files"], name)) for name in [*taken, *left]] == [True] * 3 + [False] * 4
    assert shlex.split(hook["entry"]) == ["accel-trainer", "check"]
    assert hook["language"] == "python"


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_home(tmp_path: Path) -> Path:
    """A Hub cache that holds the team's library as a dataset repository: branch main, tag v1."""
    repository = tmp_path / "hub" / "datasets--team--recipes"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    write_library(snapshot)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    return tmp_path


@pytest.mark.parametrize(
    ("revision", "is_offline"), [("", True), ("@v1", True), (f"@{COMMIT}", True), ("@v1", False), (f"@{COMMIT}", False)]
)
def test_a_repository_of_the_hub_is_listed_from_its_cache(
    home: Path, hub_home: Path, revision: str, is_offline: bool
) -> None:
    entry = f"hf://datasets/team/recipes{revision}"
    environment = {"HF_HOME": str(hub_home), VARIABLE: entry, "HOME": str(home)}
    if not is_offline:
        environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody answers
    done = accel_trainer(home / "work", "list", "support", **environment)
    assert done.code == 0, done.err
    assert done.err == ("" if is_offline else NOT_REACHED)
    name, *_, origin, commit = done.out.splitlines()[1].split()
    assert (name, origin, commit) == (NAME, entry, f"({COMMIT[:7]})")


def test_a_repository_of_the_hub_is_checked_and_shown_with_its_tables(home: Path, hub_home: Path) -> None:
    environment = {"HF_HOME": str(hub_home), VARIABLE: "hf://datasets/team/recipes@v1", "HOME": str(home)}
    checked = accel_trainer(home / "work", "check", NAME, "imdb/distilbert", **environment)
    assert checked.code == 0, checked.err
    shown = accel_trainer(home / "work", "show", NAME, **environment)
    table = hub_home / "hub" / "datasets--team--recipes" / "snapshots" / COMMIT / "recipes" / "support" / "tickets.csv"
    assert parse_recipe(shown.out, "shown").dataset.path == str(table)


def test_what_is_not_cached_is_told_once(home: Path, hub_home: Path) -> None:
    entry = "hf://datasets/team/recipes@v2"
    environment = {"HF_HOME": str(hub_home), VARIABLE: entry, "HOME": str(home)}
    done = accel_trainer(home / "work", "check", NAME, **environment)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert done.err.endswith(
        f"{VARIABLE}: {entry}: it cannot be fetched (the Hub is not reached) and is not cached; connect once to fetch it, "
        f"or take it out of {VARIABLE}\n"
    )
    listed = accel_trainer(home / "work", "list", **environment)
    assert listed.code == 0
    assert "quickstart" in listed.out
    assert listed.err.count(entry) == 1


@pytest.fixture
def hub(home: Path) -> Iterator[tuple[str, list[str]]]:
    """A Hub with the team's library and a large file as a dataset repository: its address, and what is asked of it."""
    folder = home / "upstream"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    files |= {"data/train.parquet": b"0" * 10_000}
    oids = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
    tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": oid} for name, oid in oids.items()]
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            answers = {
                "/": b"",
                "/api/datasets/team/recipes/revision/v1": json.dumps({"id": "team/recipes", "sha": COMMIT}).encode(),
                f"/api/datasets/team/recipes/tree/{COMMIT}": json.dumps(tree).encode(),
            }
            answer = files.get(name) if name else answers.get(path)
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(answer or b"")))
            if name:
                self.send_header("ETag", f'"{oids[name]}"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer or b"")

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_recipes_and_their_tables_are_fetched_once_and_nothing_else(
    home: Path, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = hub
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HOME": str(home)}
    for revision in ("v1", COMMIT):
        entry = f"hf://datasets/team/recipes@{revision}"
        done = accel_trainer(home / "work", "list", "support", **environment, **{VARIABLE: entry})
        assert done.code == 0, done.err
        assert done.out.splitlines()[1].endswith(f"{entry} ({COMMIT[:7]})")
        assert done.err == ""
        snapshot = tmp_path / "hub" / "datasets--team--recipes" / "snapshots" / COMMIT
        found = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        assert {"recipes/support/tickets.yaml", "recipes/support/tickets.csv", "recipes/README.md"} <= found
        assert {Path(name).suffix for name in found} == {".yaml", ".csv", ".md"}
        if revision == "v1":
            assert any("/resolve/" in path for path in asked)
            asked.clear()
    assert not any("team/recipes" in path for path in asked)


# --- installed --------------------------------------------------------------------------------------------------------


def test_the_installed_package_brings_its_library(home: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "accel_trainer", site / "accel_trainer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", site / "accel_trainer" / "recipes")  # as the wheel has it
    done = accel_trainer(home / "work", "list", "quickstart", PYTHONPATH=str(site))
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].split()[-1] == "shipped"
    shown = accel_trainer(home / "work", "show", "quickstart", PYTHONPATH=str(site))
    assert str(site / "accel_trainer" / "recipes") in shown.out
