"""What `load_dataset` reads: datasets of the Hub, or of its cache where the Hub is not reached, and folders with configs."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import yaml
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from accel_trainer.errors import DataError
from accel_trainer.file_names import extensions, is_data_file, redacted
from accel_trainer.hub import is_on_hub, use_cache_if_unreachable
from accel_trainer.recipe import DatasetSection, Recipe
from accel_trainer.tables import Origin, Table, chosen_splits, quiet

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})")


def hub_id(path: str) -> tuple[str, str | None] | None:
    """Repository and revision of a Hub id or `hf://datasets/…`; None for everything else."""
    if address := re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/?", path):
        return address[1], address[2]
    looks_local = path.startswith((".", "/")) or extensions(path) != (None, None)
    if Path(path).exists() or looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return None
    return path, None


def reach_hub(recipe: Recipe) -> None:
    """If data, checkpoint or tokenizer are on the Hub, see whether it answers, before each library does."""
    dataset, model = recipe.dataset, recipe.model
    asked = dataset.path is not None and hub_id(dataset.path) is not None
    if asked or is_on_hub(model.checkpoint) or is_on_hub(model.tokenizer):
        use_cache_if_unreachable()


def read_hub(
    repository: str, dataset: DatasetSection, revision: str | None, only: Collection[str] | None
) -> tuple[dict[str, Table], str | None]:
    """Tables by split, and the commit where it is known."""
    commit = _commit(repository, revision)
    if commit is not None:
        loaded = _load_dataset(repository, dataset.name, revision=commit, data_files=dataset.data_files)
        return _tables(loaded, repository, only), commit
    # Offline `load_dataset` looks into its own prepared files only, and takes any revision for the one asked for.
    problem: DataError | None = None
    if (snapshot := _snapshot(repository, revision)) is not None:
        try:
            loaded = _load_dataset(str(snapshot), dataset.name, data_files=dataset.data_files, called=repository)
            return _tables(loaded, repository, only), snapshot.name
        except DataError as error:  # such as a snapshot with the files of another configuration alone
            problem = error
    try:
        loaded = _load_dataset(repository, dataset.name, data_files=dataset.data_files)
    except DataError as error:
        raise problem or error from None
    prepared_from = _prepared_commit(loaded)
    if revision not in (None, "main", prepared_from):
        raise DataError(
            f"{repository}: the Hub is not reached, and what is cached is revision {prepared_from or 'unknown'}, not "
            f"{revision}; connect once to fetch it, or change `dataset.revision`"
        )
    return _tables(loaded, repository, only), prepared_from


def has_configs(readme: Path) -> bool:
    """Whether a dataset card, if there is one, lists configurations."""
    if not readme.is_file():
        return False
    try:
        metadata = huggingface_hub.metadata_load(readme)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise DataError(f"{readme}: its metadata cannot be read ({error}); correct the YAML between the ---") from error
    return bool(metadata and metadata.get("configs"))


def read_configs(folder: Path, name: str | None, only: Collection[str] | None) -> dict[str, Table]:
    """The splits of one configuration of a local folder."""
    return _tables(_load_dataset(str(folder), name), str(folder), only)


def _commit(repository: str, revision: str | None) -> str | None:
    """Commit of the revision; None if the Hub is not reached."""
    if datasets.config.HF_HUB_OFFLINE:
        return None
    try:
        with quiet():
            return huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=20).sha
    except GatedRepoError as error:
        raise DataError(
            f"{repository}: this dataset is gated; ask for access at https://huggingface.co/datasets/{repository} "
            "and log in by `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"{repository}: there is no revision {revision!r}; correct `dataset.revision`, or leave it out for main"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"{repository}: there is no such file or folder here, and no such dataset on the Hub that you may read; "
            "correct `dataset.path`, or log in by `hf auth login` if it is private"
        ) from error
    except Exception as error:  # timeouts, proxies, 5xx: the client's HTTP library, and so its errors, changed twice
        logger.warning("%s: the Hub is not reached (%s); its cache is read", repository, type(error).__name__)
        return None


def _snapshot(repository: str, revision: str | None) -> Path | None:
    """The repository's folder in the Hub cache; None if it is not there, or shards of it are missing."""
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    # The cache keeps whatever was fetched: README.md alone, or the first shards of a download that broke off.
    files = list(folder.rglob("*"))
    matches = [(file.parent, match) for file in files if (match := _SHARD.match(file.name))]
    shards = Counter((parent, match["stem"], int(match["count"])) for parent, match in matches)
    complete = all(found == count for (_, _, count), found in shards.items())
    has_data = any(is_data_file(file.name) for file in files)
    return folder if complete and has_data else None


def _prepared_commit(loaded: datasets.DatasetDict) -> str | None:
    """`datasets` names the folder of files prepared from the Hub after the commit."""
    folders = {Path(file["filename"]).parent.name for data in loaded.values() for file in data.cache_files}
    commit = folders.pop() if len(folders) == 1 else ""
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _tables(loaded: datasets.DatasetDict, name: str, only: Collection[str] | None) -> dict[str, Table]:
    splits = chosen_splits(map(str, loaded), name, only)
    return {split: Table(loaded[split], (Origin(f"{name} {split}", len(loaded[split])),)) for split in splits}


def _load_dataset(
    path: str,
    name: str | None,
    revision: str | None = None,
    data_files: Any = None,
    called: str | None = None,
) -> datasets.DatasetDict:
    called = called or path
    try:
        with quiet():
            return datasets.load_dataset(path, name, revision=revision, data_files=data_files)
    except DatasetGenerationError as error:
        raise DataError(
            f"{called}: its files cannot be read ({_first_lines(error.__cause__ or error)}); name them in "
            "`dataset.data_files`, or correct the dataset"
        ) from error
    except Exception as error:  # of six libraries, many of them bare ValueError
        raise DataError(f"{called}: {_first_lines(error)}; {_load_remedy(error)}") from error


def _load_remedy(error: Exception) -> str:
    text = str(error)
    if any(sign in text for sign in ("Available:", "Available configs", "Config name is missing", "multiple")):
        return "name one of them: `dataset.name`"
    if "script" in text:
        return "export the dataset to parquet and name those files, since scripts are not run"
    if isinstance(error, ConnectionError) or datasets.config.HF_HUB_OFFLINE:
        return "nothing of it is cached here: connect once to fetch it, or name local files in `dataset.path`"
    return "correct `dataset.path`, `name`, `revision` or `data_files`"


def _first_lines(error: BaseException) -> str:
    return redacted(" ".join(str(error).splitlines()[:2]) or type(error).__name__)
