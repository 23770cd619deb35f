"""Two recipes or runs side by side: what differs, key by key, and what it means."""

from __future__ import annotations

from typing import Any, NamedTuple

from accel_trainer.differences import FIXED_BY_A_RUN, IN_WORDS, PLACES, Meaning, differences, meaning, short
from accel_trainer.library import expanded, find_recipe, is_file
from accel_trainer.recipe import Recipe
from accel_trainer.recipe_file import as_written, load_recipe
from accel_trainer.results import newest, rounded
from accel_trainer.run_folder import RunFolder
from accel_trainer.terminal import Style, print_table, say

# Entries of run.json that are compared.
FACTS = ("initial_weights_sha256", "tokenizer_sha256", "layout", "max_tokens_per_device", "hardware", "versions")
_STYLES: dict[Meaning, Style] = {"steps": "yellow", "data": "yellow", "nothing": "dim", "open": "dim"}


class Difference(NamedTuple):
    """A key that two sides have different values for; None where a side has none."""

    key: str  # dotted
    before: Any
    after: Any
    meaning: Meaning


def diff(a: str, b: str) -> list[Difference]:
    """What differs between two recipes, given by path or name, or folders of runs; defaults resolved.

    Of runs, also their results, hardware and versions, where both sides have them.

    Raises:
        UserError: one of them is not there, or cannot be read.
    """
    recipe, facts = _read(a)
    other, other_facts = _read(b)
    both = [name for name in facts if name in other_facts]
    found = differences({name: facts[name] for name in both}, {name: other_facts[name] for name in both})
    # A recipe records fewer versions than a run does.
    told = (one for one in found if not (one[0].startswith("versions.") and None in one))
    return [*compared(recipe, other), *(Difference(*one, meaning(one[0])) for one in told)]


def compared(a: Recipe, b: Recipe) -> list[Difference]:
    """What differs between two recipes; their recorded results are left out."""
    before, after = (recipe.model_dump(mode="json", exclude={"results"}) for recipe in (a, b))
    # The same hashes: wherever they are read from, the same bytes.
    same = {
        section
        for section in PLACES
        if before[section]["sha256"] and before[section]["sha256"] == after[section]["sha256"]
    }
    return [Difference(*one, _meaning_beside(*one, same)) for one in differences(before, after)]


def print_diff(a: str, b: str) -> None:
    """Show what differs between two recipes or runs, and whether they take the same steps.

    Raises:
        UserError: as `diff`.
    """
    found = diff(a, b)
    if not found:
        say(f"{a} and {b} do not differ", "green")
        return
    rows = [(one.key, short(one.before), short(one.after), IN_WORDS[one.meaning]) for one in found]
    print_table(("key", a, b, ""), rows, whole=[0], styles=[_STYLES.get(one.meaning, "") for one in found])
    meanings = {one.meaning for one in found}
    if "steps" in meanings:
        say("\nthey take other steps", "yellow")
    elif "data" in meanings:
        say("\nthey take the same steps if they read the same data and weights", "yellow")
    elif "scores" in meanings:
        say("\nthey take the same steps, but for stopping early; scores and best weights may be others")
    elif "open" in meanings:
        say("\nthey take the same steps if what one leaves open is what the other has")
    else:
        say("\nthey take the same steps", "green")


def _meaning_beside(key: str, before: Any, after: Any, same: set[str]) -> Meaning:
    """What a difference means, knowing in which sections the bytes are the same."""
    section, _, rest = key.partition(".")
    if section in same and rest.partition(".")[0] in PLACES[section]:
        return "nothing"
    is_fixed = (before is None) != (after is None) and any(f"{key}.".startswith(f"{name}.") for name in FIXED_BY_A_RUN)
    return "open" if is_fixed else meaning(key)


def _read(name: str) -> tuple[Recipe, dict[str, Any]]:
    """A recipe, and what is known of a run of it."""
    run = RunFolder(expanded(name))
    if not is_file(run.recipe):
        recipe = load_recipe(find_recipe(name)[1])
        result = newest(recipe.results)
        return recipe, {} if result is None else {"results": _rounded(result.metrics), "versions": result.versions}
    facts = run.facts()
    results = {role: scores for role, scores in run.scores().items() if role != "train"}
    known = {name: facts[name] for name in FACTS if facts.get(name) is not None}
    # As it stands in a run's folder, so that the data of the run need not be here; its files and folders are absolute.
    recipe = as_written(run.recipe) if facts else load_recipe(run.recipe)
    return recipe, {**({"results": _rounded(results)} if results else {}), **known}


def _rounded(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Numbers of each role, to the digits that are recorded."""
    return {
        role: {name: rounded(value) for name, value in scores.items() if isinstance(value, int | float)}
        for role, scores in results.items()
    }
