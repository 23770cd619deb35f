"""YAML text to plain values and back, by the YAML 1.2 core schema: `2e-5` is a number, `no` is text, `010` is ten.

What YAML offers beyond plain mappings, lists and scalars (anchors, tags, merge keys, several documents) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from typing_extensions import override

from accel_trainer.draft import ABSENT, Draft, Keys, Unreadable, shown

MAX_DEPTH = 20
MAX_VALUES = 20_000  # some seconds of PyYAML, and more than any list of labels
MAX_DIGITS = 400  # beyond any number a recipe can mean, and below the length at which Python refuses to convert

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


def read_yaml(text: str, draft: Draft, keys: Keys = (), texts: Keys | None = None) -> Any:
    """The one value in a YAML text, to stand at `keys`, `ABSENT` if there is none; its mistakes go to the draft.

    Args:
        text: the whole of it.
        draft: what the value belongs to.
        keys: where in it.
        texts: scalars below these keys stay text as written, whatever they look like.

    Raises:
        Unreadable: the text is no YAML, nested too deep, or holds too many values.
    """
    try:
        return _Reader(text, draft, texts).document(keys)
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
    raise Unreadable


def read_plain(text: str, draft: Draft, keys: Keys, texts: Keys | None = None) -> Any:
    """The value at `keys` of an unquoted scalar; `texts` as in `read_yaml`."""
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        draft.fault(keys, "half a character stands here", "write the character itself")
    value = read_scalar(text)
    stays = texts is not None and keys[: len(texts)] == texts and keys != texts
    return text if stays and value is not None else value


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


def write_yaml(values: dict[str, Any]) -> str:
    """A block of text that readers of YAML 1.1 and of YAML 1.2 read alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)


class _Reader:
    """Plain values out of PyYAML's events, which still know what its loaders hide: duplicates, anchors, tags."""

    def __init__(self, text: str, draft: Draft, texts: Keys | None) -> None:
        self.text, self.draft, self.texts = text, draft, texts
        self.values = 0
        self.events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)

    def document(self, keys: Keys) -> Any:
        """The value of the first document, `ABSENT` if there is none."""
        next(self.events)  # the stream's start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return ABSENT
        value = self.node(keys, next(self.events), 1)
        next(self.events)  # the document's end
        second = next(self.events)
        if not isinstance(second, yaml.StreamEndEvent):
            self.draft.fault(
                (), "a second document starts here", f"{self.draft.subject} is a file of its own", _line(second)
            )
        return value

    def node(self, keys: Keys, event: yaml.Event, line: int) -> Any:
        """The value that starts with `event`; `line` is that of its key."""
        if len(keys) > MAX_DEPTH:
            self.draft.fault(
                keys[:2], f"nested more than {MAX_DEPTH} levels deep", f"{self.draft.subject} is flat", line
            )
            raise Unreadable
        self.values += 1
        if self.values > MAX_VALUES:
            self.draft.fault(
                keys[:2], f"more than {MAX_VALUES} values", f"give {self.draft.subject}; data go in files", line
            )
            raise Unreadable
        start, end = _extent(event)
        self.draft.place(keys, line, self.text[start:end])
        if isinstance(event, yaml.AliasEvent):
            remedy = f"{self.draft.subject} is flat; write the value out, or in quotes if the * belongs to it"
            self.draft.fault(keys, f"*{event.anchor} is an alias", remedy)
            return None
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.anchor is not None:
            remedy = f"{self.draft.subject} is flat; write the value out, or in quotes if the & belongs to it"
            self.draft.fault(keys, f"&{event.anchor} is an anchor", remedy)
        if event.tag is not None:
            self.draft.fault(
                keys,
                f"{shown(event.tag)} is a tag",
                f"{self.draft.subject} is flat; write the plain value, or quote it",
            )
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(keys, event)
        value = self.mapping(keys) if isinstance(event, yaml.MappingStartEvent) else self.sequence(keys)
        self.draft.place(keys, line, self.text[start : self.end].strip())
        return value

    def scalar(self, keys: Keys, event: yaml.ScalarEvent) -> Any:
        value = read_plain(event.value, self.draft, keys, self.texts)
        return value if event.style is None else event.value

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
            self.draft.fault(keys, "<< is a merge key", f"{self.draft.subject} is flat; write the values out", line)
            return None
        if event.anchor is not None or event.tag is not None:
            self.draft.fault(
                keys, "a key with an anchor or a tag", f"{self.draft.subject} is flat; write the plain key", line
            )
            return None
        if not isinstance(self.scalar((*keys, event.value), event), str):
            what = f"the key {shown(event.value)} is not text" if event.value else "a key is missing"
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
    # Double quotes make an escape of a line's end. Without them some are read back as a space, and others take several lines,
    # the first of which a comment that is kept beside a value would run into.
    broken = any(end in text for end in "\r\n\x85\u2028\u2029")
    style = '"' if broken else "'" if misread else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    short = all(not isinstance(value, list | dict) for value in values) and len(str(values)) < 100
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=short)


def _represent_mapping(dumper: yaml.SafeDumper, values: dict[str, Any]) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", values, flow_style=not values)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(dict, _represent_mapping)
