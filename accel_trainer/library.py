"""Recipes by name: `imdb/distilbert` is looked up in ./recipes, in the team's libraries, and in the shipped one.

`$ACCEL_TRAINER_RECIPES` lists the team's, separated as in `$PATH`: folders, which may be git checkouts, and dataset
repositories of the Hub (`hf://datasets/team/recipes@v1`). First come, first served. Where a checkout or repository holds
a folder `recipes`, that is its library. A name is the path of a YAML file in a library, without its suffix.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path, PurePosixPath

from accel_trainer import git_version
from accel_trainer.errors import UserError

SCHEMA = "recipe.schema.json"
VARIABLE = "ACCEL_TRAINER_RECIPES"
SUFFIXES = (".yaml", ".yml")
MOST_FILES = 20_000  # files and folders of a library that are looked at; a home folder by mistake has more
MOST_NAMED = 20  # recipes of a folder that a message names
MOST_BYTES = 1_000_000  # of a recipe; a longer file is refused when it is read
FETCHED = ["*.yaml", "*.yml", "*.csv", "*.tsv", "*.jsonl", "*.md"]  # of a Hub repository: recipes and the tables beside

# Other YAML files lie beside recipes: accelerate configs, workflows. A recipe has two of its sections, even a misspelt one.
_SECTION = re.compile(rb"^(dataset|model|training|evaluation|saving|tracking)[ \t]*:", re.MULTILINE)
_REPOSITORY = re.compile(r"(?:hf://datasets/)?(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>.+?))?/?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """A folder of recipes, and where it is from, as the user wrote it."""

    folder: Path
    origin: str
    commit: str | None = None  # of a Hub repository
    is_checkout: bool = False  # or may be one

    def version(self) -> str:
        """Branch, tag and commit, as far as they are known; else empty."""
        return self.commit[:7] if self.commit else git_version.version(self.folder) if self.is_checkout else ""


@dataclass(frozen=True)
class Entry:
    """A recipe in reach."""

    name: str
    path: Path
    origin: str  # its library, with the version in parentheses where one is known
    shadows: tuple[str, ...]  # origins of recipes of the same name that it hides


def shipped(name: str) -> Path:
    """A folder that ships with the package, `recipes` or `accelerate_configs`, installed or in a checkout."""
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parent.parent / name


def libraries(*, hub: bool = True) -> Iterator[Library | UserError]:
    """Libraries in the order in which names are looked up; instead of one that cannot be had, why.

    Lazily: the Hub is asked when a lookup gets there. With `hub=False` its repositories are left out.
    """
    if _is_folder(Path("recipes")):
        yield Library(Path("recipes"), "./recipes")
    # A colon separates, but not the one of hf://.
    for entry in filter(None, re.split(re.escape(os.pathsep) + "(?!//)", os.environ.get(VARIABLE, ""))):
        folder = expanded(entry)
        if _is_folder(folder):
            yield Library(_library_in(folder), entry, is_checkout=True)
        elif hub:
            yield _from_hub(entry)
    yield Library(shipped("recipes"), "shipped")


def entries() -> list[Entry]:
    """All recipes in reach, by name; a library that cannot be had is told and left out."""
    found: dict[str, list[tuple[Path, str]]] = {}
    seen: set[Path] = set()
    for library in libraries():
        if isinstance(library, UserError):
            logger.warning("%s", library)
            continue
        if (real := library.folder.resolve()) in seen:
            continue
        seen.add(real)
        version = library.version()
        origin = f"{library.origin} ({version})" if version else library.origin
        for name, path in recipes_in(library.folder).items():
            found.setdefault(name, []).append((path, origin))
    return [
        Entry(name, *places[0], shadows=tuple(origin for _, origin in places[1:]))
        for name, places in sorted(found.items())
    ]


def find_recipe(recipe: str) -> tuple[str, Path]:
    """Name and path of a recipe, given as a path or as a name; where both fit, the path wins.

    Raises:
        UserError: there is neither such a file nor such a name, or a library to look it up in cannot be had.
    """
    path = expanded(recipe)
    if is_file(path):
        return _name_of(path), path
    for library in libraries():
        if isinstance(library, UserError):
            raise library
        if found := _recipe_at(library.folder, recipe):
            return recipe, found
    raise UserError(_not_found(recipe, path))


def schema_address(recipe: Path) -> str:
    """Where editors find the JSON Schema of a recipe, for its modeline `# yaml-language-server: $schema=…`.

    That of the recipe's library, relative to the recipe, so that the address means the same on every machine: the nearest
    `recipe.schema.json` in the folders above it, up to the root of its repository. Else that of the installed package.
    """
    folder = recipe.absolute().parent
    for above in (folder, *folder.parents):
        if is_file(above / SCHEMA):
            return Path(os.path.relpath(above / SCHEMA, folder)).as_posix()
        if (above / ".git").exists():
            break
    return Path(__file__).with_name(SCHEMA).as_posix()


# --- entries of the variable ------------------------------------------------------------------------------------------


def _library_in(folder: Path) -> Path:
    inside = folder / "recipes"
    return inside if _is_folder(inside) else folder


def _from_hub(entry: str) -> Library | UserError:
    match = _REPOSITORY.fullmatch(entry)
    if match is None or not (entry.startswith("hf://") or match["revision"]):
        remedy = "correct it, or give a folder, a git checkout, or hf://datasets/OWNER/NAME@REVISION"
        return UserError(f"{VARIABLE}: {entry}: no such folder; {remedy}")
    try:
        snapshot = _snapshot(match["id"], match["revision"])
    except UserError as error:
        return UserError(f"{VARIABLE}: {entry}: {error}")
    return Library(_library_in(snapshot), entry, commit=snapshot.name)


@cache
def _snapshot(repository: str, revision: str | None) -> Path:
    """Folder of a dataset repository at a revision, from the Hub, or from its cache where the Hub is not reached."""
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from accel_trainer.hub import use_cache_if_unreachable

    use_cache_if_unreachable()  # a commit would be asked for again and again
    shows_progress = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns=FETCHED
            )
        )
    except errors.RevisionNotFoundError as error:
        raise UserError(f"there is no revision {revision}; give a branch, a tag or a commit of it") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            "there is no such dataset repository that you may read; correct it, or log in by `hf auth login`"
        ) from error
    except Exception as error:  # of the HTTP client, which changes between versions, and of the disk
        reason = (
            "the Hub is not reached"
            if huggingface_hub.constants.HF_HUB_OFFLINE
            else type(error.__cause__ or error).__name__
        )
        raise UserError(
            f"it cannot be fetched ({reason}) and is not cached; connect once to fetch it, or take it out of {VARIABLE}"
        ) from error
    finally:
        if shows_progress:
            enable_progress_bars()


# --- files ------------------------------------------------------------------------------------------------------------


def expanded(text: str) -> Path:
    """The path that somebody typed, with their home folder for `~`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~somebody without a home
        return Path(text)


# Path's own raise where a name is too long or a folder cannot be read.


def is_file(path: Path) -> bool:
    """Whether a file lies there, whatever is typed."""
    return os.path.isfile(path)  # noqa: PTH113


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def _recipe_at(folder: Path, name: str) -> Path | None:
    """The recipe of that name in a library; where only another YAML file has the name, none."""
    if PurePosixPath(name).as_posix() != name or name.startswith("/") or ".." in PurePosixPath(name).parts:
        return None
    paths = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if is_file(path) and _is_recipe(path)), None)


def recipes_in(folder: Path) -> dict[str, Path]:
    """Name → path of the recipes in a library."""
    names: dict[str, Path] = {}
    for path in sorted(_yaml_files(folder)):
        if _is_recipe(path):
            names.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return names


def _yaml_files(folder: Path) -> Iterator[Path]:
    """YAML files in a folder and the folders below it, without hidden ones and without following links to folders."""
    looked_at, folders = 0, [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as listing:
                for entry in listing:
                    looked_at += 1
                    if looked_at > MOST_FILES:
                        logger.warning(
                            "%s: more than %s files; recipes among the rest are not listed: give a folder of recipes",
                            folder,
                            f"{MOST_FILES:,}",
                        )
                        return
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.name.endswith(SUFFIXES) and entry.is_file():
                        yield Path(entry.path)
        except OSError:  # a folder that cannot be read, or is gone
            continue


def _is_recipe(path: Path) -> bool:
    """Whether a YAML file has sections of a recipe; one that cannot be read may have."""
    try:
        with path.open("rb") as file:
            return len(set(_SECTION.findall(file.read(MOST_BYTES)))) >= 2
    except OSError:
        return True


def _name_of(path: Path) -> str:
    """The name that stands for a file, else its own without the suffix."""
    folders = [library.folder for library in libraries(hub=False) if isinstance(library, Library)]
    here = path.parent.resolve() / path.name
    for folder in folders:
        if here.is_relative_to(folder.resolve()):
            name = here.relative_to(folder.resolve()).with_suffix("").as_posix()
            meant = next(filter(None, (_recipe_at(other, name) for other in folders)), None)
            if meant is not None and meant.resolve() == path.resolve():
                return name
    return path.stem


def _not_found(recipe: str, path: Path) -> str:
    """What to say instead of a recipe: those of a folder, or those with a name like it."""
    names = [entry.name for entry in entries()]
    typed = recipe.removesuffix(".yaml").removesuffix(".yml").removeprefix("./").removeprefix("recipes/").strip("/")
    inside = [name for name in names if name.startswith(f"{typed}/")]
    if not inside and _is_folder(path):
        inside = [str(file) for file in recipes_in(path).values()]
    if inside:
        more = f" and {len(inside) - MOST_NAMED} more" if len(inside) > MOST_NAMED else ""
        return f"{recipe} is a folder of recipes; give one of them: {', '.join(inside[:MOST_NAMED])}{more}"
    if not names:
        return f"{recipe}: no such recipe; give the path of a YAML file: no names are in reach"
    elsewhere = [name for name in names if name.rpartition("/")[2] == typed.rpartition("/")[2]]
    close = list(dict.fromkeys([*elsewhere, *get_close_matches(typed, names, n=3)]))[:3]
    guess = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"{recipe}: no such recipe{guess}; give the path of a YAML file, or a name that `accel-trainer list` shows"
