"""The plan of a run: every duration of the recipe converted to optimizer steps, once, here.

Steps are counted from 1 as people do: `plan.logs_at(20)` asks about the moment after the 20th update.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from accel_trainer.errors import UserError
from accel_trainer.order import steps_per_epoch
from accel_trainer.recipe import Recipe


@dataclass(frozen=True)
class TrainingPlan:
    """Counts of optimizer steps; a function of the recipe and the number of training examples alone."""

    num_examples: int
    global_batch_size: int
    steps_per_epoch: int  # the last step of an epoch may have fewer examples
    total_steps: int
    warmup_steps: int
    logging_steps: int
    eval_every: int | None  # None: no evaluation during training
    save_every: int | None  # None: no checkpoints

    @classmethod
    def of(cls, recipe: Recipe, num_examples: int) -> TrainingPlan:
        """The plan of `recipe` on a training split of `num_examples` rows.

        Raises:
            UserError: the warm-up would outlast the run.
        """
        training = recipe.training
        per_epoch = steps_per_epoch(num_examples, training.global_batch_size)
        if training.max_steps is not None:
            total = training.max_steps
        else:
            assert training.num_train_epochs is not None
            # Exact: in binary floating point 1.1 × 100 exceeds 110, and ceil would add a step.
            total = ceil(Fraction(str(training.num_train_epochs)) * per_epoch)
        warmup = training.warmup_steps
        if warmup > total:
            raise UserError(
                f"training.warmup_steps: {warmup:.0f} steps of warm-up, but {training.num_train_epochs} epochs are {total} "
                "steps; shorten it, or give a share of the run below 1"
            )
        strategy_steps = {"no": None, "epoch": per_epoch}
        return cls(
            num_examples=num_examples,
            global_batch_size=training.global_batch_size,
            steps_per_epoch=per_epoch,
            total_steps=total,
            warmup_steps=ceil(Fraction(str(warmup)) * total) if warmup < 1 else int(warmup),
            logging_steps=recipe.tracking.logging_steps,
            eval_every=(strategy_steps | {"steps": recipe.eval_steps})[recipe.evaluation.eval_strategy]
            if recipe.evaluates
            else None,
            save_every=(strategy_steps | {"steps": recipe.saving.save_steps})[recipe.saving.save_strategy],
        )

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` updates; 1.5 is one and a half."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + min(1.0, rest * self.global_batch_size / self.num_examples)

    def logs_at(self, step: int) -> bool:
        """Whether the moment after update `step` is logged; after the last it is."""
        return step == self.total_steps or step % self.logging_steps == 0

    def evaluates_at(self, step: int) -> bool:
        """Whether the validation split is evaluated after update `step`; after the last it is."""
        return self.eval_every is not None and (step == self.total_steps or step % self.eval_every == 0)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after update `step`; after the last it is."""
        return self.save_every is not None and (step == self.total_steps or step % self.save_every == 0)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        return asdict(self)
