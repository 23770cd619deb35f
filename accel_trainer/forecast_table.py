"""A forecast as people read it: a table, and what speaks against the run."""

from __future__ import annotations

from collections.abc import Iterator

from accel_trainer.forecast import Forecast
from accel_trainer.hardware import precision_named
from accel_trainer.terminal import gib, print_table, say
from accel_trainer.tracking import clock

Row = tuple[str, str, str, str]  # section, item, number, what belongs to it


def print_forecast(found: Forecast) -> None:
    """Print what a run will take, and what speaks against it."""
    rows = [
        *launch_rows(found),
        *data_rows(found),
        *step_rows(found),
        *memory_rows(found),
        *time_rows(found),
        *disk_rows(found),
    ]
    print_table(["", "", "", ""], rows, numbers=[2])
    for note in found.notes:
        say(f"note: {note}", "dim")
    for warning in found.warnings():
        say(f"warning: {warning}", "yellow")


def launch_rows(found: Forecast) -> Iterator[Row]:
    """The processes, and who says so."""
    target = found.target
    config = "no accelerate config" if target.config is None else f"as {target.config} says"
    precision = precision_named(target.mixed_precision)
    yield "launch", "processes", f"{target.num_processes:,}", f"{target.device}, {precision}; {config}"


def data_rows(found: Forecast) -> Iterator[Row]:
    """Rows and tokens by role."""
    for i, (role, size) in enumerate(found.roles.items()):
        cut = f", {size.truncated / size.rows:.1%} of them cut" if size.truncated else ""
        tokens = f"rows of {size.tokens / size.rows:.1f} tokens, the longest {size.longest:,}{cut}"
        yield "data" if i == 0 else "", role, f"{size.rows:,}", tokens


def step_rows(found: Forecast) -> Iterator[Row]:
    """Steps, and what each of them computes."""
    plan, steps, processes = found.plan, found.steps, found.target.num_processes
    epochs = f"{plan.epoch(plan.total_steps):g} epochs of {plan.steps_per_epoch:,}"
    warmup = f", warm-up {plan.warmup_steps:,}" if plan.warmup_steps else ""
    yield "steps", "in all", f"{plan.total_steps:,}", f"{epochs}, {plan.global_batch_size:,} examples each{warmup}"
    yield (
        "",
        "tokens",
        f"{steps.mean(lambda size: size.tokens):,.0f}",
        f"each, at most {max(s.tokens for s in steps.sizes):,}",
    )
    mean, most = sum(steps.micro_batches) / len(steps.micro_batches), max(steps.micro_batches)
    of_each = f"a step{'' if processes == 1 else f', on each of {processes} processes'}, at most {most:,}"
    assumed = ", assumed: the memory of the device is not known here" if found.budget_is_assumed else ""
    yield "", "micro-batches", f"{mean:.3g}", f"{of_each}; of {found.max_tokens:,} tokens at most{assumed}"
    layout = "packed: no padding is computed" if found.packed else "padded"
    yield "", "padding avoided", f"{steps.padding_avoided:.1%}", f"{layout}; against padding each batch to its longest"


def memory_rows(found: Forecast) -> Iterator[Row]:
    """Parameters, and the memory of each device."""
    needs, target, counts = found.needs, found.target, found.parameters
    precision = precision_named(target.mixed_precision)
    yield "parameters", "in all", f"{counts['total']:,}", f"{counts['trainable']:,} trained"
    where = "1 process" if target.num_processes == 1 else "each process"
    shares = ": its share, and what is put together at once" if target.sharded else ""
    yield "memory", "weights", gib(needs.weights), f"of {where}, expected{shares}"
    yield (
        "",
        "gradients",
        gib(needs.gradients),
        "" if target.num_processes == 1 or target.sharded else "and their buckets",
    )
    yield "", "optimizer", gib(needs.optimizer), found.recipe.training.optim
    yield "", "activations", gib(found.steps.activations), f"of a micro-batch, {precision}"
    yield "", "beside", gib(needs.beside), "what the computation allots, and the largest gradient once more"
    more = found.memory - found.program - needs.state - found.steps.activations
    if more > 0:
        yield "", "evaluation", gib(more), "beyond that"
    if found.program:
        yield "", "program", gib(found.program), "Python and the libraries, before anything is read"
    known = "not known here" if target.memory is None else f"of {gib(target.memory)}"
    yield "", "sum", gib(found.memory), known


def time_rows(found: Forecast) -> Iterator[Row]:
    """Seconds, where they were measured."""
    seconds, target = found.seconds, found.target
    if seconds is None:
        yield "time", "", "", f"not measured: {found.unmeasured}"
        return
    others = "" if target.num_processes == 1 else f"; the config's {target.num_processes} share it"
    yield "time", "training", clock(seconds.training), f"h:mm:ss, measured here on 1 process, {target.device}{others}"
    yield "", "evaluation", clock(seconds.evaluation), ""
    known = seconds.training + seconds.evaluation
    if seconds.saving is None:
        yield "", "saving", "", "not measured: nothing could be written"
        yield "", "sum", clock(known), "without saving"
    else:
        yield "", "saving", clock(seconds.saving), "at most"
        yield "", "sum", clock(known + seconds.saving), ""


def disk_rows(found: Forecast) -> Iterator[Row]:
    """Bytes that will be written."""
    disk, limit = found.disk, found.recipe.saving.save_total_limit
    kept = "all are kept" if limit is None else f"{limit} kept, another while it is written"
    yield "disk", "checkpoints", gib(disk.checkpoints), kept
    yield "", "best, model", gib(disk.best + disk.model), ""
    yield "", "predictions", gib(disk.predictions), "about"
    yield "", "sum", gib(disk.total), f"of {gib(disk.free)} free"
