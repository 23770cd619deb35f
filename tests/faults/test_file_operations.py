"""Whoever is killed at any moment leaves the complete new or the complete old, and the next start finds it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from file_operations import SCENARIOS, deaths, dies

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Fewer deaths than these, and the operations are no longer seen.
AT_LEAST = {
    "a checkpoint": 30,
    "the first checkpoint": 20,
    "a checkpoint again": 30,
    "the best weights": 45,
    "files and a model": 30,
    "a start": 15,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_death_at_every_file_operation(tmp_path: Path, name: str) -> None:
    assert deaths(tmp_path, SCENARIOS[name]) >= AT_LEAST[name]


def test_a_write_is_cut_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "x"
    left = set()
    for k in range(1, 9):
        path.unlink(missing_ok=True)
        if dies(k, lambda: path.write_text("abcdefgh")):
            left.add(path.read_text() if path.exists() else None)
    assert left == {None, "abcd"}
