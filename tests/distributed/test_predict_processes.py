"""Real launches label many files: killed, signalled, started again with other processes, and every row comes once, in order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import ROOT, Outcome, alone_on_the_cpu, start, user_environment
from hosts import ADDRESSES, two_hosts
from support import reviews
from tiny_model import write_model

from accel_trainer.predict import load_predictor, predict_file

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(sys.platform != "linux", reason="watches processes through /proc"),
]

ROWS, PARTS = 120, 12
PATIENCE = 600.0  # seconds that anything is waited for, on a machine that is busy with other things
# Texts are slow enough to be met half-way; a file FAST ends that. A file HOLD keeps all parts unfinished.
SLOW = """
import os, sys, time
from pathlib import Path
from accel_trainer import collectives, predict, predictor
from accel_trainer.signals import ignore_stop_signals

label = predictor.label_rows
def slowly(*arguments):
    end = time.monotonic() + 0.5
    while Path("HOLD").exists() or (time.monotonic() < end and not Path("FAST").exists()):
        time.sleep(0.02)
    return label(*arguments)
predictor.label_rows = slowly
ignore_stop_signals()
collectives.end_process(predict.main())
"""
# The first process begins to read the inputs when the second one has read them.
LATE = """
import os, time
from pathlib import Path
from accel_trainer import bulk_prediction, collectives, predict

read, is_first = bulk_prediction.read_inputs, os.environ["RANK"] == "0"
def reading(*arguments):
    while is_first and not Path("READ").exists():
        time.sleep(0.02)
    if is_first:
        time.sleep(0.5)  # for the second one to go on to what it should not
    found = read(*arguments)
    if not is_first:
        Path("READ").touch()
    return found
bulk_prediction.read_inputs = reading
collectives.end_process(predict.main())
"""
# One that is killed while it writes a part.
KILLED = """
import os, signal, sys
from pathlib import Path
from accel_trainer.writing import replaced
with replaced(Path(sys.argv[1])) as writing:
    writing.touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, and files of three kinds whose rows are numbered in the order of their names."""
    write_model(tmp_path / "model")
    rows = [{"id": str(i), "text": text} for i, (text, _) in enumerate(reviews(ROWS))]
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:50]), folder / "a.parquet", row_group_size=20)
    with (folder / "b.csv").open("w", encoding="utf-8") as file:
        file.writelines(["id,text\n", *(f"{row['id']},{row['text']}\n" for row in rows[50:90])])
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[90:]), encoding="utf-8")
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    (tmp_path / "late.py").write_text(LATE, encoding="utf-8")
    return tmp_path


def command(processes: int, program: list[str], *arguments: str) -> list[str]:
    config = ROOT / "accelerate_configs" / ("cpu.yaml" if processes == 1 else "multi_cpu.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if processes > 1:
        launcher += ["--num_processes", str(processes)]
    return [*launcher, *program, "model", "--input", "in/*", "--output", "out", "--rows_per_file", "10", *arguments]


def launch(place: Path, processes: int, *arguments: str) -> Outcome:
    return start(command(processes, ["-m", "accel_trainer.predict"], *arguments), place)


class Slow:
    """A launch that takes half a second for each part."""

    def __init__(self, place: Path, processes: int) -> None:
        self.place, self.log = place, place / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(processes, ["slow.py"]),
                cwd=place,
                env=user_environment(place),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """Process ids, by rank."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    found += [(int(v[5:]), int(entry.name)) for v in variables if v.startswith(b"RANK=")]
            except (OSError, ValueError, IndexError):
                continue
        return [process for _, process in sorted(found)]

    def ended(self) -> int:
        return self.process.wait(PATIENCE)


def parts(place: Path) -> dict[str, int]:
    """Finished files, and when each was written."""
    return {str(path.relative_to(place)): path.stat().st_mtime_ns for path in (place / "out").glob("*/part-*")}


def check_complete(place: Path) -> None:
    """Every row is there once, in order, as one process labels the files into one each."""
    found = [
        row for path in sorted(map(str, (place / "out").glob("*/part-*"))) for row in pq.read_table(path).to_pylist()
    ]
    assert [row["id"] for row in found] == [str(i) for i in range(ROWS)]
    expected = []
    with alone_on_the_cpu(place / "cache"):
        predictor = load_predictor(str(place / "model"))
        for name in ("a.parquet", "b.csv", "c.jsonl"):
            predict_file(predictor, place / "in" / name, place / "one.parquet", None)
            expected += pq.read_table(place / "one.parquet").to_pylist()
    assert [row["text"] for row in found] == [row["text"] for row in expected]
    assert [row["prediction"] for row in found] == [row["prediction"] for row in expected]
    assert len({row["prediction"] for row in found}) == 2
    for one, other in zip(found, expected, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    assert not list(place.rglob("*.writing"))


def test_one_is_killed_again_and_again(place: Path) -> None:
    """Launches of two, two and three processes: what was there before is never written again."""
    before: dict[str, int] = {}
    for rank in (1, 0):
        run = Slow(place, 2)
        run.wait_for(lambda before=before: len(parts(place)) >= len(before) + 2)
        os.kill(run.workers()[rank], signal.SIGKILL)
        assert run.ended() == 1
        now = parts(place)
        assert len(before) < len(now) < PARTS
        assert before.items() <= now.items()
        before = now
    start([sys.executable, "-c", KILLED, "out/c/part-00002.parquet"], place)
    assert list(place.rglob("*.writing"))
    outcome = launch(place, 3)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == ["out: 120 rows"]
    assert before.items() <= parts(place).items()
    assert len(parts(place)) == PARTS
    check_complete(place)


def test_the_others_do_the_work_of_one_that_died(place: Path) -> None:
    """Without a launcher that ends them: two launches of one process share a folder, and one is killed."""
    (place / "HOLD").touch()
    launches = Slow(place, 1), Slow(place, 1)
    launches[0].wait_for(lambda: len(list(place.glob("out/*/.part-*.writing"))) == 2)  # each is at work on one
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and is_worker(entry, place)]
    assert len(pids) == 2
    killed = Path("/proc") / str(min(pids))
    os.kill(int(killed.name), signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while killed.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    (place / "FAST").touch()
    (place / "HOLD").unlink()
    assert sorted(launch.ended() != 0 for launch in launches) == [False, True]
    check_complete(place)


def is_worker(entry: Path, place: Path) -> bool:
    try:
        words = (entry / "cmdline").read_bytes().split(b"\0")
        return words[1:2] == [b"slow.py"] and (entry / "cwd").readlink() == place
    except OSError:
        return False


def test_a_signal_keeps_what_is_done(place: Path) -> None:
    environment = user_environment(place)
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "slow.py", "model", "--input", "in/*", "--output", "out", "--rows_per_file", "10"],
            cwd=place,
            env=environment,
            stdout=log,
            stderr=log,
        )
        end = time.monotonic() + PATIENCE
        while len(parts(place)) < 2:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 75
    said = (place / "log").read_text()
    assert "interrupted; run the same line again" in said
    assert "--resume" not in said
    assert "Traceback" not in said
    before = parts(place)
    assert not list(place.rglob("*.writing"))
    assert launch(place, 2).code == 0
    assert before.items() <= parts(place).items()
    check_complete(place)


def test_a_mistake_of_two_processes_is_told_once(place: Path) -> None:
    outcome = launch(place, 2, "--text_column", "review")
    assert outcome.code == 1  # the launcher's own
    assert outcome.err.count("has no column 'review'") == 1
    assert "accel_trainer/" not in outcome.err  # no traceback of ours
    assert "exitcode  : 2" in outcome.err
    assert not (place / "out").exists()


def test_a_mistake_that_one_process_meets_is_told(place: Path) -> None:
    """A file changes while it is labelled, which shows to whoever takes its next part."""
    run = Slow(place, 2)
    run.wait_for(lambda: len(parts(place)) >= 2)
    (place / "in" / "c.jsonl").write_text('{"id": "0", "text": "other"}\n', encoding="utf-8")
    (place / "FAST").touch()
    assert run.ended() == 1
    said = run.log.read_text()
    assert "c.jsonl: it has changed since the start" in said
    assert "accel_trainer/" not in said


def test_what_processes_do_at_the_start_takes_no_order_of_them(place: Path) -> None:
    """Each is the first of its machine, and the second one of them is ready long before the first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launched = []
    for rank in (0, 1):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        with (place / f"log{rank}").open("w") as log:
            launched.append(
                subprocess.Popen(
                    [sys.executable, "late.py", *arguments(place)],
                    cwd=place,
                    env=user_environment(place, **variables, **meeting),
                    stdout=log,
                    stderr=log,
                )
            )
    codes = [process.wait(PATIENCE) for process in launched]
    assert codes == [0, 0], [(place / f"log{rank}").read_text() for rank in (0, 1)]
    check_complete(place)
    assert sorted(path.name for path in (place / "out").iterdir()) == [".claims", ".manifest.json", "a", "b", "c"]


def arguments(place: Path) -> list[str]:
    return ["model", "--input", f"{place}/in/*", "--output", "out", "--rows_per_file", "10"]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
def test_two_machines(place: Path, tmp_path: Path, shared: bool) -> None:
    """They share the inputs, and the folder of what is labelled or not; an empty one lies ready for it."""
    second = place if shared else tmp_path / "second"
    if not shared:
        (second / "out").mkdir(parents=True)
        (second / "model").symlink_to(place / "model")
        shutil.copy(place / "late.py", second)
        (second / "READ").symlink_to(place / "READ")
    config = ROOT / "accelerate_configs" / "multi_cpu_multi_node.yaml"
    with two_hosts(place, second) as hosts:
        for rank, host in enumerate(hosts):
            where = ["--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0]]
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *where]
            host.launch([*launcher, "late.py", *arguments(place)])
        first, other = (host.ended("out") for host in hosts)
    if shared:
        assert (first.code, other.code) == (0, 0), first.err + other.err
        assert [told.err.count("out: 120 rows\n") for told in (first, other)] == [1, 0]
        check_complete(place)
    else:
        assert (first.err + other.err).count("error: ") == 1
        assert "process 1: --output out: what process 0 wrote there is not to be seen here; name a folder" in first.err
        assert "exitcode  : 2" in first.err
        assert not parts(place)
        assert not (place / "out").exists()
        assert not list((second / "out").iterdir())
