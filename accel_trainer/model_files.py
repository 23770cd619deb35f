"""The files that a checkpoint and its tokenizer are read from, and their hashes.

A recipe whose `model.sha256` names them trains on the same bytes or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from accel_trainer import writing
from accel_trainer.errors import CannotLoad, UserError
from accel_trainer.recipe import ModelSection

CONFIG = "config.json"  # a tokenizer without a class of its own is looked up by it too
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
TOKENIZER_FILES = frozenset(
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "spm.model",
        "sentencepiece.model",
        "sentencepiece.bpe.model",
        "tokenizer.model",
        "entity_vocab.json",
        "word_shape.json",
        "word_pronunciation.json",
    ]
)


class _Repository(NamedTuple):
    """A folder or a Hub repository that a recipe's model is read from."""

    key: str
    name: str
    revision: str
    prefix: str  # of its files in `model.sha256`
    has_weights: bool
    has_tokenizer: bool

    @property
    def is_local(self) -> bool:
        return Path(self.name).exists()

    def reads(self, file: str) -> bool:
        """Whether a file of that name is, or may be, read from it."""
        if self.has_weights and WEIGHTS.fullmatch(file):
            return True
        is_code = file.endswith(".py") and "/" not in file
        return file == CONFIG or is_code or (self.has_tokenizer and file in TOKENIZER_FILES)


def _repositories(section: ModelSection) -> Iterator[_Repository]:
    own = section.tokenizer is None
    if section.checkpoint is not None:
        yield _Repository("model.checkpoint", section.checkpoint, section.revision or "main", "", True, own)
    if section.tokenizer is not None:
        revision = section.tokenizer_revision or "main"
        yield _Repository("model.tokenizer", section.tokenizer, revision, "tokenizer/", False, True)


def pinned_files(section: ModelSection) -> ModelSection:
    """The section with commits and hashes of the files that it was just read from; without any for a model of its own.

    On the Hub's side that is what its cache holds of the commit.
    """
    commits: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for repository in _repositories(section):
        folder = Path(repository.name) if repository.is_local else _snapshot(repository)
        if folder is None:
            continue
        if not repository.is_local:
            commits[repository.key] = folder.name
        files = sorted(file.name for file in folder.iterdir() if repository.reads(file.name))
        hashes |= {repository.prefix + file: _sha256(folder / file) for file in files}
    return section.model_copy(
        update={
            "revision": commits.get("model.checkpoint", section.revision),
            "tokenizer_revision": commits.get("model.tokenizer", section.tokenizer_revision),
            "sha256": hashes or None,
        }
    )


def check_files(section: ModelSection) -> None:
    """See that a locked model's files are those that it was locked to, before anything is read from them.

    Those of the Hub are of a commit, or a file that has come since would be read.

    Raises:
        UserError: one differs, is missing, has come into the folder since, or can come since a branch or tag is named.
    """
    if section.sha256 is None:
        return
    unread = set(section.sha256)
    for repository in _repositories(section):
        if not repository.is_local and not _COMMIT.fullmatch(repository.revision):
            key = "tokenizer_revision" if repository.key == "model.tokenizer" else "revision"
            raise UserError(
                f"model.{key}: {repository.revision} of {repository.name} may move to other files than those of model.sha256; "
                "give a commit, or lock the recipe anew (accel-trainer lock)"
            )
        names = {file: name for name in unread if repository.reads(file := name.removeprefix(repository.prefix))}
        locked = {file: section.sha256[name] for file, name in names.items() if name.startswith(repository.prefix)}
        unread -= {repository.prefix + file for file in locked}
        for file, sha256 in locked.items():
            path = Path(repository.name) / file if repository.is_local else _fetched(repository, file)
            if not path.is_file():
                raise UserError(
                    f"model.sha256: {path} is missing, to which the recipe was locked; bring it back, or lock the recipe anew"
                )
            if (found := _sha256(path)) != sha256:
                raise UserError(
                    f"model.sha256: {path} is not the file that the recipe was locked to ({sha256[:12]}…, found "
                    f"{found[:12]}…); bring that one back, or lock the recipe anew"
                )
        if repository.is_local:
            strays = [
                f.name for f in Path(repository.name).iterdir() if repository.reads(f.name) and f.name not in locked
            ]
            if strays:
                raise UserError(
                    f"model.sha256: {Path(repository.name) / min(strays)} was not there when the recipe was locked, and would "
                    "be read; take it away, or lock the recipe anew"
                )
    if unread:
        raise UserError(f"model.sha256: nothing is read from {min(unread)}; take it out, or lock the recipe anew")


def _snapshot(repository: _Repository) -> Path | None:
    """The folder of a commit in the Hub's cache, of which something was just read."""
    for file in [CONFIG, *sorted(TOKENIZER_FILES)]:
        cached = try_to_load_from_cache(repository.name, file, revision=repository.revision)
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _fetched(repository: _Repository, file: str) -> Path:
    try:
        return Path(hf_hub_download(repository.name, file, revision=repository.revision))
    except (OSError, ValueError) as error:
        raise CannotLoad(repository.key, repository.name, error) from error


def _sha256(path: Path) -> str:
    status = path.stat()
    return _hashed(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _hashed(path: Path, _size: int, _mtime_ns: int) -> str:
    """SHA-256 of a file; what is checked before it is loaded is not read again when it is recorded."""
    return writing.sha256(path)
