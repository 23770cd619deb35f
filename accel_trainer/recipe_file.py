"""Recipes as text: YAML to `Recipe` and back, every mistake of a file at once, each with its line and its remedy.

Scalars follow the YAML 1.2 core schema: `2e-5` is a number, `no` is text, `010` is ten. What YAML offers beyond plain
mappings, lists and scalars (anchors, tags, merge keys, several documents) is refused: a recipe is flat.
"""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import override

from accel_trainer.errors import Mistake, RecipeError
from accel_trainer.recipe import RULES_LATER, Recipe, Section
from accel_trainer.spellings import ANSWERED, ANSWERED_VALUES, RENAMED, TRANSLATED, Renamed, Untranslatable

logger = logging.getLogger("accel_trainer")

COMMAND_LINE = "command line"
MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_DIGITS = 400  # beyond any number a recipe can mean, and below the length at which Python refuses to convert

Keys = tuple[str | int, ...]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `section.key=value` overrides applied in order.

    Relative files and folders become absolute: those the file names are looked for beside it, then in the working
    directory; those an override names, the other way round.

    Raises:
        RecipeError: every mistake of the file and of the overrides, the file's first, in the order of its lines.
    """
    source, path = str(path), Path(path)
    draft = _Draft(source)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        draft.fault((), "there is no such file", _similar_files(path))
    except IsADirectoryError:
        draft.fault((), "this is a folder", _similar_files(path / path.name))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        draft.fault((), f"the file cannot be read: {reason}", "check its name and permissions")
    if draft.mistakes:
        raise RecipeError(draft.mistakes)
    return parse_recipe(content, source, overrides, path.parent)


def parse_recipe(
    text: str | bytes, source: str, overrides: Sequence[str] = (), base: str | Path | None = None
) -> Recipe:
    """The recipe in a text; `source` names it in mistakes, and relative files are looked for in the folder `base` too.

    Raises:
        RecipeError: every mistake of the text and of the overrides.
    """
    draft = _Draft(source)
    try:
        draft.values = _read_mapping(_decoded(text, draft), draft)
    except _Unreadable:
        raise RecipeError(draft.mistakes) from None
    _respell(draft)
    for typed in overrides:
        _apply_override(draft, typed)
    _resolve_paths(draft, Path(base) if base is not None else None)
    recipe = _validated(draft)
    if draft.mistakes:
        raise RecipeError(sorted(draft.mistakes, key=_reading_order))
    return recipe


def to_yaml(recipe: Recipe, header: str = "") -> str:
    """YAML that loads back to an equal recipe: keys in the schema's order, defaults included, `header` as comments.

    Readers of YAML 1.1 and of YAML 1.2 find the same values in it.
    """
    comments = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    blocks = [
        yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)
        for key, value in recipe.model_dump().items()
    ]
    flat = sum(not isinstance(value, Section) for _, value in recipe)
    return comments + "\n".join(["".join(blocks[:flat]), *blocks[flat:]])


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors; `recipe.schema.json` beside this module is its copy."""
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "accel_trainer recipe"}
    return {**title, **{key: value for key, value in Recipe.model_json_schema().items() if key != "title"}}


def read_scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted scalar under the YAML 1.2 core schema."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if len(text) > MAX_DIGITS:
        return text
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"0o[0-7]+|0x[0-9a-fA-F]+", text):
        return int(text, 0)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", "", 1))
    return text


# --- a recipe being read ----------------------------------------------------------------------------------------------


class _Spot(NamedTuple):
    """Where a value was written, and how."""

    source: str
    line: int | None
    written: str = ""
    override: str = ""  # the whole override as typed


@dataclass
class _Draft:
    """A recipe being read: its plain values so far, where each stands, and what is wrong with it."""

    source: str
    override: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    spots: dict[Keys, _Spot] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    faulty: set[Keys] = field(default_factory=set)  # reported already: nothing more is said about these
    suspects: set[Keys] = field(default_factory=set)  # meant by something reported: no mistake if they are missing

    def spot(self, keys: Keys) -> _Spot:
        """Where a key stands, or else the section around it."""
        while keys:
            if keys in self.spots:
                return self.spots[keys]
            keys = keys[:-1]
        return _Spot(self.source, None, override=self.override)

    def place(self, keys: Keys, line: int, written: str) -> None:
        self.spots[keys] = _Spot(self.source, None if self.override else line, written, self.override)

    def move(self, old: Keys, new: Keys) -> None:
        for keys in [keys for keys in self.spots if keys[: len(old)] == old]:
            self.spots[new + keys[len(old) :]] = self.spots.pop(keys)

    def fault(self, keys: Keys, what: str, remedy: str, line: int | None = None, suspect: Keys | None = None) -> None:
        """Report a mistake at `keys`; given a `suspect`, the known key that an unknown one seems to mean."""
        spot = self.spot(keys)
        if spot.override:
            what = f"{what} (in `{_shown(spot.override)}`)"
        line = spot.line if line is None or spot.override else line
        self.mistakes.append(Mistake(spot.source, line, _dotted(keys), what, remedy))
        if suspect is None:
            self.faulty |= {keys} if keys else set()
        else:
            self.suspects |= {suspect} if suspect else set()


class _Unreadable(Exception):
    """Nothing more can be read after the mistake just reported."""


def _reading_order(mistake: Mistake) -> tuple[bool, float]:
    return mistake.source == COMMAND_LINE, float("inf") if mistake.line is None else mistake.line


def _dotted(keys: Keys) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{_shown(key)}" for key in keys).removeprefix(".")


def _shown(written: str) -> str:
    """Text fit for a message: one line, not long, and encodable."""
    line = " ".join(written.split()).encode(errors="replace").decode()
    return line if len(line) <= 60 else f"{line[:57]}…"


def _get(values: object, keys: Keys, default: object = None) -> Any:
    for key in keys:
        if (isinstance(values, dict) and key in values) or (isinstance(values, list) and isinstance(key, int)):
            values = cast(Any, values)[key]
        else:
            return default
    return values


def _put(values: dict[str, Any], keys: Keys, value: object) -> Keys | None:
    """Set a value, making the mappings around it; or return the keys of what is in the way."""
    for depth, key in enumerate(keys[:-1], start=1):
        name = cast(str, key)
        values[name] = {} if values.get(name) is None else values[name]
        if not isinstance(values[name], dict):
            return keys[:depth]
        values = values[name]
    values[cast(str, keys[-1])] = value
    return None


_ABSENT = object()


# --- YAML -------------------------------------------------------------------------------------------------------------

# PyYAML's problem → (what is wrong, what to do), in words that need no knowledge of its scanner.
_SYNTAX: list[tuple[str, str, str]] = [
    (r"character '\\t'", "a tab stands here", "indent with spaces"),
    (r"found character .(.)' that cannot start", "text cannot start with {0}", "put it in quotes"),
    (r"while scanning an? (alias|anchor)", "text cannot start with * or &", "put it in quotes"),
    (r"mapping values are not allowed", "a ': ' stands where none can", "align the key, or put the text in quotes"),
    (r"could not find expected ':'", "a key without ': ' and a value stands here", "write key: value"),
    (r"expected <block end>", "the line does not fit those above", "align the keys of a section, one to a line"),
    (r"expected ',' or", "a bracket is not closed, or text in it holds brackets", "close it, or quote the text"),
    (r"expected the node content", "a value is missing", "write it, or put text that starts with a sign in quotes"),
    (r"unexpected end of stream", "a quote is not closed", "close it"),
    (r"unknown escape|hexadecimal|expected escape", "\\ starts an escape in double quotes", "use single quotes"),
    (r"special characters are not allowed", "a control character stands here", "remove it, or write it as an escape"),
]


def _decoded(text: str | bytes, draft: _Draft) -> str:
    if len(text) > MAX_BYTES:
        draft.fault((), "the file is over 1 MB", "give a recipe; data go in files of their own")
        raise _Unreadable
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        draft.fault((), "the file is not UTF-8 text", "save it as UTF-8", line)
        raise _Unreadable from None


def _read_mapping(text: str, draft: _Draft) -> dict[str, Any]:
    value = _read_yaml(text, draft, ())
    if value is _ABSENT or (value is None and not draft.mistakes):
        draft.fault((), "the file is empty", "start from a recipe that ships with the package")
    elif not isinstance(value, dict):
        draft.fault((), "this is no recipe", "write sections such as dataset:, with their keys indented below")
    else:
        return value
    raise _Unreadable


def _read_yaml(text: str, draft: _Draft, keys: Keys) -> Any:
    """The one value in a YAML text, to stand at `keys`; its mistakes go to the draft."""
    try:
        return _YamlReader(text, draft).document(keys)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, f"{error.context or ''} {error.problem or ''}"
        line = mark.line + 1 if mark else None
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position) + 1, error.reason
    except (ValueError, OverflowError):  # of PyYAML's own: an escape or a directive beyond its numbers
        line, problem = None, "unknown escape"
    for pattern, what, remedy in _SYNTAX:
        if match := re.search(pattern, problem):
            draft.fault(keys, what.format(*match.groups()), remedy, line)
            break
    else:
        draft.fault(keys, "this cannot be read as YAML", "check colons, quotes, brackets and indentation", line)
    raise _Unreadable


class _YamlReader:
    """Plain values out of PyYAML's events, which still know what its loaders hide: duplicates, anchors, tags."""

    def __init__(self, text: str, draft: _Draft) -> None:
        self.text, self.draft = text, draft
        self.events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self, keys: Keys) -> Any:
        """The value of the first document, `_ABSENT` if there is none."""
        next(self.events)  # the stream's start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return _ABSENT
        value = self.node(keys, next(self.events), 1)
        next(self.events)  # the document's end
        second = next(self.events)
        if not isinstance(second, yaml.StreamEndEvent):
            self.draft.fault(
                (), "a second document starts here", "put every recipe in a file of its own", _line(second)
            )
        return value

    def node(self, keys: Keys, event: yaml.Event, line: int) -> Any:
        """The value that starts with `event`; `line` is that of its key."""
        if len(keys) > MAX_DEPTH:
            self.draft.fault(keys[:2], f"nested more than {MAX_DEPTH} levels deep", "a recipe is flat", line)
            raise _Unreadable
        start, end = _extent(event)
        self.draft.place(keys, line, self.text[start:end])
        if isinstance(event, yaml.AliasEvent):
            remedy = "a recipe is flat; write the value out, or in quotes if the * belongs to it"
            self.draft.fault(keys, f"*{event.anchor} is an alias", remedy)
            return None
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.anchor is not None:
            remedy = "a recipe is flat; write the value out, or in quotes if the & belongs to it"
            self.draft.fault(keys, f"&{event.anchor} is an anchor", remedy)
        if event.tag is not None:
            self.draft.fault(
                keys, f"{_shown(event.tag)} is a tag", "a recipe is flat; write the plain value, or quote it"
            )
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(keys, event)
        value = self.mapping(keys) if isinstance(event, yaml.MappingStartEvent) else self.sequence(keys)
        self.draft.place(keys, line, self.text[start : self.end].strip())
        return value

    def scalar(self, keys: Keys, event: yaml.ScalarEvent) -> Any:
        if not event.value.isascii() and re.search("[\ud800-\udfff]", event.value):
            self.draft.fault(keys, "half a character stands here", "write the character itself")
        # Class names are text however they look: `labels: [no, yes]`, `labels: {0: bad, 1: good}`.
        value = read_scalar(event.value) if event.style is None else event.value
        return event.value if keys[:2] == ("dataset", "labels") and keys[2:] and value is not None else value

    def sequence(self, keys: Keys) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self.node((*keys, len(values)), event, _line(event)))
        self.end = _extent(event)[1]
        return values

    def mapping(self, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = _line(event)
            name = self.key(keys, event, line)
            spare = (*keys, name or "", 0)  # what cannot be used is read all the same, at a place of its own
            if name is None or name in values:
                if name is not None:
                    what = f"`{name}` stands here and in line {lines[name]}"
                    self.draft.fault((*keys, name), "given twice" if self.draft.override else what, "keep one", line)
                self.node(spare, next(self.events), line)
                continue
            values[name] = self.node((*keys, name), next(self.events), line)
            lines[name] = line
        self.end = _extent(event)[1]
        return values

    def key(self, keys: Keys, event: yaml.Event, line: int) -> str | None:
        """The text of a key, None after a fault."""
        if not isinstance(event, yaml.ScalarEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                self.node((*keys, ""), event, line)
            self.draft.fault(keys, "a key must be text", "write one word, a colon and a space", line)
            return None
        if event.value == "<<" and event.style is None:
            self.draft.fault(keys, "<< is a merge key", "a recipe is flat; write the values out", line)
            return None
        if event.anchor is not None or event.tag is not None:
            self.draft.fault(keys, "a key with an anchor or a tag", "a recipe is flat; write the plain key", line)
            return None
        if not isinstance(self.scalar((*keys, event.value), event), str):
            what = f"the key {_shown(event.value)} is not text" if event.value else "a key is missing"
            self.draft.fault(keys, what, "put it in quotes" if event.value else "write one before the colon", line)
            return None
        return event.value


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


def _extent(event: yaml.Event) -> tuple[int, int]:
    assert event.start_mark is not None
    assert event.end_mark is not None
    return event.start_mark.index, event.end_mark.index


class _Dumper(yaml.SafeDumper):
    """Writes what YAML 1.1 and YAML 1.2 read alike."""

    @override
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what its own YAML 1.1 would misread; other readers of 1.1 take y and n for booleans too.
    misread = not isinstance(read_scalar(text), str) or text.lower() in ("y", "n")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if misread else None)


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    short = all(not isinstance(value, list | dict) for value in values) and len(str(values)) < 100
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=short)


def _represent_mapping(dumper: yaml.SafeDumper, values: dict[str, Any]) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", values, flow_style=not values)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(dict, _represent_mapping)


# --- what the schema allows -------------------------------------------------------------------------------------------


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _alternatives(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in schema:
        return _alternatives(_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    return [flat for one in schema["anyOf"] for flat in _alternatives(one)] if "anyOf" in schema else [dict(schema)]


def _allowed(keys: Keys) -> list[dict[str, Any]]:
    """The schemas that a value at `keys` may have; none where there is no such key."""
    allowed = _alternatives(_schema())
    for key in keys:
        below = [
            schema.get("items") if isinstance(key, int) else schema.get("properties", {}).get(key, _beyond(schema))
            for schema in allowed
        ]
        allowed = [flat for schema in below if schema is not None for flat in _alternatives(schema)]
    return allowed


def _beyond(schema: Mapping[str, Any]) -> Any:
    """The schema of a mapping's values where any key is allowed; None where not."""
    further = schema.get("additionalProperties")
    return {} if further is True else further or None


@cache
def _sections() -> dict[Keys, dict[str, Any]]:
    """Every section's own schema, outer ones first."""
    found: dict[Keys, dict[str, Any]] = {(): _schema()}
    for keys in (waiting := [cast(Keys, ())]):  # grows while it is walked
        for name in found[keys]["properties"]:
            for schema in _allowed((*keys, name)):
                if "properties" in schema:
                    found[(*keys, name)] = schema
                    waiting.append((*keys, name))
    return found


def _field(keys: Keys) -> Keys | None:
    """The field of a section that `keys` lie in; None where they lie in no field."""
    for depth in range(1, len(keys) + 1):
        if keys[depth - 1] not in _sections()[keys[: depth - 1]]["properties"]:
            return None
        if keys[:depth] not in _sections():
            return keys[:depth]
    return keys


def _required(keys: Keys) -> bool:
    return keys[-1] in _sections()[keys[:-1]].get("required", [])


def _called(section: Keys) -> str:
    return f"`{_dotted(section)}`" if section else "the top level"


# --- other spellings --------------------------------------------------------------------------------------------------


def _respell(draft: _Draft) -> dict[Keys, Keys]:
    """Move what has an accepted old name, report every other unknown key; returns old → new keys."""
    moved: dict[Keys, Keys] = {}
    for section, schema in _sections().items():
        mapping = _get(draft.values, section)
        for name in list(mapping) if isinstance(mapping, dict) else []:
            if name in schema["properties"]:
                continue
            keys, value = (*section, name), mapping.pop(name)
            renamed = RENAMED.get(name)
            new = tuple(renamed.new.split(".")) if renamed else ()
            if renamed and section in ((), ("training",), new[:-1], new[:1]):
                if _accept(draft, keys, renamed, value):
                    moved[keys] = new
            else:
                _report_unknown(draft, section, name)
    for dotted in TRANSLATED.keys() | ANSWERED_VALUES.keys():
        _translate(draft, tuple(dotted.split(".")))
    return moved


def _accept(draft: _Draft, old: Keys, renamed: Renamed, value: object) -> bool:
    """Put the value of an old name where it belongs, unless that is taken."""
    new: Keys = tuple(renamed.new.split("."))
    if _get(draft.values, new, _ABSENT) is not _ABSENT:
        line = draft.spot(new).line
        also = renamed.new if line is None else f"{renamed.new}, in line {line}"
        draft.fault(old, f"it means the same as {also}", "keep one, best the new name", suspect=new)
        return False
    try:
        value = renamed.value(value) if renamed.value else value
    except Untranslatable as error:
        draft.fault(old, error.what, error.remedy, suspect=new)
        return False
    spot = draft.spot(old)
    if _put(draft.values, new, value) is not None:
        return False  # the section is none, which is reported when it is validated
    draft.move(old, new)
    place = spot.source if spot.line is None else f"{spot.source}:{spot.line}"
    logger.info("%s: %s is read as %s", place, _dotted(old), renamed.new)
    return True


def _translate(draft: _Draft, keys: Keys) -> None:
    value, dotted = _get(draft.values, keys, _ABSENT), _dotted(keys)
    if value is _ABSENT:
        return
    if isinstance(value, str) and (answer := ANSWERED_VALUES.get(dotted, {}).get(value)):
        draft.fault(keys, f"'{value}': {answer.what}", answer.remedy)
    elif dotted in TRANSLATED and (new := TRANSLATED[dotted](value)) != value:
        _put(draft.values, keys, new)
        logger.info("%s: %s: %s is read as %s", draft.spot(keys).source, dotted, value, new)


def _report_unknown(draft: _Draft, section: Keys, name: str) -> None:
    keys, suspect = (*section, name), cast(Keys, ())
    what = f"{_called(section)} has no key of this name"
    homes = [home for home, schema in _sections().items() if name in schema["properties"]]
    dotted: Keys = tuple(name.split("."))
    if answer := ANSWERED.get(name):
        what, remedy = answer.what, answer.remedy
        suspect = tuple(answer.instead.split(".")) if answer.instead else ()
    elif renamed := RENAMED.get(name):
        suspect = tuple(renamed.new.split("."))
        remedy = f"write it as `{suspect[-1]}` in {_called(suspect[:-1])}"
    elif homes:
        remedy = f"it belongs in {' or '.join(map(_called, homes))}".replace("in the top", "at the top")
        suspect = (*homes[0], name) if len(homes) == 1 else ()
    elif len(dotted) > 1 and _field(dotted) == dotted:
        remedy, suspect = f"write `{dotted[-1]}` indented below {_called(dotted[:-1])}", dotted
    elif near := _nearest(name, section):
        remedy, suspect = f"did you mean `{near[-1] if near[:-1] == section else _dotted(near)}`?", near
    else:
        remedy = f"it takes {', '.join(_sections()[section]['properties'])}"
    draft.fault(keys, what, remedy, suspect=suspect)


def _nearest(name: str, section: Keys) -> Keys | None:
    """The known key whose name is most like this one, of the section first, then of all."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if close := get_close_matches(plain, _sections()[section]["properties"], 1, 0.7):
        return (*section, close[0])
    everywhere = {key: home for home, schema in _sections().items() for key in schema["properties"]}
    close = get_close_matches(plain, everywhere, 1, 0.8)
    return (*everywhere[close[0]], close[0]) if close else None


# --- overrides --------------------------------------------------------------------------------------------------------


def _apply_override(draft: _Draft, typed: str) -> None:
    """Lay `section.key=value` over the draft; later overrides win over earlier ones."""
    side = _Draft(COMMAND_LINE, typed)
    try:
        keys = _read_override(side, typed)
    except _Unreadable:
        keys = ()
    moved = _respell(side)
    for new in [*moved.values(), *([keys] if keys else [])]:
        value = _get(side.values, new, _ABSENT)
        if value is _ABSENT:
            continue
        if blocked := _put(draft.values, new, value):
            what = f"nothing can be set below {_dotted(blocked)}, which is {_shown(draft.spot(blocked).written)}"
            side.fault(new, what, "set it whole", suspect=blocked)
            continue
        draft.spots = {at: spot for at, spot in draft.spots.items() if at[: len(new)] != new}
        draft.spots |= {at: spot for at, spot in side.spots.items() if at[: len(new)] == new}
    draft.mistakes += side.mistakes
    draft.faulty |= side.faulty
    draft.suspects |= side.suspects


def _read_override(side: _Draft, typed: str) -> Keys:
    """Read one override into a draft of its own; returns the keys it sets, none after a mistake."""
    left, equals, right = typed.partition("=")
    keys: Keys = tuple(part.strip() for part in left.split("."))
    written = right.strip()
    if not equals:
        side.fault((), "an override has no =", "write section.key=value")
        return ()
    if not all(keys):
        side.fault((), "an override needs a key before its =", "write section.key=value")
        return ()
    for depth in range(len(keys)):
        side.place(keys[: depth + 1], 0, written)
    for depth in range(1, len(keys)):
        schemas = _allowed(keys[:depth])
        if schemas and not any(schema.get("type", "object") == "object" for schema in schemas):
            side.fault(keys, f"{_dotted(keys[:depth])} holds one value, with nothing below it", "set it whole")
            return ()
    # Whoever quotes or brackets the whole of a value means YAML; a slice such as train[:8000] is plain text.
    if written.startswith(("[", "{", "'", '"')):
        value = _read_yaml(written, side, keys)
    else:
        scalar = yaml.ScalarEvent(None, None, (True, False), written, style=None)
        value = _YamlReader("", side).scalar(keys, scalar)
    _put(side.values, keys, value)
    return keys


# --- files and folders ------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?")
_DATA_FILE = re.compile(r"\.(csv|tsv|txt|json|jsonl|ndjson|parquet|arrow)(\.(gz|bz2|zip|zst|xz))?$", re.IGNORECASE)


def _resolve_paths(draft: _Draft, beside: Path | None) -> None:
    """Make the files and folders that the draft names absolute; report those that exist nowhere."""
    singles: list[Keys] = [("model", "checkpoint"), ("model", "tokenizer"), ("dataset", "path")]
    for keys in singles:
        value = _get(draft.values, keys)
        if isinstance(value, str):
            hub = _HUB_ID.fullmatch(value) is not None and not _DATA_FILE.search(value)
            _resolve(draft, keys, value, _search_places(draft, keys, beside), optional=hub)
    path, files = _get(draft.values, ("dataset", "path")), cast(Keys, ("dataset", "data_files"))
    if ("dataset", "path") in draft.faulty or (isinstance(path, str) and not Path(path).is_absolute()):
        return  # files of a Hub repository or of an address
    for keys, value in list(_texts(_get(draft.values, files), files)):
        inside = isinstance(path, str) and Path(path).is_dir()
        places = [Path(path)] if inside else _search_places(draft, keys, beside)
        _resolve(draft, keys, value, places, optional=False)


def _texts(value: object, keys: Keys) -> Iterator[tuple[Keys, str]]:
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, list | dict):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(below, (*keys, key))


def _search_places(draft: _Draft, keys: Keys, beside: Path | None) -> list[Path]:
    places = [Path.cwd()] if beside is None else [beside.absolute(), Path.cwd()]
    return list(dict.fromkeys(reversed(places) if draft.spot(keys).override else places))


def _resolve(draft: _Draft, keys: Keys, value: str, places: Sequence[Path], *, optional: bool) -> None:
    if "://" in value:
        return
    try:
        wanted = Path(value).expanduser()
    except RuntimeError:  # ~somebody without a home
        wanted = Path(value)
    for place in places if value else []:
        if found := _absolute(place, wanted, globs=keys[1] == "data_files"):
            _get(draft.values, keys[:-1])[keys[-1]] = found
            return
    if not optional:
        looked = "it is absolute" if wanted.is_absolute() else f"looked in {' and '.join(map(str, places))}"
        draft.fault(keys, f"no such file or folder: '{_shown(value)}'", looked)


def _absolute(place: Path, wanted: Path, *, globs: bool) -> str | None:
    """The absolute form of a path that exists, or of a glob that matches something; else None."""
    path = place / wanted
    if _exists(path):
        # A link keeps its own name: the Hub's cache stores content under names without a suffix.
        return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)
    if not globs or not glob.has_magic(str(wanted)):
        return None
    root = Path(path.anchor) if wanted.is_absolute() else place.resolve()
    pattern = wanted.relative_to(root) if wanted.is_absolute() else wanted
    try:
        matches = any(True for _ in root.glob(str(pattern)))
    except (OSError, ValueError):  # a folder that may not be read, a null byte, ** within a name
        return None
    return str(Path(glob.escape(str(root))) / pattern) if matches else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, a folder that may not be read, a null byte
        return False


def _similar_files(path: Path) -> str:
    """What to do about a recipe that is not there: the names nearest to it in its folder."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return f"there is no folder {path.parent} either"
    close = get_close_matches(path.name, names, 3, 0.5) or names[:5]
    return f"its folder has {', '.join(close)}" if close else f"{path.parent} has no .yaml file"


# --- validation -------------------------------------------------------------------------------------------------------

# What stands in for a faulty value that must be there, so that everything else can be checked.
_STAND_INS: dict[str, Any] = {
    "dataset": {"path": "org/name", "splits": {"train": "train"}},
    "model": {"checkpoint": "org/name"},
    "training": {"global_batch_size": 1, "learning_rate": 1.0, "max_steps": 1},
}


def _validated(draft: _Draft) -> Recipe:
    """The recipe, meaningless unless the draft is free of mistakes afterwards."""
    for section in _sections():
        if _get(draft.values, section, _ABSENT) is None and not any(
            schema.get("type") == "null" for schema in _allowed(section)
        ):
            _put(draft.values, section, {})  # a heading whose keys are all commented out
    draft.faulty |= {keys for keys in draft.suspects if _get(draft.values, keys, _ABSENT) is _ABSENT}
    _drop_faulty(draft)
    try:
        recipe = Recipe.model_validate(draft.values, context=RULES_LATER)
    except ValidationError as error:
        _report(draft, error.errors(include_url=False))
        _drop_faulty(draft)
        recipe = Recipe.model_validate(draft.values, context=RULES_LATER)
    _report_rules(draft, recipe)
    return recipe


def _drop_faulty(draft: _Draft) -> None:
    """Replace what is faulty by its default, or by a stand-in where there is none."""
    for at in {at for keys in draft.faulty if (at := _field(keys)) is not None}:
        absent = (at[:depth] for depth in range(1, len(at)) if _get(draft.values, at[:depth], _ABSENT) is _ABSENT)
        at = next(absent, at)  # a section is not missing where its keys stand elsewhere by mistake
        outer = _get(draft.values, at[:-1])
        if isinstance(outer, dict):
            outer.pop(at[-1], None)
            if _required(at):
                outer[at[-1]] = deepcopy(_get(_STAND_INS, at))


def _report_rules(draft: _Draft, recipe: Recipe) -> None:
    known = frozenset(draft.faulty)
    for keys in _sections():
        section = _section_at(recipe, keys)
        for broken in section.rules() if section else ():
            involved = [(*keys, *name.split(".")) for name in (broken.field, *broken.also)]
            if not any(one[: len(two)] == two[: len(one)] for one in involved for two in known):
                draft.fault(involved[0], broken.what, broken.remedy)


def _section_at(recipe: Recipe, keys: Keys) -> Section | None:
    section: Any = recipe
    for key in keys:
        section = getattr(section, cast(str, key)) if section is not None else None
    return cast("Section | None", section)


def _report(draft: _Draft, errors: Sequence[ErrorDetails]) -> None:
    """One mistake for each value that pydantic refuses, however many alternatives it was tried against."""
    kinds: dict[Keys, set[str]] = {}
    for error in errors:
        kinds.setdefault(_located(draft.values, error), set()).add(error["type"])
    for keys, found in kinds.items():
        if not any(other != keys and other[: len(keys)] == keys for other in kinds):
            draft.fault(keys, *_explained(draft, keys, found))


def _located(values: object, error: ErrorDetails) -> Keys:
    """The keys of an error, without the names of alternatives that pydantic puts between them."""
    if error["type"] == "missing":
        return error["loc"]
    keys: Keys = ()
    for part in error["loc"]:
        here = _get(values, keys)
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            keys = (*keys, part)
    return keys


def _explained(draft: _Draft, keys: Keys, kinds: set[str]) -> tuple[str, str]:
    """What is wrong with a refused value, and what to do."""
    value, allowed = _get(draft.values, keys), _allowed(keys)
    written = draft.spots[keys].written if keys in draft.spots else str(value)
    types = {schema.get("type") for schema in allowed}
    wanted = " or ".join(dict.fromkeys(map(_in_words, allowed)))
    section = next((schema for schema in allowed if "properties" in schema), None)
    if "missing" in kinds:
        if section:
            return "it is missing", f"add it, with {', '.join(_get(_STAND_INS, keys))}"
        return "it is missing", f"add it: {_description(keys)}"
    if section:
        return f"{_quoted(value, written)} is no section", "write its keys below it, indented"
    choices = [choice for schema in allowed for choice in schema.get("enum", [schema.get("const")]) if choice]
    if choices and isinstance(value, str):
        near = get_close_matches(value.lower(), choices, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"'{_shown(value)}' is no choice", f"{hint}choose from {', '.join(choices)}"
    shown, remedy = _quoted(value, written), f"give {wanted}"
    if "finite_number" in kinds or (isinstance(value, int) and "number" in types and abs(value) > 1e300):
        return f"{shown} is not a finite number", remedy
    if any(kind.startswith("greater_than") for kind in kinds):
        return f"{shown} is too small", remedy
    if any(kind.startswith("less_than") for kind in kinds):
        return f"{shown} is too large", remedy
    plain = read_scalar(value) if isinstance(value, str) else None
    if plain is not None and _json_type(plain) in types | ({"integer"} if "number" in types else set()):
        remedy = "remove the quotes"
    elif isinstance(value, bool | int | float) and "string" in types:
        remedy = "put it in quotes"
    elif isinstance(value, float) and value.is_integer() and "integer" in types:
        remedy = f"write {int(value)}"
    elif types == {"array"} and isinstance(value, str | int | float):
        remedy = f"write a list: [{_shown(written)}]"
    nouns = list(dict.fromkeys(_noun(schema) for schema in allowed if schema.get("type") != "null"))
    refused = f"is not {nouns[0]}" if len(nouns) == 1 else f"is neither {' nor '.join(nouns)}"
    return f"{shown} {refused}", remedy


def _json_type(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _quoted(value: object, written: str) -> str:
    """A value as it was written, in quotes if it is text."""
    plain = isinstance(value, str) and not written.startswith(("'", '"'))
    return f"'{_shown(written or str(value))}'" if plain else _shown(written) or "nothing"


def _noun(schema: Mapping[str, Any]) -> str:
    if schema.get("type") == "array":
        return "a list of text"
    nouns = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
    return nouns.get(schema.get("type", ""), "a mapping")


def _in_words(schema: Mapping[str, Any]) -> str:
    """What a schema allows, bounds included."""
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return " or ".join(choices)
    words = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    bounds = [words[bound].format(schema[bound]) for bound in words if bound in schema]
    noun = "null" if schema.get("type") == "null" else _noun(schema)
    return f"{noun} {' and '.join(bounds)}".rstrip()


def _description(keys: Keys) -> str:
    text = _sections()[keys[:-1]]["properties"][keys[-1]].get("description", "")
    return str(text)[:1].lower() + str(text)[1:].rstrip(".")


def schema_text() -> str:
    """The content of `recipe.schema.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
