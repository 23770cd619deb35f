"""The data looked at before training: what a careful person would find by reading them, counted and with examples.

accel-trainer check RECIPE --data

recipe ─▶ rows by role ─▶ role_scan: texts, once ─▶ findings ─▶ a page of text
                          tokenizer: lengths     ─▶
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from accel_trainer.data import load_labelled, note_on_guesses, select_rows
from accel_trainer.errors import CannotLoad, DataError, UserError
from accel_trainer.findings import Finding, all_findings, percent, rows_and_share, token_findings
from accel_trainer.hub_data import reach_hub
from accel_trainer.library import find_recipe
from accel_trainer.model import load_config
from accel_trainer.model_files import check_files
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import load_recipe
from accel_trainer.role_scan import Scan, scan_role
from accel_trainer.terminal import Style, complain, print_table, say
from accel_trainer.text_faults import Severity
from accel_trainer.tokenization import load_tokenizer, longest_input

MOST_CLASSES = 30  # rows of the label table
STYLES: dict[Severity, Style] = {"error": "red", "warning": "yellow", "note": "cyan"}  # worst first


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a role's texts, special ones included, before anything is cut."""

    median: int
    percentile_95: int
    longest: int
    cut: int  # rows longer than the maximum length
    lost: float  # share of all tokens that is cut off
    unknown: float  # share of the tokens, special ones left out, that the tokenizer does not know


@dataclass(frozen=True)
class RoleSummary:
    """One role in numbers."""

    role: str
    rows: int
    counts: list[int]  # labelled rows by class id
    unlabelled: int
    tokens: TokenCounts | None  # None where the tokenizer cannot be loaded


@dataclass(frozen=True)
class Inspection:
    """All that was found in the data of a recipe."""

    label_names: list[str]
    roles: list[RoleSummary]
    findings: list[Finding]  # errors first
    notes: list[str]  # what could not be looked at, and what is no fault
    max_length: int | None  # None where neither the recipe nor a tokenizer tells it

    @property
    def errors(self) -> int:
        """Findings for which training would refuse the data."""
        return sum(finding.severity == "error" for finding in self.findings)


def inspect(recipe: Recipe, *, trust_remote_code: bool = False) -> Inspection:
    """Look at the data of a recipe, row by row.

    Args:
        recipe: what is to be trained; the model itself is not made.
        trust_remote_code: run code that the checkpoint's repository holds.

    Raises:
        UserError: the data cannot be read, or the roles cannot be taken from them: there is nothing to look at.
    """
    section = recipe.dataset
    reach_hub(recipe)
    selection = select_rows(section)
    scans = [scan_role(section, role, *rows, selection.label_names) for role, rows in selection.roles.items()]
    findings = list(all_findings(scans))
    notes = _notes(scans)
    counts: dict[str, TokenCounts] = {}
    max_length = section.max_length
    try:
        tokenizer, max_length = _load_tokenizer(recipe, scans, trust_remote_code=trust_remote_code)
        specials = tokenizer.num_special_tokens_to_add(pair=section.text_pair_column is not None)
        for scan in scans:
            lengths, unknown = _count_tokens(scan, tokenizer)
            findings += token_findings(scan, lengths, unknown, specials, max_length)
            counts[scan.role] = _summarised(lengths, unknown, specials, max_length)
    except CannotLoad as error:  # of the Hub, which may be in reach where the model is trained
        notes.append(f"the tokens were not looked at: {error}")
    except UserError as error:
        findings.append(_refused("tokenizer", error))
    try:
        check_files(recipe.model)
    except CannotLoad:
        pass  # it has been told
    except UserError as error:
        findings.append(_refused("other files", error))
    if section.sha256 and not any(finding.severity == "error" for finding in findings):
        try:
            load_labelled(section)
        except DataError as error:
            findings.append(_refused("other rows", error))
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    findings.sort(key=lambda finding: (list(STYLES).index(finding.severity), kinds.index(finding.kind)))
    roles = [
        RoleSummary(scan.role, len(scan), scan.counts.tolist(), len(scan.unlabelled), counts.get(scan.role))
        for scan in scans
    ]
    return Inspection(selection.label_names, roles, findings, notes, max_length)


def _refused(kind: str, error: UserError) -> Finding:
    what, _, remedy = str(error).rpartition("; ")
    return Finding(kind, "train", "error", what, (), 0, 0.0, remedy)


def _notes(scans: Sequence[Scan]) -> list[str]:
    origins = {origin.name: origin.rows for scan in scans for origin in scan.table.origins}
    total, used = sum(origins.values()), sum(map(len, scans))
    notes = [f"{rows_and_share(total - used, total)} of the data have no role"] if used < total else []
    for scan in scans:
        notes += note_on_guesses(scan.role, scan.guessed)
        if scan.role == "test" and len(scan.unlabelled) == len(scan):
            notes.append(f"test: the {len(scan):,} rows have no labels, so they are predicted and not scored")
    return notes


# --- tokens -----------------------------------------------------------------------------------------------------------


def _load_tokenizer(
    recipe: Recipe, scans: Sequence[Scan], *, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, int]:
    """The recipe's tokenizer, and the tokens of the longest input."""
    train = scans[0]
    texts = (text for _, columns in train.batches() for column in columns for text in column if isinstance(text, str))
    tokenizer = load_tokenizer(recipe.model, texts, trust_remote_code=trust_remote_code)
    config = load_config(recipe.model, train.label_names, tokenizer, trust_remote_code=trust_remote_code)
    return tokenizer, longest_input(recipe.dataset.max_length, tokenizer, config)


def _count_tokens(
    scan: Scan, tokenizer: PreTrainedTokenizerBase
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens, special ones included, and unknown tokens of each row, (n,); 0 where there is no text."""
    lengths, unknown = np.zeros(len(scan), np.int64), np.zeros(len(scan), np.int64)
    for start, columns in scan.batches():
        rows = np.flatnonzero(scan.keys[start : start + len(columns[0])]) + start
        if not len(rows):
            continue
        texts = [[column[row - start] for row in rows] for column in columns]
        encoded = tokenizer(*texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        lengths[rows] = [len(ids) for ids in encoded]
        if tokenizer.unk_token_id is not None:
            unknown[rows] = [ids.count(tokenizer.unk_token_id) for ids in encoded]
    return lengths, unknown


def _summarised(
    lengths: npt.NDArray[np.int64], unknown: npt.NDArray[np.int64], specials: int, max_length: int
) -> TokenCounts:
    some = lengths[lengths > 0] if lengths.any() else np.ones(1, np.int64)
    return TokenCounts(
        median=int(np.percentile(some, 50)),
        percentile_95=int(np.percentile(some, 95)),
        longest=int(some.max()),
        cut=int(np.count_nonzero(some > max_length)),
        lost=int(np.maximum(some - max_length, 0).sum()) / int(some.sum()),
        unknown=int(unknown.sum()) / max(1, int((some - specials).sum())),
    )


# --- for people -------------------------------------------------------------------------------------------------------


def look_at(recipes: Sequence[str], overrides: Sequence[str] = (), *, trust_remote_code: bool = False) -> bool:
    """Print what is in the data of recipes, each by itself; whether training would take all of them.

    Args:
        recipes: paths or names.
        overrides: `section.key=value`, for all of them.
        trust_remote_code: as `inspect`.
    """
    sound = True
    for recipe in recipes:
        try:
            inspection = inspect(load_recipe(find_recipe(recipe)[1], overrides), trust_remote_code=trust_remote_code)
        except UserError as error:
            complain(error)
            sound = False
            continue
        say(f"\n{recipe}", "bold")
        print_inspection(inspection)
        sound = sound and not inspection.errors
    return sound


def print_inspection(inspection: Inspection) -> None:
    """Print the labels, the lengths, and every finding with its rows and remedy."""
    _print_labels(inspection)
    _print_tokens(inspection)
    for i, finding in enumerate(inspection.findings):
        say("")
        say(f"{finding.severity}: {finding.kind}, {finding.role}: {finding.what}", STYLES[finding.severity])
        for example in finding.rows:
            say(f"    {example.place}: {example.text}")
        if finding.remedy not in {
            other.remedy for other in inspection.findings[i + 1 : i + 2]
        }:  # of several roles once
            say(f"    → {finding.remedy}")
    say("")
    for note in inspection.notes:
        say(note)
    counts = {kind: sum(finding.severity == kind for finding in inspection.findings) for kind in STYLES}
    said = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items() if count)
    shows_rows = any(finding.rows for finding in inspection.findings)
    say(f"{said or 'nothing found'}{'; rows are counted from 1, without the header' if shows_rows else ''}", "bold")


def _print_labels(inspection: Inspection) -> None:
    names, roles = inspection.label_names, inspection.roles
    rows = [
        [name, *(f"{role.counts[i]:,}  {role.counts[i] / max(1, sum(role.counts)):6.1%}" for role in roles)]
        for i, name in enumerate(names[:MOST_CLASSES])
    ]
    if len(names) > MOST_CLASSES:
        more = [f"{sum(role.counts[MOST_CLASSES:]):,}        " for role in roles]
        rows.append([f"{len(names) - MOST_CLASSES} more", *more])
    if any(role.unlabelled for role in roles):
        rows.append(["no label", *(f"{role.unlabelled:,}        " for role in roles)])
    print_table(["label", *(role.role for role in roles)], rows, numbers=range(1, len(roles) + 1))


def _print_tokens(inspection: Inspection) -> None:
    rows: list[list[object]] = []
    for role in inspection.roles:
        if (tokens := role.tokens) is not None:
            lengths = [tokens.median, tokens.percentile_95, f"{tokens.longest:,}", f"{tokens.cut:,}"]
            rows.append([role.role, f"{role.rows:,}", *lengths, percent(tokens.lost), percent(tokens.unknown)])
    if rows:
        say("")
        longer = f"over {inspection.max_length}"
        headers = ["tokens of", "rows", "median", "95%", "longest", longer, "lost", "unknown"]
        print_table(headers, rows, numbers=range(1, len(headers)))
