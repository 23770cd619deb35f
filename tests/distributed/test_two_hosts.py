"""Two machines take the same steps as one process, whether they share storage or not, and one of them alone writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from harness import ROOT, Outcome, run_trainer, start, write_recipe_in
from hosts import ADDRESSES, Host, two_hosts
from test_two_processes import SPLITS, check_equal

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED, several machines: network namespaces are Linux's"),
]

CONFIG = ROOT / "accelerate_configs" / "multi_cpu_multi_node.yaml"
TESTS = ROOT / "tests"
PATHS = os.pathsep.join(map(str, (TESTS / "distributed", TESTS / "faults", TESTS, ROOT)))
SGD = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": None, "num_train_epochs": None, "max_steps": 50}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 10}
SAVED = {"save_strategy": "steps", "save_steps": 4}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first machine's folder."""
    place = tmp_path / "first"
    write_recipe_in(place, dataset=SPLITS, training=SGD, evaluation=EVALUATED)
    write_recipe_in(place, "dropout.yaml", dataset=SPLITS, saving=SAVED, evaluation={**EVALUATED, "eval_steps": 2})
    return place


@pytest.fixture
def second(tmp_path: Path, first: Path) -> Path:
    """The second machine's, with files of the same contents and nothing else."""
    place = tmp_path / "second"
    place.mkdir()
    for name in ("tiny.yaml", "dropout.yaml"):
        text = (first / name).read_text(encoding="utf-8").replace(str(first), str(place))
        (place / name).write_text(text, encoding="utf-8")
    shutil.copy(first / "reviews.csv", place)
    return place


def launch(
    hosts: tuple[Host, Host], recipe: str, *arguments: str, module: str = "accel_trainer.train"
) -> list[Outcome]:
    """One line on each machine."""
    for rank, host in enumerate(hosts):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
        where = ["--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0]]
        host.launch([*command, *where, "-m", module, recipe, "--output_dir", "run", *arguments], PYTHONPATH=PATHS)
    return [host.ended("run") for host in hosts]


def hashes(outcomes: list[Outcome], when: str) -> list[str]:
    """What each process told of its weights."""
    found = [re.findall(rf"^HASH {when} {rank} (.*)$", outcome.err, re.M) for rank, outcome in enumerate(outcomes)]
    assert [len(told) for told in found] == [1] * len(outcomes)
    return [told for (told,) in found]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
def test_two_machines_take_the_steps_of_one_process(first: Path, second: Path, shared: bool) -> None:
    one = run_trainer(first / "tiny.yaml", first / "one")
    assert one.code == 0, one.err
    with two_hosts(first, first if shared else second) as hosts:
        outcomes = launch(hosts, "tiny.yaml", "--max_tokens_per_device", "40")
    two, other = outcomes
    assert [outcome.code for outcome in outcomes] == [0, 0], two.err + other.err
    check_equal(two, one)
    assert two.json("run.json")["hardware"]["num_processes"] == 2
    names = [{str(path.relative_to(run.folder)) for path in run.folder.rglob("*")} for run in (two, one)]
    assert names[0] == names[1]
    assert (two.err.count("step 1/50"), other.err.count("step 1/50")) == (1, 0)
    assert ("1 of 2 processes do not see" in two.err) is not shared
    assert other.folder.exists() is shared


def test_machines_apart_go_on_from_the_first_ones_checkpoint(first: Path, second: Path) -> None:
    """To the bit: as two processes on one machine that nobody stopped."""
    multi = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "multi_cpu.yaml")]
    done = start([sys.executable, *multi, "-m", "accel_trainer.train", "dropout.yaml", "--output_dir", "whole"], first)
    assert done.code == 0, done.err
    whole = Outcome(done.code, first / "whole", done.out, done.err)
    with two_hosts(first, second) as hosts:
        stopped, _ = launch(hosts, "dropout.yaml", "--stop_after", "5")
        assert stopped.json("status.json")["state"] == "interrupted", stopped.err
        outcomes = launch(hosts, "dropout.yaml", "--resume", module="hashed_train")
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err + outcomes[1].err
        begins, ends = hashes(outcomes, "begins"), hashes(outcomes, "ends")
        assert begins[0].startswith("step 5 ")
        assert begins[0] == begins[1]
        assert ends[0].startswith("step 8 ")
        assert ends[0] == ends[1]
        assert not (second / "run").exists()
        resumed = outcomes[0]
        assert resumed.lines == whole.lines
        assert resumed.weights_sha256 == whole.weights_sha256
        last = Path("checkpoints", "checkpoint-8", "optimizer.safetensors")
        assert (resumed.folder / last).read_bytes() == (whole.folder / last).read_bytes()

        # As when the machines are named in another order: nothing is started over unasked.
        shutil.move(first / "run", second / "run")
        refused = launch(hosts, "dropout.yaml", "--resume")
    assert all(outcome.code != 0 for outcome in refused)
    assert "checkpoint-8 lies on a machine whose storage the first one does not share" in refused[0].err
    assert refused[0].json("status.json")["exit_code"] == 2
    assert not (first / "run" / "metrics.jsonl").exists()


def test_a_machine_apart_that_is_out_of_memory_tells_the_first(first: Path, second: Path) -> None:
    with two_hosts(first, second) as hosts:
        for host in hosts:
            host.environment["MEMORY"] = json.dumps([{"rank": 1, "holds": 32, "error": "CUDA", "steps": [5, 10_000]}])
        told = "process 1 of 2 is out of memory; run the same line again with --resume"
        lost, _ = launch(hosts, "dropout.yaml", module="test_out_of_memory")
        status = lost.json("status.json")
        assert (status["state"], status["exit_code"]) == ("failed", 1)
        assert told in status["reason"]
        assert told in lost.err
        budget = lost.json("token_budget.json")["max_tokens_per_device"]
        assert f"micro-batches of {budget} tokens" in status["reason"]
        again = launch(hosts, "dropout.yaml", "--resume", module="test_out_of_memory")
    assert [outcome.code for outcome in again] == [0, 0], again[0].err + again[1].err
    assert again[0].json("run.json")["max_tokens_per_device"] == budget
    assert not (second / "run").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [("tiny.yaml", "tiny.yaml: no such recipe"), ("reviews.csv", "second/tiny.yaml:6: dataset.path: no such file")],
)
def test_a_file_that_one_machine_lacks_is_a_mistake_told_once(first: Path, second: Path, name: str, says: str) -> None:
    (second / name).unlink()
    with two_hosts(first, second) as hosts:
        outcomes = launch(hosts, "tiny.yaml")
    assert all(outcome.code != 0 for outcome in outcomes)
    assert [outcome.err.count("\nerror: ") for outcome in outcomes] == [1, 0]
    assert says in outcomes[0].err
    assert outcomes[0].json("status.json")["exit_code"] == 2
