"""The layout of micro-batches: packed where the model computes the same so, padded where it does not.

An encoder that the tests do not hold is tried on three rows before anything is trained.
"""

from __future__ import annotations

import math

import torch

from accel_trainer import order, xla
from accel_trainer.classifier import Classifier, strays
from accel_trainer.data import Split
from accel_trainer.errors import UserError
from accel_trainer.model import DROPOUT_NAMES
from accel_trainer.tracking import logger

# Relative difference of logits that counts as rounding. float32 gives about 1e-6; the families that fail give 1e-3 and more.
ROUNDING = 1e-4


def packs(device: torch.device, layout: str = "auto") -> bool:
    """Whether micro-batches shall be packed, if the model can be: XLA compiles every new length."""
    return layout == "packed" or (layout == "auto" and not xla.computes_on(device))


def has_few_shapes(device: torch.device, *, packed: bool) -> bool:
    """Whether micro-batches shall be padded to a few shapes that are known beforehand, since each is compiled."""
    return xla.computes_on(device) and not packed


def choose_layout(classifier: Classifier, split: Split, layout: str, device: torch.device) -> bool:
    """Whether micro-batches are packed. A model that is not of `classifier.PACKED` is tried on three rows.

    Raises:
        UserError: packed was asked for and is not possible, or what the model computes of an example depends on more than
            the example, so that no layout could give the steps of another.
    """
    wanted = packs(device, layout)
    if classifier.is_known:
        return wanted
    by_length = split.tokens.lengths.argsort(kind="stable")
    rows = by_length[[0, len(split) // 4, len(split) // 2]]  # from short to middling
    family = classifier.model.config.model_type
    if wanted:
        reason = why_unpacked(classifier, split, rows)
        if reason is None:
            return True
        if layout == "packed":
            raise UserError(f"--layout packed: a {family} classifier cannot be packed ({reason}); leave the option out")
        logger.info("note: a %s classifier is trained padded: packed, %s", family, reason)
    check_invariance(classifier, split, rows)
    return False


def why_unpacked(classifier: Classifier, split: Split, rows: order.Rows) -> str | None:
    """Why a model cannot be packed; None if on some rows it computes the same, to rounding."""
    if not classifier.can_pack:
        return "its attention is its own"
    try:
        difference = on_rows(classifier, split, rows, packed=True)
    except Exception as error:  # whatever an unknown model makes of one long row
        return f"it fails: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None if difference <= ROUNDING else f"its logits move by {difference:.0e}"


def on_rows(classifier: Classifier, split: Split, rows: order.Rows, *, packed: bool) -> float:
    """`strays` of some rows in a layout."""
    alone = [split.tokens.batch(rows[i : i + 1], packed=False) for i in range(len(rows))]
    return strays(classifier, split.tokens.batch(rows, packed=packed), alone)


def check_invariance(classifier: Classifier, split: Split, rows: order.Rows) -> None:
    """See on some rows that what is computed of an example, padded, depends on the example alone.

    Raises:
        UserError: it does not.
    """
    difference, config = on_rows(classifier, split, rows, packed=False), classifier.model.config
    if difference == math.inf:
        drops = [key for key, names in DROPOUT_NAMES.items() if any(hasattr(config, name) for name in names)]
        raise UserError(
            f"model: in training, a {config.model_type} classifier draws random numbers that the recipe's seed does not fix; "
            f"set {' '.join(f'model.{key}=0.0' for key in drops)}, or use another encoder"
        )
    if difference > ROUNDING:
        raise UserError(
            f"model: what a {config.model_type} classifier computes of an example depends on the padding beside it (its "
            f"logits move by {difference:.0e}), so that no two layouts would train alike; use another encoder"
        )
