"""The trainer's command line: where, how far at once, and nothing that a gradient depends on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_trainer import hardware
from accel_trainer.command_line import Parser
from accel_trainer.errors import UserError

LAYOUTS = ("auto", "packed", "padded")


@dataclass(frozen=True)
class Options:
    """What the command line decides: where, how far at once, and nothing that a gradient depends on."""

    output_dir: Path
    resume: bool = False
    resume_from_checkpoint: Path | None = None
    allow_changed: Sequence[str] = ()
    max_tokens_per_device: int | None = None
    layout: str = "auto"
    gradient_checkpointing: bool = False
    stop_after: int | None = None
    ddp_timeout: int = hardware.TIMEOUT
    dry_run: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"--layout {self.layout}: choose from {', '.join(LAYOUTS)}")
        if not self.output_dir.name:
            raise UserError(f"--output_dir {self.output_dir}: name a folder for the run")
        if self.dry_run and (self.resumes or self.stop_after is not None):
            raise UserError("--dry_run: it takes steps of its own; leave --resume and --stop_after out")

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint, if there is one."""
        return self.resume or self.resume_from_checkpoint is not None

    @property
    def agreed(self) -> dict[str, Any]:
        """What all processes must have been told alike."""
        alike = ("layout", "gradient_checkpointing", "max_tokens_per_device", "stop_after", "dry_run")
        return {"--resume": self.resumes, **{f"--{name}": getattr(self, name) for name in alike}}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what stands free after the recipe is an override."""
    parser = Parser(
        prog="accel_trainer.train",
        description="Train a text classifier from a recipe.",
        epilog="accelerate launch --config_file accelerate_configs/cpu.yaml -m accel_trainer.train recipes/quickstart.yaml",
    )
    add = parser.add_argument
    add("recipe", help="path of a recipe, or its name in the library, such as imdb/distilbert")
    add("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    add("--output_dir", type=Path, help="folder of the run (default: runs/ and the recipe's name)")
    add("--resume", action="store_true", help="continue from the newest checkpoint, or start if there is none")
    add("--resume_from_checkpoint", type=Path, metavar="PATH", help="continue from this checkpoint")
    add("--allow_changed", action="append", default=[], metavar="KEY", help="continue although this key has changed")
    add("--stop_after", type=int, metavar="STEP", help="save and stop after this step, as a signal would")
    add("--max_tokens_per_device", type=int, metavar="N", help="tokens per micro-batch, padding included")
    add("--layout", choices=LAYOUTS, default="auto", help="packed: without padding, where possible")
    add("--gradient_checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add(
        "--ddp_timeout", type=int, default=hardware.TIMEOUT, metavar="SECONDS",
        help="how long processes wait for one that does not answer (default: %(default)s)",
    )  # fmt: skip
    add(
        "--dry_run", action="store_true",
        help="take two steps on the longest rows, with evaluation, save and resume, say how it went and leave nothing",
    )  # fmt: skip
    add("--trust_remote_code", action="store_true", help="run code that the checkpoint's repository holds")
    return parser.parse_intermixed_args(argv)
