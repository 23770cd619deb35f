"""What the name of a data file tells, be it a path or an address: its format, and what of it may be shown."""

from __future__ import annotations

import re
from pathlib import Path

TEXT_FORMATS = {"csv": "csv", "tsv": "tsv", "json": "json", "jsonl": "jsonl", "ndjson": "jsonl", "txt": "txt"}
FORMATS = TEXT_FORMATS | {"parquet": "parquet", "arrow": "arrow"}  # by file name extension
COMPRESSIONS = ("gz", "bz2", "zip", "zst", "xz")
KNOWN = (
    f"known are {', '.join('.' + name for name in FORMATS)}, each also with {', '.join('.' + c for c in COMPRESSIONS)}"
)


def extensions(address: str) -> tuple[str | None, str | None]:
    """Format, a value of `FORMATS`, and compression, one of `COMPRESSIONS`; None where the extensions tell none."""
    if "://" in address:
        address = re.split(r"[?#]", address)[0]
    stem, *rest = Path(address).name.lower().split(".")
    compression = rest.pop() if rest and rest[-1] in COMPRESSIONS else None
    return (FORMATS.get(rest[-1]) if stem and rest else None), compression


def is_data_file(address: str) -> bool:
    """Whether rows are expected in it, by its extensions."""
    format, compression = extensions(address)
    return format is not None or compression == "zip"  # whose member tells


def redacted(text: str) -> str:
    """The text without user, password, query and fragment of the addresses in it."""
    text = re.sub(r"(\w://)[^/\s]*@", r"\1", text)
    return re.sub(r"(\w://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)
