"""What can go wrong, drawn once.

    AccelTrainerError               exit code 1
    ├── UserError                   exit code 2: one clear message, no traceback
    │   ├── RecipeError             every mistake of a recipe, each with file, line, key and remedy
    │   ├── DataError               the data named by the recipe, with file and row
    │   ├── CannotLoad              a checkpoint or tokenizer that transformers could not read
    │   ├── HardwareError           the accelerate config or the launch
    │   └── RunFolderError          the output folder, or a checkpoint in it
    ├── TrainingFailed              the run cannot go on (a loss that is not finite, …)
    │   ├── OutOfMemory             a micro-batch does not fit; a smaller one may
    │   └── ProcessLost             another process of the run died, or answers no more
    └── Interrupted                 exit code 75: a signal came; --resume goes on from what was saved

Users' mistakes raise these; broken invariants of our own assert.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from accel_trainer.redaction import without_secrets

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_MISTAKE = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", which is what a scheduler should do


MOST_MISTAKES = 100  # of a recipe that are spelt out


def showable(text: str, longest: int) -> str:
    """Text that a terminal shows and does not obey; of a longer one than `longest` characters, beginning and end.

    Messages quote what stands in files: a name may hold an escape sequence, a cell a megabyte. The end is kept because
    remedies stand there.
    """
    if len(text) > longest:
        text = f"{text[: longest * 3 // 4]} […] {text[-longest // 4 :]}"
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    # Cc: escapes and bells. Cs: no encoding has them. Zl, Zp: further line ends. Of Cf, which joins emoji too, those
    # that turn the direction of a text, so that it reads as something else.
    obeyed = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character != "\n"
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return ascii(character)[1:-1] if obeyed or turns else character


class AccelTrainerError(Exception):
    """Base of every error this package raises on purpose. No message of theirs shows a token or a password."""

    exit_code = EXIT_FAILED
    longest = 4_000  # characters of a message

    @override
    def __str__(self) -> str:
        return showable(without_secrets(super().__str__()), self.longest)


class UserError(AccelTrainerError):
    """A mistake the user can mend; the message names place, value and remedy."""

    exit_code = EXIT_USER_MISTAKE
    is_told = False  # to the user already


@dataclass(frozen=True)
class Mistake:
    """One mistake of a recipe: `file:line: section.key: what is wrong; what to do`."""

    source: str  # the file as the user named it, or "command line"
    line: int | None  # counted from 1; None for overrides and for what the file does not say
    key: str  # dotted, "" for the file as a whole
    what: str
    remedy: str

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        subject = f"{place}: {self.key}" if self.key else place
        text = f"{subject}: {self.what}; {self.remedy}" if self.remedy else f"{subject}: {self.what}"
        return showable(without_secrets(text).replace("\n", "\\n"), 1_000)


class RecipeError(UserError):
    """All mistakes of one recipe at once."""

    longest = MOST_MISTAKES * 1_000

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        assert mistakes
        self.mistakes = tuple(mistakes)
        more = len(self.mistakes) - MOST_MISTAKES
        lines = [str(mistake) for mistake in self.mistakes[:MOST_MISTAKES]]
        super().__init__("\n".join([*lines, *([f"and {more} more mistakes"] if more > 0 else [])]))


class DataError(UserError):
    """The data cannot be used as the recipe says."""


class CannotLoad(UserError):
    """A checkpoint or tokenizer could not be read."""

    def __init__(self, key: str, name: str | None, reason: Exception) -> None:
        first = (str(reason).strip().splitlines() or [type(reason).__name__])[0].rstrip(".")
        remedy = "give a folder that holds it, or the id of a Hub repository that you can reach or have cached"
        if "safetensors" in first and isinstance(reason, OSError):
            remedy = (
                "weights that are pickled (pytorch_model.bin) are never opened; where you trust them, write them anew and name that "
                f"folder: AutoModel.from_pretrained({name!r}).save_pretrained(FOLDER), and AutoTokenizer likewise"
            )
        super().__init__(f"{key}: cannot load {name!r}: {first}; {remedy}")


class HardwareError(UserError):
    """The launch and the accelerate config do not fit together, or not this program."""


class RunFolderError(UserError):
    """The output folder holds something else than the command expects."""


class TrainingFailed(AccelTrainerError):
    """Training cannot go on; what was saved is kept."""


class OutOfMemory(TrainingFailed):
    """A micro-batch does not fit into memory; a smaller one may."""

    def __init__(self, message: str, examples: int = 1, tokens: int = 0) -> None:
        self.examples, self.tokens = examples, tokens  # of the micro-batch, padding included
        self.max_tokens: int | None = None  # that the run is to go on with
        super().__init__(message)


class ProcessLost(TrainingFailed):
    """Another process of the run died or answers no more: what was to be computed together cannot be."""


class Interrupted(AccelTrainerError):
    """A signal asked the run to stop; if steps had been taken, a checkpoint was saved first."""

    exit_code = EXIT_INTERRUPTED
