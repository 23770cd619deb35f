"""The Hub, where it cannot be reached."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import huggingface_hub

logger = logging.getLogger("accel_trainer")

PATIENCE = 10.0  # seconds for the Hub's first answer


def is_on_hub(name: str | None) -> bool:
    """Whether a checkpoint or tokenizer of that name would be asked of the Hub."""
    return name is not None and not Path(name).exists()


def use_cache_if_unreachable() -> None:
    """Ask the Hub once whether it answers; if not, let every library take what it has cached.

    Each of them would otherwise ask again and again, file by file: more than two minutes until training starts
    (measured).
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        answer = huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=PATIENCE)
        reason = f"it answers {answer.status_code}" if answer.status_code >= 500 else ""
    except Exception as error:  # of whichever HTTP client the library uses
        reason = type(error).__name__
    if reason:
        logger.warning("the Hub is not reached (%s): what is cached on this machine is used", reason)
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        if datasets := sys.modules.get("datasets"):  # imported later, it sees for itself
            datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
