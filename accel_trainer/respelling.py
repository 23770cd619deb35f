"""Keys and values as other tutorials spell them (`spellings`): moved to where they belong, or answered."""

from __future__ import annotations

import logging
from difflib import get_close_matches
from typing import cast

from accel_trainer.draft import ABSENT, Draft, Keys, dotted, shown
from accel_trainer.recipe_fields import field_of, sections
from accel_trainer.spellings import ANSWERED, ANSWERED_VALUES, RENAMED, TRANSLATED, Renamed, Untranslatable

logger = logging.getLogger("accel_trainer")


def respell(draft: Draft) -> dict[Keys, Keys]:
    """Move what has an accepted old name, report every other unknown key; returns old → new keys."""
    moved: dict[Keys, Keys] = {}
    for section, schema in sections().items():
        mapping = draft.get(section)
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
    for key in {**TRANSLATED, **ANSWERED_VALUES}:
        _translate(draft, key)
    return moved


def _accept(draft: Draft, old: Keys, renamed: Renamed, value: object) -> bool:
    """Put the value of an old name where it belongs, unless that is taken."""
    new: Keys = tuple(renamed.new.split("."))
    if draft.get(new, ABSENT) is not ABSENT:
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
    if draft.put(new, value) is not None:
        return False  # the section is none, which is reported when it is validated
    draft.move(old, new)
    place = spot.source if spot.line is None else f"{spot.source}:{spot.line}"
    logger.info("%s: %s is read as %s", place, dotted(old), renamed.new)
    return True


def _translate(draft: Draft, key: str) -> None:
    keys: Keys = tuple(key.split("."))
    value = draft.get(keys, ABSENT)
    if value is ABSENT:
        return
    if isinstance(value, str) and (answer := ANSWERED_VALUES.get(key, {}).get(value)):
        draft.fault(keys, f"'{value}': {answer.what}", answer.remedy)
    elif key in TRANSLATED and (new := TRANSLATED[key](value)) != value:
        draft.put(keys, new)
        if new != [value]:
            logger.info("%s: %s: %s is read as %s", draft.spot(keys).source, key, value, new)


def _report_unknown(draft: Draft, section: Keys, name: str) -> None:
    keys, suspect = (*section, name), cast(Keys, ())
    what = f"{_called(section)} has no key of this name"
    if draft.override and not section and (meant := option_meant(name)):
        _, _, value = draft.override.partition("=")
        draft.fault(keys, what, f"write {dotted(meant)}={shown(value)}", suspect=meant)
        return
    homes = [home for home, schema in sections().items() if name in schema["properties"]]
    parts: Keys = tuple(name.split("."))
    if answer := ANSWERED.get(name.lstrip("-") if draft.override else name):
        what, remedy = answer.what, answer.remedy
        suspect = tuple(answer.instead.split(".")) if answer.instead else ()
    elif renamed := RENAMED.get(name):
        suspect = tuple(renamed.new.split("."))
        remedy = f"write it as `{suspect[-1]}` in {_called(suspect[:-1])}"
    elif homes:
        remedy = f"it belongs in {' or '.join(map(_called, homes))}".replace("in the top", "at the top")
        suspect = (*homes[0], name) if len(homes) == 1 else ()
    elif len(parts) > 1 and field_of(parts) == parts:
        remedy, suspect = f"write `{parts[-1]}` indented below {_called(parts[:-1])}", parts
    elif near := _nearest(name, section):
        remedy, suspect = f"did you mean `{near[-1] if near[:-1] == section else dotted(near)}`?", near
    else:
        remedy = f"it takes {', '.join(sections()[section]['properties'])}"
    draft.fault(keys, what, remedy, suspect=suspect)


def option_meant(name: str) -> Keys | None:
    """The one key that somebody means who writes its name alone, or as an option of a command line: `--learning_rate`.

    None where no key or several may be meant.
    """
    plain = name.lstrip("-").replace("-", "_")
    if plain in RENAMED:
        return tuple(RENAMED[plain].new.split("."))
    homes = [home for home, schema in sections().items() if plain in schema["properties"]]
    return (*homes[0], plain) if len(homes) == 1 and plain not in ANSWERED else None


def _nearest(name: str, section: Keys) -> Keys | None:
    """The known key whose name is most like this one, of the section first, then of all."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if close := get_close_matches(plain, sections()[section]["properties"], 1, 0.7):
        return (*section, close[0])
    everywhere = {key: home for home, schema in sections().items() for key in schema["properties"]}
    close = get_close_matches(plain, everywhere, 1, 0.8)
    return (*everywhere[close[0]], close[0]) if close else None


def _called(section: Keys) -> str:
    return f"`{dotted(section)}`" if section else "the top level"
