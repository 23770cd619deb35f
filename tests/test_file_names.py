"""Names tell formats; what is shown of an address holds no secret."""

from __future__ import annotations

import pytest

from accel_trainer.file_names import COMPRESSIONS, FORMATS, KNOWN, extensions, is_data_file, redacted


def test_every_format_is_told_by_its_extension() -> None:
    for extension, format in FORMATS.items():
        assert f".{extension}" in KNOWN
        for compression in (None, *COMPRESSIONS):
            ending = f"{extension}.{compression}" if compression else extension
            for address in (f"a.b.{ending}", f"a/B.{ending.upper()}", f"https://host/a.{ending}?key=x.csv#y.csv"):
                assert extensions(address) == (format, compression)
                assert is_data_file(address)


@pytest.mark.parametrize("name", ["csv", ".csv", "a.csv/b", "a.doc", "a.tar.gz", "a.gz", "a.csv.doc", "org/name", ""])
def test_other_names_tell_no_format(name: str) -> None:
    assert extensions(name)[0] is None
    assert not is_data_file(name)


def test_a_zip_is_told_by_its_member() -> None:
    assert extensions("a.zip") == (None, "zip")
    assert is_data_file("a.zip")


def test_addresses_are_shown_without_secrets() -> None:
    text = "cannot fetch 'http://user:secret@host/a.csv?token=hidden#hidden' or s3://key@bucket/b.csv, a?b is a pattern"
    assert redacted(text) == "cannot fetch 'http://host/a.csv' or s3://bucket/b.csv, a?b is a pattern"
