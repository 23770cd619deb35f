"""Hundreds of kills and thousands of bad inputs: `make soak`.

Runs are killed at random moments, SIGKILL to all of a launch, to its launcher or to one process, and resumed, until they
reach their end; they are then compared with runs that nobody disturbed: to the bit where the number of processes stayed the
same, losses and probabilities to 1e-5 where it changed. Then processes die at every file operation of a save, and
recipes and tables are fuzzed.

    PYTHONPATH=tests python tests/faults/soak.py --kills 200 --recipes 10000 --tables 2000 --output soak.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
from file_operations import die_everywhere
from harness import Outcome, write_recipe_in
from processes import Launched, kill, launcher

from accel_trainer.checkpoint import newest_sound

STEPS, SAVE_STEPS = 100, 4
RECIPE: dict[str, Any] = {
    "training": {"num_train_epochs": None, "max_steps": STEPS},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 6},
    "saving": {"save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 2},
}
CHAINS = ((1,), (2,), (1, 2))  # numbers of processes, in turn
SLOWLY = {"module": "slow_train", "SLOW": "steps"}


def killed_to_the_end(
    place: Path, name: str, counts: tuple[int, ...], draw: random.Random
) -> tuple[Outcome, Counter[str]]:
    """Launch, kill, resume, until the run is done.

    Raises:
        AssertionError: it cannot be resumed, or steps are lost that had been taken before the last save.
    """
    tally: Counter[str] = Counter()
    for processes in itertools.cycle(counts):
        with Launched(launcher(processes), place, "soak.yaml", name, "--resume", **SLOWLY) as run:
            before = run.steps()[-1] if run.steps() else 0
            reach = before + draw.randint(-2, 14)
            while run.process.poll() is None and not (started(run) and (run.steps() or [0])[-1] >= reach):
                time.sleep(0.01)
            time.sleep(draw.random() * 0.15)
            victims = run.trainers()
            if run.process.poll() is None and victims:
                whom = draw.choice(["all", "all", "launcher", "one process"])
                tally[whom] += 1
                chosen = {"all": [run.process.pid, *victims], "launcher": [run.process.pid]}
                for victim in chosen.get(whom) or [draw.choice(victims)]:
                    kill(victim, signal.SIGKILL)
            outcome = run.ended()
            if outcome.json("status.json")["state"] == "done":
                return outcome, tally
            path, _ = newest_sound(run.folder / "checkpoints")
            saved = 0 if path is None else int(path.name.rpartition("-")[2])
            taken = run.steps()[-1] if run.steps() else 0
            assert taken - saved <= SAVE_STEPS, f"{name}: {taken - saved} steps lost"
            tally["most steps lost by a kill"] = max(tally["most steps lost by a kill"], taken - saved)
            assert saved >= (before // SAVE_STEPS) * SAVE_STEPS - SAVE_STEPS, f"{name}: back to {saved} from {before}"
            assert "Traceback" not in run.said or "accel_trainer/" not in run.said, run.said
    raise AssertionError("unreachable")


def started(run: Launched) -> bool:
    """Whether this launch has begun, rather than the one before it."""
    return "continuing from" in run.said or "starting from the beginning" in run.said


def differences(outcome: Outcome, undisturbed: Outcome, *, bitwise: bool) -> dict[str, float]:
    """Largest relative difference of losses, and of probabilities; 0 to the bit, or AssertionError."""
    files = [
        Path("model/model.safetensors"),
        *(Path(f"checkpoints/checkpoint-{STEPS}") / f"{n}.safetensors" for n in ("model", "optimizer")),
    ]
    if bitwise:
        for ours, theirs in itertools.zip_longest(outcome.lines, undisturbed.lines):
            assert ours == theirs, f"{outcome.folder}: {ours} instead of {theirs}"
        for file in files:
            assert (outcome.folder / file).read_bytes() == (undisturbed.folder / file).read_bytes(), file
    assert [line["step"] for line in outcome.lines] == [line["step"] for line in undisturbed.lines]
    losses = np.abs(np.array(outcome.losses) / np.array(undisturbed.losses) - 1).max()
    shares = [
        [list(json.loads(line)["probabilities"].values()) for line in (run.folder / "predictions/test.jsonl").open()]
        for run in (outcome, undisturbed)
    ]
    probabilities = np.abs(np.array(shares[0]) - np.array(shares[1])).max()
    assert max(losses, probabilities) <= 1e-5, (losses, probabilities)
    return {"loss": float(losses), "probabilities": float(probabilities)}


def soak_kills(place: Path, kills: int, seed: int) -> dict[str, Any]:
    """Chains of runs, two at a time, until there were that many kills."""
    write_recipe_in(place, "soak.yaml", **RECIPE)
    undisturbed = {}
    for count in (1, 2):
        with Launched(launcher(count), place, "soak.yaml", f"undisturbed-{count}") as run:
            undisturbed[count] = run.ended()
        assert undisturbed[count].code == 0, run.said
    found: dict[str, Any] = {"kills": 0, "runs": 0, "steps between saves": SAVE_STEPS, "most steps lost by a kill": 0}
    numbers = itertools.count()

    def chain(number: int) -> tuple[tuple[int, ...], Counter[str], dict[str, float]]:
        counts = CHAINS[number % len(CHAINS)]
        outcome, tally = killed_to_the_end(place, f"chain-{number}", counts, random.Random(f"{seed} {number}"))
        same = len(counts) == 1
        return counts, tally, differences(outcome, undisturbed[counts[0]], bitwise=same)

    def chains() -> None:
        while found["kills"] < kills:
            counts, tally, differ = chain(next(numbers))
            lost = "most steps lost by a kill"
            found[lost] = max(found[lost], tally.pop(lost, 0))
            found["kills"] += tally.total()
            found["runs"] += 1
            kind = found.setdefault("processes " + " and ".join(map(str, counts)), Counter())
            kind.update({"kills": tally.total(), "runs": 1, **{f"killed {whom}": n for whom, n in tally.items()}})
            for name, value in differ.items():
                kind[f"largest difference of {name}"] = max(kind[f"largest difference of {name}"], value)
            print(f"{found['kills']} kills, {found['runs']} runs to the end", flush=True)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(chains) for _ in range(2)]:
            future.result()
    return found


def main() -> int:
    """Run what was asked for and print a summary; 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("kills", 200), ("recipes", 10_000), ("tables", 2_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, help="JSON file for the summary")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    summary: dict[str, Any] = {"date": date.today().isoformat()}
    place = Path(tempfile.mkdtemp(prefix="accel-trainer-soak-"))  # kept for whoever has to find out what went wrong
    if arguments.kills:
        summary["kills"] = soak_kills(place, arguments.kills, arguments.seed)
        summary["deaths at a file operation"] = die_everywhere(place / "files")
    if arguments.recipes or arguments.tables:
        summary["fuzz"] = fuzz.fuzz(arguments.recipes, arguments.tables, arguments.seed, Path("soak-failures"))
    shutil.rmtree(place)
    summary["minutes"] = round((time.monotonic() - began) / 60, 1)
    text = json.dumps(summary, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 1 if summary.get("fuzz", {}).get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
