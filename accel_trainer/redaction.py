"""Tokens and passwords: where they stand in a text, and the text without them.

Messages, status.json, run.json and trackers get the text without them; a recipe that holds one is refused, because
recipes are shared. What the data say is never changed.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import NoReturn

from typing_extensions import override

HIDDEN = "***"
SHORTEST = 8  # characters of a secret in the environment; a shorter one would be found in many an innocent word

_NAMES = re.compile(r"(?i)(TOKEN|SECRET|PASSWORD|PASSWD|KEY)$")  # of environment variables that hold secrets
_SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),  # the Hub
    re.compile(r"\b(?:gh[pousr]|github_pat|glpat|sk|xox[abp])[-_][A-Za-z0-9_-]{20,}"),  # GitHub, GitLab, OpenAI, Slack
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),  # Amazon
    re.compile(r"(?<=://)[^/\s@:'\"]*:[^/\s@'\"]+(?=@)"),  # user:password@host
    re.compile(r"(?<=://)[^/\s@:'\"]{20,}(?=@)"),  # token@host
    re.compile(r"(?i)(?<=[?&])[\w.-]*(?:token|secret|password|signature|sig|key|credential)[\w.-]*=[^&\s#'\"`)]+"),
    re.compile(r"(?i)(?<=\bbearer )[A-Za-z0-9._~+/=-]{16,}"),
)


def without_secrets(text: str) -> str:
    """The text with what looks like a secret, and with what the environment holds as one, replaced by asterisks."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _NAMES.search(name):
            text = text.replace(value, HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(HIDDEN, text)
    return text


def holds_secret(text: str) -> bool:
    """Whether something in the text has the shape of a token or password."""
    return any(shape.search(text) for shape in _SHAPES)


class Parser(argparse.ArgumentParser):
    """A command line that shows no token that stands where something else was expected."""

    @override
    def error(self, message: str) -> NoReturn:
        super().error(without_secrets(message))
