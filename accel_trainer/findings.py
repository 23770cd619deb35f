"""What is wrong with the data, or worth knowing: from scanned roles to findings with counts, rows and remedies.

An *error* is what training refuses; a *warning* is worth mending first; a *note* is worth knowing. Nothing is drawn at
random: the same rows give the same findings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations

import numpy as np
import numpy.typing as npt

from accel_trainer.data import SMALLEST_JUDGED_SPLIT, label_cells, mapping
from accel_trainer.labels import match_labels, rare_classes, same_spelling
from accel_trainer.role_scan import EXAMPLES, ROWS_AT_ONCE, Example, Scan, Tally
from accel_trainer.splits import parse_slices
from accel_trainer.text_faults import TEXT_FAULTS, Severity, excerpt

# Shares from which there is a finding, or from which it is a warning and no longer a note.
MANY_DUPLICATES = 0.1  # short reviews come again and again (`good`, `很好吃`) and weigh as often as they were said
DOMINATING_TEXT = 0.02  # of the rows, and at least MANY_ROWS of them, hold one text
ALIKE_BEGINNINGS = 0.5  # of the different texts
MANY_ROWS = 20  # in fewer, shares are chance
LEAKING_LABELS = 0.2  # of the rows begin or end with their label; with a name like `good` some do by nature
HEAVY_IMBALANCE = 0.9  # of the rows are of one class, so that always naming it looks like a good model
SHIFTED_LABELS = 0.1  # total variation distance: the share of rows that would have to change their label
CERTAINLY_SHIFTED = 3.0  # times the distance that chance alone makes of roles of these sizes
MANY_CUT = 0.1  # of the rows
MANY_WITHOUT_WORDS = 0.01  # of the rows
SOME_UNKNOWN, MANY_UNKNOWN = 0.005, 0.02  # of the tokens; English under an English vocabulary has next to none
# Tokens per character: English about 0.25, Chinese under its own vocabulary 0.7 to 1, under an English byte-level one 2.
FRAGMENTED = 1.3
MOST_NAMED = 5  # labels or classes that have a finding of their own; a wrong column would have a thousand
FEW_SCORED_ROWS = 100  # fewer leave an accuracy uncertain by 10 points and more


@dataclass(frozen=True)
class Finding:
    """One thing found in the data."""

    kind: str
    role: str  # or several, joined by commas
    severity: Severity
    what: str  # with counts
    rows: tuple[Example, ...]  # the first few
    count: int  # of rows, or of texts or classes where `what` says so
    share: float  # of those that were looked at
    remedy: str


def rows_and_share(count: int, of: int) -> str:
    """`3 rows (0.3%)`."""
    return f"{_rows(count)} ({percent(count / of)})"


def percent(share: float) -> str:
    """A share in percent, never 0.0% of something that is there."""
    return "under 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _again(one: str, other: str) -> str:
    """Another place beside one; its file is not said again."""
    file, _, row = other.rpartition(", ")
    return f"{row if one.rpartition(', ')[0] == file else other}"


def _texts(count: int) -> str:
    return f"{count:,} text{'' if count == 1 else 's'}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _joined(scans: Sequence[Scan]) -> str:
    return ", ".join(scan.role for scan in scans)


def all_findings(scans: Sequence[Scan]) -> Iterator[Finding]:
    """All that shows without a tokenizer; training rows come first among the scans."""
    for scan in scans:
        yield from _of_texts(scan)
        yield from _of_labels(scan)
        yield from _of_classes(scan)
        yield from _duplicates(scan)
        yield from _alike_beginnings(scan)
        yield from _sorted_source(scan)
    yield from _shared_texts(scans)
    yield from _two_labels(scans)
    yield from _label_shifts(scans)
    yield from _alike_names(scans)


# --- texts ------------------------------------------------------------------------------------------------------------


def _tallied(kind: str, scan: Scan, severity: Severity, tally: Tally, what: str, remedy: str) -> Iterator[Finding]:
    if tally.count:
        rows = tuple(Example(scan.place(row), text) for row, text in tally.first)
        said = f"{rows_and_share(tally.count, len(scan))}: {what}"
        yield Finding(kind, scan.role, severity, said, rows, tally.count, tally.count / len(scan), remedy)


def _of_texts(scan: Scan) -> Iterator[Finding]:
    columns = " or ".join(map(repr, scan.section.text_columns))
    kinds = [scan.table.data.features[column] for column in scan.section.text_columns]
    are_text = all(getattr(kind, "dtype", None) in ("string", "large_string") for kind in kinds)
    remedy = "remove or complete the rows" if are_text else "set dataset.text_column to the column of the text"
    yield from _tallied("no text", scan, "error", scan.missing, f"no text in {columns}", remedy)
    for fault, tally in zip(TEXT_FAULTS, scan.faults, strict=True):
        many = fault.kind == "no words" and tally.count >= max(MANY_ROWS, MANY_WITHOUT_WORDS * len(scan))
        yield from _tallied(fault.kind, scan, "warning" if many else fault.severity, tally, fault.what, fault.remedy)
    remedy = "see that dataset.text_column and text_pair_column are the right ones"
    yield from _tallied("equal pair", scan, "note", scan.equal_pairs, "the same text twice", remedy)
    what, remedy = "the name of a label and nothing else", "see that dataset.text_column is the column of the text"
    yield from _tallied("label as text", scan, "note", scan.is_label, what, remedy)
    if scan.has_label.count >= max(MANY_ROWS, LEAKING_LABELS * len(scan)):
        what = "a text that begins or ends with the name of its own label"
        remedy = "if it was added to the texts, remove it: those to be labelled later will not have it"
        yield from _tallied("label in text", scan, "warning", scan.has_label, what, remedy)


def _duplicates(scan: Scan) -> Iterator[Finding]:
    """Rows whose text stood there before, and a text that is everywhere."""
    rows = np.flatnonzero(scan.keys)
    if not len(rows):
        return
    _, first, place, counts = np.unique(scan.keys[rows], return_index=True, return_inverse=True, return_counts=True)
    again = np.flatnonzero(first[place] != np.arange(len(rows)))
    n = len(scan)
    if len(again):
        share = len(again) / n
        what = f"{rows_and_share(len(again), n)}: the text of an earlier row again"
        shown = [
            scan.example(a, more=f", as {_again(scan.place(a), scan.place(b))}")
            for a, b in zip(rows[again[:EXAMPLES]].tolist(), rows[first[place[again[:EXAMPLES]]]].tolist(), strict=True)
        ]
        severity: Severity = "warning" if share >= MANY_DUPLICATES else "note"
        remedy = "a few are normal, and weigh as often as they were said; remove those that were copied"
        yield Finding("duplicates", scan.role, severity, what, tuple(shown), len(again), share, remedy)
    most = int(np.argmax(counts))
    count = int(counts[most])
    if count >= max(MANY_ROWS, DOMINATING_TEXT * n):
        what = f"{rows_and_share(count, n)}: the same text"
        shown = [scan.example(int(rows[first[most]]))]
        remedy = "if it stands for a missing text, remove the rows"
        yield Finding("one text everywhere", scan.role, "warning", what, tuple(shown), count, count / n, remedy)


def _alike_beginnings(scan: Scan) -> Iterator[Finding]:
    """Texts that differ, and of which most begin with the same words."""
    keys, distinct = np.unique(scan.keys, return_index=True)
    rows = np.sort(distinct[keys != 0])
    if len(rows) < MANY_ROWS:
        return
    beginnings, counts = np.unique(scan.beginnings[rows], return_counts=True)
    most = int(np.argmax(counts))
    count, share = int(counts[most]), int(counts[most]) / len(rows)
    if share < ALIKE_BEGINNINGS:
        return
    alike = rows[scan.beginnings[rows] == beginnings[most]].tolist()
    least, *_, last = sorted({scan.text(row) for row in alike[:ROWS_AT_ONCE]})  # their common beginning is that of all
    common = next((i for i, (one, other) in enumerate(zip(least, last, strict=False)) if one != other), len(least))
    what = f"{count:,} of the {len(rows):,} different texts begin with {excerpt(least[:common])}"
    remedy = "remove it if the texts to be labelled later do not begin so"
    shown = tuple(map(scan.example, alike[:EXAMPLES]))
    yield Finding("same beginning", scan.role, "note", what, shown, count, share, remedy)


def _shared_texts(scans: Sequence[Scan]) -> Iterator[Finding]:
    """Texts that stand in two roles."""
    for one, other in combinations(scans, 2):
        keys, mine, its = np.intersect1d(one.keys, other.keys, return_indices=True)
        pairs = sorted((int(b), int(a)) for key, a, b in zip(keys, mine, its, strict=True) if key)
        if pairs:
            share = len(pairs) / len(other)
            verb = "stands" if len(pairs) == 1 else "stand"
            what = f"{_texts(len(pairs))} of {other.role} ({percent(share)}) {verb} in {one.role} too"
            shown = tuple(
                other.example(b, more=f", as {_again(other.place(b), one.place(a))}") for b, a in pairs[:EXAMPLES]
            )
            remedy = (
                f"the score on {other.role} is too good by that much at most; if it is more than a few, remove them"
            )
            role = _joined([one, other])
            yield Finding("shared text", role, "warning", what, shown, len(pairs), share, f"{remedy} from {one.role}")


# --- labels -----------------------------------------------------------------------------------------------------------


def _of_labels(scan: Scan) -> Iterator[Finding]:
    n, unlabelled = len(scan), scan.unlabelled
    for value, rows in list(scan.strays.items())[:MOST_NAMED]:
        folded = {name.casefold(): name for name in scan.label_names}
        close = get_close_matches(value.casefold(), folded, n=1)
        guess = f" (did you mean {folded[close[0]]!r}?)" if close else ""
        what = (
            f"the label {excerpt(value)} of {rows_and_share(len(rows), n)} is none of {_few(scan.label_names)}{guess}"
        )
        remedy = _counted_from_one(scan) or "mend the rows, or list every label in dataset.labels"
        shown = tuple(map(scan.example, rows[:EXAMPLES]))
        yield Finding("unknown label", scan.role, "error", what, shown, len(rows), len(rows) / n, remedy)
    if more := list(scan.strays.values())[MOST_NAMED:]:
        count = sum(map(len, more))
        what = f"{len(more):,} more values that are no labels, in {rows_and_share(count, n)}"
        remedy = "see that dataset.label_column is the column of the labels"
        yield Finding("unknown label", scan.role, "error", what, (), count, count / n, remedy)
    if len(unlabelled) and not (scan.role == "test" and len(unlabelled) == n):
        what = f"{rows_and_share(len(unlabelled), n)}: no label"
        remedy = "label or remove them (only a test split may be unlabelled, and then wholly)"
        shown = tuple(map(scan.example, unlabelled[:EXAMPLES].tolist()))
        yield Finding("no label", scan.role, "error", what, shown, len(unlabelled), len(unlabelled) / n, remedy)


def _counted_from_one(scan: Scan) -> str:
    """The remedy where labels seem to be counted from 1, else nothing."""
    names = scan.label_names
    if not scan.integers or min(scan.integers) != 1 or max(scan.integers) > len(names) or "1" in names:
        return ""
    values_to_names = ", ".join(f"{i}: {name}" for i, name in enumerate(names, 1))
    return f"ids count from 0, these labels seem to count from 1: set dataset.labels: {{{values_to_names}}}"


def _of_classes(scan: Scan) -> Iterator[Finding]:
    counts, names = scan.counts, scan.label_names
    labelled = int(counts.sum())
    if not labelled or scan.strays:  # the classes are known when every label is
        return
    most = int(np.argmax(counts))
    share = int(counts[most]) / labelled
    judged = scan.role == "train" or (scan.role == "validation" and labelled >= SMALLEST_JUDGED_SPLIT)
    if share == 1 and judged:
        what = f"all {labelled:,} rows have the label {names[most]!r}"
        remedy = (
            _counted_from_one(scan) or "where a file is sorted by label, set dataset.shuffle_seed; or choose other rows"
        )
        yield Finding("one class", scan.role, "error", what, (), labelled, 1.0, remedy)
        return
    if absent := [names[i] for i in np.flatnonzero(counts == 0)]:
        use = "it cannot be learnt" if scan.role == "train" else "the score says nothing of it"
        remedy = _counted_from_one(scan) or "choose other rows, or drop the class from dataset.labels"
        what = f"no row has the label {_few(absent)}; {use}"
        yield Finding("missing class", scan.role, "warning", what, (), len(absent), len(absent) / len(names), remedy)
    yield from _rare(scan, counts)
    if scan.role == "train" and labelled >= MANY_ROWS and share >= HEAVY_IMBALANCE:
        what = f"{rows_and_share(int(counts[most]), labelled)}: {names[most]!r}; always saying so is right as often"
        remedy = "judge by f1 with evaluation.average: macro, and find more rows of the other classes"
        yield Finding("imbalance", scan.role, "warning", what, (), int(counts[most]), share, remedy)
    if scan.role != "train" and labelled < FEW_SCORED_ROWS:
        what = f"{_rows(labelled)} to score: an accuracy is uncertain by about {98 / labelled**0.5:.0f} points"
        yield Finding("few rows", scan.role, "note", what, (), labelled, 1.0, "give the role more rows")


def _rare(scan: Scan, counts: npt.NDArray[np.int64]) -> Iterator[Finding]:
    names = scan.label_names
    rare = rare_classes(counts.tolist())
    for i in rare[:MOST_NAMED]:
        count = int(counts[i])
        close = get_close_matches(
            names[i], [name for name, other in zip(names, counts, strict=True) if other > count], n=1
        )
        remedy = f"if it is {close[0]!r} misspelt, mend the rows; else add some" if close else "add rows of it"
        what = f"there {'is' if count == 1 else 'are'} only {_rows(count)} of the class {names[i]!r}"
        shown = tuple(map(scan.example, np.flatnonzero(scan.labels == i).tolist()))
        severity: Severity = "warning" if scan.role == "train" else "note"
        yield Finding("rare class", scan.role, severity, what, shown, count, count / int(counts.sum()), remedy)
    if more := rare[MOST_NAMED:]:
        what, count = (
            f"{len(more):,} more classes have as few: {_few([names[i] for i in more])}",
            int(counts[more].sum()),
        )
        remedy = "see that they are classes, and add rows of them"
        yield Finding("rare class", scan.role, "warning", what, (), count, count / int(counts.sum()), remedy)


def _two_labels(scans: Sequence[Scan]) -> Iterator[Finding]:
    """Texts that have one label here and another there."""
    of_scan = np.concatenate([np.full(len(scan), i) for i, scan in enumerate(scans)])
    of_row = np.concatenate([np.arange(len(scan)) for scan in scans])
    keys, labels = np.concatenate([scan.keys for scan in scans]), np.concatenate([scan.labels for scan in scans])
    judged = np.flatnonzero((keys != 0) & (labels >= 0))
    judged = judged[np.argsort(keys[judged], kind="stable")]
    _, start, text = np.unique(keys[judged], return_index=True, return_inverse=True)
    first = judged[start[text]]  # row where the text of each of these rows stands first
    differing = np.flatnonzero(labels[judged] != labels[first])
    if not len(differing):
        return
    _, second = np.unique(text[differing], return_index=True)
    pairs = sorted((int(first[i]), int(judged[i])) for i in differing[second])

    def said(row: int) -> str:
        scan = scans[of_scan[row]]
        return f"{scan.place(int(of_row[row]))} ({scan.label_names[labels[row]]})"

    involved = sorted({int(of_scan[row]) for row in [*first[differing], *judged[differing]]})
    shown = tuple(
        Example(f"{said(a)} and {_again(said(a), said(b))}", excerpt(scans[of_scan[a]].text(int(of_row[a]))))
        for a, b in pairs[:EXAMPLES]
    )
    what = f"{_texts(len(pairs))} with different labels in different rows"
    remedy = "decide which is right, or remove them: no model can learn both"
    role = _joined([scans[i] for i in involved])
    yield Finding("two labels", role, "warning", what, shown, len(pairs), len(pairs) / len(start), remedy)


def _label_shifts(scans: Sequence[Scan]) -> Iterator[Finding]:
    """Roles whose classes have other shares than in training."""
    train, *others = scans
    for scan in others:
        distance = _certain_distance(train.counts, scan.counts)
        if distance > SHIFTED_LABELS and np.count_nonzero(scan.counts) > 1:  # one class is a finding of its own
            what = _compared(scan.label_names, scan.role, scan.counts, train.role, train.counts)
            remedy = "if that is not meant, draw both from one table by shares such as 0.8, or set dataset.shuffle_seed"
            count = round(distance * int(scan.counts.sum()))
            yield Finding("label shift", _joined([train, scan]), "warning", what, (), count, distance, remedy)


def _certain_distance(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> float:
    """Total variation distance between two label distributions; 0 where chance may have made it."""
    n, m = one.sum(), other.sum()
    if not n or not m:
        return 0.0
    shares = (one + other) / (n + m)
    distance = float(np.abs(one / n - other / m).sum() / 2)
    # Half the sum over the classes of the mean |x|, where x is normal with the variance of the difference of two shares.
    chance = float(np.sqrt(2 / np.pi * shares * (1 - shares) * (1 / n + 1 / m)).sum() / 2)
    return distance if distance > CERTAINLY_SHIFTED * chance else 0.0


def _compared(
    names: list[str], one: str, ones: npt.NDArray[np.int64], other: str, others: npt.NDArray[np.int64]
) -> str:
    """The class whose shares differ most."""
    mine, its = ones / ones.sum(), others / others.sum()
    i = int(np.argmax(np.abs(mine - its)))
    return f"{names[i]!r} is {percent(mine[i])} of {one} and {percent(its[i])} of {other}"


def _sorted_source(scan: Scan) -> Iterator[Finding]:
    """A slice of a table that is sorted by label, which gets other classes than the table has."""
    source = scan.section.splits.roles()[scan.role]
    if scan.section.shuffle_seed is not None or not isinstance(source, str):
        return
    if all(piece.start is None and piece.stop is None for piece in parse_slices(source)):
        return
    cells = label_cells(scan.section, scan.role, scan.table, np.arange(len(scan.table.data)), scan.label_names)
    keys, matched = match_labels(cells, scan.label_names, mapping(scan.section))
    known = [i for key in keys if key is not None and (i := matched[key]) is not None]
    counts = np.bincount(np.asarray(known, dtype=np.int64), minlength=len(scan.label_names))
    distance = _certain_distance(scan.counts, counts)
    changes = np.count_nonzero(np.diff(known))
    by_chance = len(known) * (1 - ((counts / max(1, len(known))) ** 2).sum())
    if distance > SHIFTED_LABELS and changes < by_chance / 2:
        what = f"{_compared(scan.label_names, source, scan.counts, 'its table', counts)}, which is sorted by label"
        remedy = "set dataset.shuffle_seed, which shuffles before slicing"
        yield Finding("sorted by label", scan.role, "warning", what, (), int(scan.counts.sum()), distance, remedy)


def _alike_names(scans: Sequence[Scan]) -> Iterator[Finding]:
    """Classes that are one, written in two ways."""
    names = scans[0].label_names
    totals = np.sum([scan.counts for scan in scans], axis=0)
    for pair in same_spelling(names)[:MOST_NAMED]:
        ids = [names.index(name) for name in pair]
        one, other = (f"{names[i]!r} ({_rows(int(totals[i]))})" for i in ids)
        what = f"the classes {one} and {other} differ in spelling only"
        remedy = "write them alike, or join them by dataset.labels: {value: name}"
        shown = tuple(scans[0].example(row) for i in ids for row in np.flatnonzero(scans[0].labels == i)[:1].tolist())
        count = int(totals[ids].sum())
        yield Finding(
            "label spelling", _joined(scans), "warning", what, shown, count, count / max(1, totals.sum()), remedy
        )


# --- tokens -----------------------------------------------------------------------------------------------------------


def token_findings(
    scan: Scan,
    lengths: npt.NDArray[np.int64],
    unknown: npt.NDArray[np.int64],
    specials: int,
    max_length: int,
) -> Iterator[Finding]:
    """What the token counts of a role show.

    Args:
        scan: the role.
        lengths: tokens of each row before anything is cut, special ones included, (n,); 0 where there is no text.
        unknown: unknown tokens of each row, (n,).
        specials: special tokens of a row.
        max_length: tokens that are kept of a row.
    """
    n, rows = len(scan), np.flatnonzero(lengths)
    words = np.maximum(lengths - specials, 0)
    if len(none := rows[words[rows] == 0]):
        what = f"{rows_and_share(len(none), n)}: no token at all"
        shown = tuple(map(scan.example, none[:EXAMPLES].tolist()))
        remedy = "see what they are; the tokenizer drops every character of them"
        yield Finding("no tokens", scan.role, "warning", what, shown, len(none), len(none) / n, remedy)
    cut = np.flatnonzero(lengths > max_length)
    if len(cut):
        lost = int((lengths[cut] - max_length).sum()) / int(lengths.sum())
        longest = cut[np.argsort(-lengths[cut], kind="stable")[:EXAMPLES]].tolist()
        what = f"{rows_and_share(len(cut), n)}: longer than {max_length} tokens, and cut there; "
        what += f"{percent(lost)} of all tokens are lost"
        shown = tuple(scan.example(row, more=f", {lengths[row]:,} tokens") for row in longest)
        severity: Severity = "warning" if len(cut) >= MANY_CUT * n else "note"
        remedy = "raise dataset.max_length if the model has positions for it, or shorten the texts yourself"
        yield Finding("cut texts", scan.role, severity, what, shown, len(cut), len(cut) / n, remedy)
    share = int(unknown.sum()) / max(1, int(words.sum()))
    if share >= SOME_UNKNOWN:
        some = np.flatnonzero(unknown)
        of_row = unknown / np.maximum(words, 1)
        worst = some[np.lexsort((some, -unknown[some], -of_row[some]))[:EXAMPLES]].tolist()
        what = f"{percent(share)} of the tokens are unknown to the tokenizer, in {rows_and_share(len(some), n)}"
        shown = tuple(scan.example(row, more=f", {percent(of_row[row])} unknown") for row in worst)
        many = share >= MANY_UNKNOWN
        remedy = (
            "use a checkpoint for the language of the texts" if many else "see what they are; a few symbols are normal"
        )
        yield Finding("unknown tokens", scan.role, "warning" if many else "note", what, shown, len(some), share, remedy)
    per_character = int(words.sum()) / max(1, scan.characters)
    if per_character > FRAGMENTED:
        what = f"there are {per_character:.1f} tokens to a character: the vocabulary spells the texts byte by byte"
        shown = tuple(map(scan.example, rows[:EXAMPLES].tolist()))
        remedy = "use a checkpoint for the language of the texts"
        yield Finding("fragments", scan.role, "warning", what, shown, len(rows), len(rows) / n, remedy)
