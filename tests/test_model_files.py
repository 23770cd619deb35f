"""A locked model is read from the files that it was locked to, or not at all."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from hub_cache import COMMIT, snapshot, write_checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from accel_trainer import writing
from accel_trainer.errors import CannotLoad, UserError
from accel_trainer.model_files import TOKENIZER_FILES, check_files, pinned_files
from accel_trainer.recipe import ModelSection

READ = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "README.md").write_text("no part of it", encoding="utf-8")
    return tmp_path / "checkpoint"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of a checkpoint on the Hub, which is not reached."""
    folder = snapshot(tmp_path / "home", "model", "team/tiny")
    write_checkpoint(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return folder


def hashes(folder: Path, names: set[str] = READ) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_every_file_that_is_read_is_pinned(checkpoint: Path) -> None:
    section = pinned_files(ModelSection(checkpoint=str(checkpoint)))
    assert section.sha256 == hashes(checkpoint)
    assert section.revision is None
    check_files(section)
    assert pinned_files(section) == section


def test_a_checkpoint_of_the_hub_is_pinned_with_its_commit(hub: Path) -> None:
    section = pinned_files(ModelSection(checkpoint="team/tiny"))
    assert section.sha256 == hashes(hub)
    assert section.revision == COMMIT["model"]
    check_files(section)
    assert pinned_files(section) == section


def test_another_tokenizer_has_files_of_its_own(checkpoint: Path, hub: Path) -> None:
    section = pinned_files(ModelSection(checkpoint=str(checkpoint), tokenizer="team/tiny"))
    assert section.sha256 is not None
    of_model = hashes(checkpoint, {"config.json", "model.safetensors"})
    of_tokenizer = hashes(hub, {"config.json", "tokenizer.json", "tokenizer_config.json"})
    assert section.sha256 == {**of_model, **{f"tokenizer/{name}": sha256 for name, sha256 in of_tokenizer.items()}}
    assert (section.revision, section.tokenizer_revision) == (None, COMMIT["model"])
    check_files(section)
    (hub / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the file"):
        check_files(section)


def test_a_model_from_its_config_has_no_files() -> None:
    section = ModelSection(from_config={"model_type": "bert"}, train_tokenizer={})
    assert pinned_files(section) == section
    check_files(section)
    with pytest.raises(UserError, match=r"nothing is read from config\.json"):
        check_files(section.model_copy(update={"sha256": {"config.json": "a" * 64}}))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT["model"][:7]])
def test_a_locked_model_of_the_hub_names_its_commit(revision: str | None, checkpoint: Path) -> None:
    whole = pinned_files(ModelSection(checkpoint="team/tiny"))
    with pytest.raises(UserError, match=rf"model\.revision: {revision or 'main'} of team/tiny may move .*lock"):
        check_files(whole.model_copy(update={"revision": revision}))
    part = pinned_files(ModelSection(checkpoint=str(checkpoint), tokenizer="team/tiny"))
    check_files(part.model_copy(update={"revision": revision}))  # a folder has none
    with pytest.raises(UserError, match=rf"model\.tokenizer_revision: {revision or 'main'} of team/tiny may move"):
        check_files(part.model_copy(update={"tokenizer_revision": revision}))


@pytest.mark.parametrize("name", sorted(READ))
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_other_bytes_are_refused(name: str, where: str, checkpoint: Path, hub: Path) -> None:
    folder, called = (checkpoint, str(checkpoint)) if where == "folder" else (hub, "team/tiny")
    section = pinned_files(ModelSection(checkpoint=called))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert section.sha256 is not None
    was, found = section.sha256[name][:12], hashes(folder)[name][:12]
    says = f"{re.escape(name)} is not the file that the recipe was locked to \\({was}…, found {found}…\\)"
    with pytest.raises(UserError, match=says):
        check_files(section)


def test_a_missing_file_is_refused(checkpoint: Path, hub: Path) -> None:
    local, remote = (pinned_files(ModelSection(checkpoint=name)) for name in (str(checkpoint), "team/tiny"))
    for folder in (checkpoint, hub):
        (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        check_files(local)
    with pytest.raises(CannotLoad, match=r"model\.checkpoint: cannot load 'team/tiny'"):
        check_files(remote)


@pytest.mark.parametrize("name", ["vocab.txt", "added_tokens.json", "modeling.py", "model-00001-of-00002.safetensors"])
def test_a_file_that_came_later_is_refused(name: str, checkpoint: Path) -> None:
    section = pinned_files(ModelSection(checkpoint=str(checkpoint)))
    (checkpoint / name).touch()
    with pytest.raises(UserError, match=rf"{re.escape(name)} was not there when the recipe was locked"):
        check_files(section)


def test_the_same_bytes_elsewhere_will_do(checkpoint: Path, tmp_path: Path) -> None:
    section = pinned_files(ModelSection(checkpoint=str(checkpoint)))
    shutil.move(checkpoint, tmp_path / "moved")
    check_files(section.model_copy(update={"checkpoint": str(tmp_path / "moved")}))


def test_a_file_is_hashed_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    sha256 = writing.sha256
    monkeypatch.setattr(writing, "sha256", lambda path: (read.append(path.name), sha256(path))[1])
    section = pinned_files(ModelSection(checkpoint=str(checkpoint)))
    check_files(section)
    pinned_files(section)
    assert len(read) == len(READ)


def test_the_files_of_every_tokenizer_are_known() -> None:
    found: set[str] = set()
    for family in CLASSIFIERS:
        name = TOKENIZER_MAPPING_NAMES.get(family)
        try:
            tokenizer = getattr(transformers, name) if isinstance(name, str) else None
            found |= set(getattr(tokenizer, "vocab_files_names", {}).values())
        except ImportError:  # of a package that is not installed
            continue
    assert len(found) > 5
    assert found <= TOKENIZER_FILES
