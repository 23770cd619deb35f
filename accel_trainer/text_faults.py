"""What may be wrong with a text, told by its characters alone.

Every pattern is one that sound text does not have: a false alarm costs more trust than a missed fault costs accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
EXCERPT = 60  # characters shown of a text

# The characters that cp1252 and latin-1 give for the bytes 0x80 to 0xBF, with which UTF-8 continues a character.
_CONTINUATION = "[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"


@dataclass(frozen=True)
class TextFault:
    """A kind of fault, and how it shows."""

    kind: str
    severity: Severity
    what: str  # that the texts have
    remedy: str
    pattern: re.Pattern[str]
    beyond_ascii: bool  # whether only texts with other than ASCII characters can have it


TEXT_FAULTS = (
    TextFault(
        "lost characters",
        "warning",
        "marks of characters that could not be decoded (U+FFFD; 锟斤拷 once they were saved again)",
        "they cannot be restored: make the file again from its source, with the source's encoding",
        re.compile("\ufffd|锟斤拷"),
        True,
    ),
    TextFault(
        "mojibake",
        "warning",
        "characters of a wrong encoding, in which the text was read before it was saved",
        "save the file again from its source; where it is UTF-8 read as cp1252, ftfy repairs it",
        re.compile(
            # UTF-8 read as cp1252: é as Ã©, ’ as â€™, Chinese as groups of three
            f"[ÂÃ]{_CONTINUATION}|â€|(?:[å-é]{_CONTINUATION}{{2}}){{2}}"
            # UTF-8 read as gb18030: two of ， and 。, or ’
            "|[锛紝銆].*[锛紝銆]|鈥[渙檚滄]"
            # GB2312 read as latin-1: pairs of bytes beyond ASCII, of four Chinese characters and more, which no language writes
            r"|(?:([\u00b0-\u00f7])(?!\1)[\u00a1-\u00fe]){4,}"
        ),
        True,
    ),
    TextFault(
        "control characters",
        "note",
        "control characters, or a byte order mark",
        "remove them; from \\x80 to \\x9f they are cp1252 dashes and quotes that were read as latin-1",
        re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe]"),
        False,
    ),
    TextFault(
        "markup",
        "note",
        "HTML tags or entities",
        "remove them if the texts to be labelled later have none; they cost tokens",
        re.compile(
            r"</?(?:br|hr|div|span|em|strong|ul|ol|li|img|font|html|body|table|tr|td|h[1-6]|script|style)(?:\s[^<>]*)?/?>"
            r"|</?[abipu]\s?/?>|<a\shref|&(?:amp|lt|gt|quot|nbsp|apos|\#\d{2,6}|\#x[0-9a-f]{2,6});",
            re.IGNORECASE,
        ),
        False,
    ),
    TextFault(
        "escapes",
        "note",
        r"escapes such as \n or \u597d spelt out",
        "they were escaped once too often: decode them where the file is made",
        re.compile(r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[nrt](?![a-z])"),
        False,
    ),
    TextFault(
        "no words",
        "note",
        "digits and punctuation only",
        "see that dataset.text_column is the column of the text, and remove rows that say nothing",
        re.compile(r"\A[\d\s!-.:-@\[-`{-~，。！？…、；：“”‘’（）《》～·—￥]+\Z"),
        False,
    ),
)


def text_faults(text: str) -> Iterator[tuple[int, int]]:
    """Position in `TEXT_FAULTS` of every fault that the text has, and of the character where it shows first."""
    ascii_only = text.isascii()
    for i, fault in enumerate(TEXT_FAULTS):
        if not (ascii_only and fault.beyond_ascii) and (found := fault.pattern.search(text)):
            yield i, found.start()


def excerpt(text: str, position: int = 0) -> str:
    """Some characters of a text around a position, on one line, in quotes."""
    start = max(0, position - EXCERPT // 3) if position > EXCERPT // 2 else 0
    part = " ".join(text[start : start + EXCERPT].split())
    return f"“{'…' if start else ''}{part}{'…' if start + EXCERPT < len(text) else ''}”"
