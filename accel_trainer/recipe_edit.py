"""A recipe's text with some of its keys changed, and all else as its author left it: comments, order, quotes, blank lines."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE

from accel_trainer.draft import ABSENT, Draft, Keys, dotted
from accel_trainer.errors import RecipeError, UserError
from accel_trainer.library import is_file, shipped
from accel_trainer.recipe_fields import sections
from accel_trainer.recipe_file import read_draft
from accel_trainer.respelling import respell
from accel_trainer.writing import replaced
from accel_trainer.yaml_text import write_yaml

REMEDY = "copy it to a library of your own (accel-trainer copy FROM TO), and name the copy"
PATIENCE = 60.0  # seconds to wait for another command that changes the same file

_BREAKS = "\r\n\x85\u2028\u2029"  # where PyYAML ends a line, and so a comment
_COMMENT = re.compile(rf"#[^{_BREAKS}]*")
_BLANK_LINES = re.compile(rf"(?:[ \t]*(?:\r\n|[{_BREAKS}]))*")
_LINE_END = re.compile(rf"\r\n|[{_BREAKS}]|\Z")


def edit(text: str, changes: Mapping[Keys, Any]) -> str:
    """The text of a recipe with keys set, or removed where the value is `ABSENT`.

    A value takes the place of the old one; comments inside of it go above the key. A new key goes to the schema's place in
    its section. A key that stands there under an old name gives way to the new one.

    Args:
        text: a recipe, line ends as in its file.
        changes: plain values by key, such as `("training", "seed")`; mappings that are missing on the way are made.

    Raises:
        UserError: the text cannot be read, or what is to be set lies below a value that is no mapping.
    """
    mark, text = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    before = _values(text)
    after = Draft("", values=deepcopy(before))
    for keys, value in {**dict.fromkeys(_old_names(before, changes), ABSENT), **changes}.items():
        outer = after.get(keys[:-1])
        if value is not ABSENT and (blocked := after.put(keys, deepcopy(value))):
            raise UserError(
                f"{dotted(keys)}: nothing can be set below {dotted(blocked)}, which is no mapping; set it whole"
            )
        if value is ABSENT and isinstance(outer, dict):
            outer.pop(keys[-1], None)
    edited = _Editor(text).rewritten(before, after.values)
    with suppress(RecipeError):
        if _values(edited) == after.values:
            return mark + edited
    raise UserError(  # better no file than another recipe
        f"{', '.join(map(dotted, changes))}: in this text, nothing can be set without changing something else; set it by hand"
    )


def read_text(path: Path) -> str:
    """The text of a recipe's file, its line ends as they are.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: it cannot be read ({error}); check its permissions and that it is UTF-8 text"
        ) from error


class Change:
    """A recipe's text, to be exchanged for another one."""

    def __init__(self, text: str) -> None:
        self.text = text


@contextmanager
def changing(path: Path) -> Iterator[Change]:
    """The text of a recipe's file, which gets the new one when the block ends; other commands that change it wait.

    Raises:
        UserError: it cannot be read or written, belongs to others, or an editor has changed it meanwhile.
    """
    refuse_kept(path)
    with alone_with(path):
        change = Change(before := read_text(path))
        yield change
        if read_text(path) != before:
            raise UserError(f"{path}: another program has changed it meanwhile; nothing is written: try again")
        if change.text != before:
            write_recipe(path, change.text)


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Keep other commands that change a file waiting. Beside it lies a lock, which is gone afterwards.

    Raises:
        UserError: another command changes it all the time, or its folder cannot be written.
    """
    real = path.resolve()
    lock = FileLock(real.with_name(f".{real.name}.lock"), timeout=PATIENCE, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{path}: another command is changing it; try again when that is done") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(f"cannot write {path}: {error.strerror or error}; {REMEDY}") from error
    try:
        yield
    finally:
        if lock.is_locked:  # and nobody else's: who has opened the file and waits sees that it has no name any more
            with suppress(OSError):
                Path(lock.lock_file).unlink()
        lock.release()


def refuse_kept(path: Path) -> None:
    """See that a recipe may be changed.

    Raises:
        UserError: it belongs to what a package manager or the Hub's cache keeps.
    """
    real = path.resolve()
    for folder, keeper in ((Path(__file__).parent, "the installed package"), (Path(HF_HUB_CACHE), "the Hub's cache")):
        if real.is_relative_to(folder.resolve()) or path.absolute().is_relative_to(folder):
            raise UserError(f"{path}: it belongs to {keeper}, which is not to be changed; {REMEDY}")
    library = shipped("recipes").resolve()
    if real.is_relative_to(library) and not Path.cwd().resolve().is_relative_to(library.parent):
        raise UserError(f"{path}: it ships with accel_trainer, in a checkout that is not this folder; {REMEDY}")
    if is_file(real.parent / "run.json"):
        raise UserError(
            f"{path}: it is what a run did, which is not to be changed; name the recipe, or copy this one first"
        )


def write_recipe(path: Path, text: str) -> None:
    """Replace the text of a recipe, at once, through links, which stay.

    Raises:
        UserError: it cannot be written, or is not to be changed.
    """
    refuse_kept(path)
    try:
        with replaced(path.resolve()) as writing:
            writing.write_bytes(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {REMEDY}") from error


def _values(text: str) -> dict[str, Any]:
    draft = read_draft(text, "recipe")
    if draft.mistakes:
        raise RecipeError(draft.mistakes)
    return draft.values


def _old_names(values: dict[str, Any], changes: Mapping[Keys, Any]) -> list[Keys]:
    """Keys that mean, under old names, something that is changed."""
    moved = respell(Draft("recipe", values=deepcopy(values)))
    return [
        old
        for old, new in moved.items()
        if any(keys[: len(new)] == new or new[: len(keys)] == keys for keys in changes)
    ]


class _Splice(NamedTuple):
    """Lines that take the place of others."""

    start: int
    end: int
    lines: str


class _Entry(NamedTuple):
    """A key of a block mapping, with its value; places in the text."""

    key: yaml.Node
    value: yaml.Node
    start: int  # of its first line
    stop: int  # after the last line of its value
    end: int  # after the comments that go on below it, indented deeper than its key


class _Editor:
    """A text, and the comments between the tokens that PyYAML finds in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.newline = "\r\n" if "\r\n" in text else "\n"
        self.spaced = self.newline * 2 in text  # sections stand apart
        self.comments: list[tuple[int, int]] = []
        self.open_ends: set[int] = set()  # of blocks of text (|+) to which the blank lines that follow belong
        behind = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            start, end = _extent(token)
            self.comments += [found.span() for found in _COMMENT.finditer(text, behind, max(start, behind))]
            behind = max(behind, end)
            if (
                isinstance(token, yaml.ScalarToken)
                and token.style in ("|", ">")
                and f"\n{token.value}".endswith("\n\n")
            ):
                self.open_ends.add(end)

    def rewritten(self, old: dict[str, Any], new: dict[str, Any]) -> str:
        """The text with the values `new` where it has `old`."""
        root = yaml.compose(self.text, Loader=yaml.SafeLoader)
        assert isinstance(root, yaml.MappingNode)
        if _is_same(old, new):
            return self.text
        in_block = not root.flow_style and set(old) & set(new)
        splices = list(self._changed(root, old, new, (), None)) if in_block else [self._whole(root, new)]
        parts, behind = [""], 0
        for start, end, lines in sorted(splices, key=lambda splice: splice.start):
            parts.append(self.text[behind:start])
            if lines and start and self._line_start(start) != start:  # behind ---, or a last line without an end
                parts.append(self.newline)
            parts.append(lines)
            behind = max(behind, end)
        return "".join([*parts, self.text[behind:]])

    def _whole(self, root: yaml.Node, new: dict[str, Any]) -> _Splice:
        """Another text for all that there is, such as a mapping between braces."""
        start, stop = _extent(root)[0], self._after_line(self._content_end(root))
        return _Splice(start, stop, self._above(self._comments(start, stop), 0) + self._lines(new, 0))

    def _changed(
        self, node: yaml.MappingNode, old: dict[str, Any], new: dict[str, Any], keys: Keys, top: int | None
    ) -> Iterator[_Splice]:
        """What changes in a block mapping; `top` is where a first key goes, None: above the one that was first."""
        column = node.start_mark.column
        entries = {key.value: self._entry(key, value, column) for key, value in node.value}
        for name, entry in entries.items():
            if name not in new:
                yield self._removed(entry, column)
            elif not _is_same(old[name], new[name]):
                value, below = entry.value, self._after_line(_extent(entry.key)[1])
                if isinstance(value, yaml.MappingNode) and _goes_on(value, old[name], new[name], (*keys, name)):
                    yield from self._changed(value, old[name], new[name], (*keys, name), below)
                else:
                    yield self._replaced(entry, new[name], column)
        fields = list(sections()[keys]["properties"]) if keys in sections() else []
        rank = {name: place for place, name in enumerate(fields)}
        for name in sorted((name for name in new if name not in old), key=lambda name: rank.get(name, len(rank))):
            above = [entry for known, entry in entries.items() if rank.get(known, -1) < rank.get(name, len(rank))]
            first = next(iter(entries.values())).start if top is None else top
            place, lines = above[-1].end if above else first, self._lines({name: new[name]}, column)
            apart = self.spaced and not keys and above and isinstance(new[name], dict | list)
            apart = apart and place not in self.open_ends
            yield _Splice(place, place, self.newline + lines if apart else lines)

    def _entry(self, key: yaml.Node, value: yaml.Node, column: int) -> _Entry:
        stop = end = self._after_line(max(_extent(key)[1], self._content_end(value)))
        deeper = re.compile(rf"(?:[ \t]*[{_BREAKS}])* {{{column + 1},}}{_COMMENT.pattern}")
        while found := deeper.match(self.text, end):
            end = self._after_line(found.end())
        return _Entry(key, value, self._line_start(_extent(key)[0]), stop, end)

    def _removed(self, entry: _Entry, column: int) -> _Splice:
        """Nothing in the place of an entry, but for comments that have lines of their own."""
        comments = self._comments(entry.start, entry.stop)
        kept = [span for span in comments if not self.text[self._line_start(span[0]) : span[0]].strip()]
        start, stop, rest = entry.start, entry.stop, self.text[entry.stop :]
        if start in self.open_ends and not kept:
            stop = cast(re.Match[str], _BLANK_LINES.match(self.text, stop)).end()
        elif (
            not kept and self.text.endswith(self.newline * 2, 0, start) and (not rest or rest.startswith(self.newline))
        ):
            start -= len(self.newline)  # two blank lines would meet
        return _Splice(start, stop, self._above(kept, column))

    def _replaced(self, entry: _Entry, value: Any, column: int) -> _Splice:
        """The entry with another value, the comment behind it in its column."""
        colon = re.compile(r"[ \t]*:").match(self.text, _extent(entry.key)[1])
        after = colon.end() if colon else _extent(entry.key)[1]
        comments = self._comments(after, entry.stop)
        first, *below = self._lines({"k": value}, column).removeprefix(" " * column + "k:").splitlines(keepends=True)
        is_long = isinstance(value, str) and below  # text that goes on: what stands behind its first line is part of it
        beside = [span for span in comments if span[0] < self._after_line(after) and not is_long][:1]
        written = self._lines({entry.key.value: None}, column).rstrip().removesuffix(" null")
        head = self.text[entry.start : after] if colon else written
        line = head + first.rstrip(_BREAKS)
        for start, end in beside:
            line = f"{line:<{start - entry.start - 2}}  {self.text[start:end]}"
        above = self._above([span for span in comments if span not in beside], column)
        return _Splice(entry.start, entry.stop, above + line + self.newline + "".join(below))

    def _lines(self, values: dict[str, Any], column: int) -> str:
        lines = write_yaml(values).split("\n")
        return self.newline.join(" " * column + line if line else "" for line in lines)

    def _comments(self, start: int, end: int) -> list[tuple[int, int]]:
        return [span for span in self.comments if start <= span[0] < end]

    def _above(self, spans: list[tuple[int, int]], column: int) -> str:
        """Comments on lines of their own."""
        return "".join(" " * column + self.text[start:end] + self.newline for start, end in spans)

    def _line_start(self, place: int) -> int:
        return max(self.text.rfind(mark, 0, place) for mark in _BREAKS) + 1

    def _after_line(self, place: int) -> int:
        """Where the line of a place ends; the place itself, where a block of text has just ended together with its line."""
        if place and self._line_start(place) == place:
            return place
        return cast(re.Match[str], _LINE_END.search(self.text, place)).end()

    def _content_end(self, node: yaml.Node) -> int:
        """The end of a node; PyYAML ends a block only where the next one begins."""
        if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
            last = node.value[-1]
            return max(map(self._content_end, last if isinstance(last, tuple) else [last]))
        return _extent(node)[1]


def _extent(marked: Any) -> tuple[int, int]:
    return marked.start_mark.index, marked.end_mark.index


def _is_same(one: Any, other: Any) -> bool:
    """Whether two plain values are written alike: 1 is not 1.0, and labels have an order."""
    return repr(one) == repr(other)


def _goes_on(node: yaml.MappingNode, old: Any, new: Any, keys: Keys) -> bool:
    """Whether a block mapping becomes another by changes of its entries, which keep their order where it has a meaning."""
    if (
        not isinstance(node, yaml.MappingNode)
        or node.flow_style
        or not isinstance(new, dict)
        or not set(old) & set(new)
    ):
        return False
    kept = [name for name in old if name in new]
    return keys in sections() or list(new)[: len(kept)] == kept
