"""What git knows of a checkout, told without running what the checkout names."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from accel_trainer.git_version import commit, version


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    identity += ["-c", "protocol.file.allow=always"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def checkout_of(folder: Path) -> Path:
    """A checkout with one file, a.yaml."""
    folder.mkdir()
    git(folder, "init")
    (folder / "a.yaml").write_text("1", encoding="utf-8")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "x")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return checkout_of(tmp_path / "checkout")


def touched(folder: Path) -> None:
    """Let git look into the files again, whose content is the same."""
    os.utime(folder / "a.yaml", (0, 0))


def test_outside_of_a_checkout_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (commit(tmp_path), version(tmp_path)) == (None, "")
    assert (commit(tmp_path / "gone"), version(tmp_path / "gone")) == (None, "")
    git(tmp_path, "init")
    assert (commit(tmp_path), version(tmp_path)) == (None, "")  # no commit yet
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (commit(tmp_path), version(tmp_path)) == (None, "")  # no git


def test_commit_and_changes(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert (commit(checkout), version(checkout)) == (head, f"main at {head[:7]}")
    touched(checkout)
    (checkout / "untracked").touch()
    assert (commit(checkout), version(checkout)) == (head, f"main at {head[:7]}")
    (checkout / "a.yaml").write_text("2", encoding="utf-8")
    assert (commit(checkout), version(checkout)) == (f"{head}+changes", f"main at {head[:7]}, changed")
    (checkout / "below").mkdir()
    assert version(checkout / "below") == f"main at {head[:7]}, changed"
    git(checkout, "tag", "v1")
    git(checkout, "checkout", "--detach", "--force")
    assert (commit(checkout), version(checkout)) == (head, "v1")


def test_a_repository_without_files(checkout: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--bare", str(checkout), "bare")
    assert commit(tmp_path / "bare") == commit(checkout)
    assert version(tmp_path / "bare") == version(checkout)


def test_within_a_hook_of_another_checkout(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = checkout_of(tmp_path / "other")
    git(other, "tag", "other")
    own = version(checkout)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert version(checkout) == own != "main at other"


def test_the_users_own_settings_count(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.abbrev")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "12")
    assert version(checkout) == f"main at {git(checkout, 'rev-parse', 'HEAD')[:12]}"


# --- programs that a checkout names -----------------------------------------------------------------------------------


def _monitor(checkout: Path, program: str) -> None:
    git(checkout, "config", "core.fsmonitor", f"{program}; false")


def _hook(checkout: Path, program: str) -> None:
    hook = checkout / ".git" / "hooks" / "post-index-change"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{program}\n", encoding="utf-8")
    hook.chmod(0o755)


def _filter(checkout: Path, program: str) -> None:
    git(checkout, "config", "filter.x.clean", f"{program}; cat")
    (checkout / ".git" / "info").mkdir(exist_ok=True)
    (checkout / ".git" / "info" / "attributes").write_text("* filter=x\n", encoding="utf-8")


def _process(checkout: Path, program: str) -> None:
    git(checkout, "config", "filter.x.process", program)
    (checkout / ".gitattributes").write_text("[attr]m filter=x\n*.yaml m\n", encoding="utf-8")


def _included_filter_of_an_oddly_named_file(checkout: Path, program: str) -> None:
    (checkout / " a\r.yaml").write_text("1", encoding="utf-8")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "x")
    os.utime(checkout / " a\r.yaml", (0, 0))
    (checkout / ".git" / "more").write_text(f'[filter "x"]\n\tclean = "{program}; cat"\n', encoding="utf-8")
    git(checkout, "config", "include.path", "more")
    (checkout / ".gitattributes").write_text('"\\040a\\r.yaml" filter=x\n', encoding="utf-8")


def _filter_of_a_submodule(checkout: Path, program: str) -> None:
    inner = checkout_of(checkout.parent / "inner")
    git(checkout, "submodule", "add", str(inner), "sub")
    git(checkout, "commit", "-m", "x")
    git(checkout / "sub", "config", "filter.x.clean", f"{program}; cat")
    (checkout / "sub" / ".gitattributes").write_text("* filter=x\n", encoding="utf-8")
    touched(checkout / "sub")


def _remote_that_has_the_objects(checkout: Path, program: str) -> None:
    tree = git(checkout, "rev-parse", "HEAD^{tree}")
    git(checkout, "config", "core.repositoryformatversion", "1")
    git(checkout, "config", "extensions.partialClone", "origin")
    git(checkout, "config", "remote.origin.url", f"ext::sh -c {program.replace(' ', '% ')}")
    git(checkout, "config", "remote.origin.promisor", "true")
    git(checkout, "config", "protocol.ext.allow", "always")
    (checkout / "b.yaml").touch()
    git(checkout, "add", "b.yaml")  # so that the index does not stand for the tree
    (checkout / ".git" / "objects" / tree[:2] / tree[2:]).unlink()


@pytest.mark.parametrize(
    "planted",
    [
        _monitor,
        _hook,
        _filter,
        _process,
        _included_filter_of_an_oddly_named_file,
        _filter_of_a_submodule,
        _remote_that_has_the_objects,
    ],
)
def test_no_program_is_run_that_a_checkout_names(checkout: Path, planted: Callable[[Path, str], None]) -> None:
    ran = checkout.parent / "ran"
    planted(checkout, f"touch {ran}")
    touched(checkout)
    ran.unlink(missing_ok=True)
    head = git(checkout, "rev-parse", "HEAD")
    ran.unlink(missing_ok=True)
    assert (commit(checkout) or "").startswith(head)
    assert version(checkout).startswith(f"main at {head[:7]}")
    assert not ran.exists()
    subprocess.run(["git", "-C", str(checkout), "describe", "--always", "--dirty"], check=False, capture_output=True)
    assert ran.exists()  # as git alone would have it


@pytest.mark.parametrize(
    ("attributes", "told"), [("*.csv filter=x", True), ("*.yaml -filter", True), ("*.yaml filter=x", False)]
)
def test_where_a_filter_would_tell_changes_are_left_unsaid(checkout: Path, attributes: str, told: bool) -> None:
    (checkout / ".gitattributes").write_text(f"{attributes}\n", encoding="utf-8")
    (checkout / "a.yaml").write_text("2", encoding="utf-8")
    assert version(checkout).endswith(", changed") is told
    assert (commit(checkout) or "").endswith("+changes") is told
