"""Real launches label many files: killed, signalled, started again with other processes, and every row comes once, in order."""

from __future__ import annotations

import json
import os
import signal
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
from support import reviews
from tiny_model import write_model

from accel_trainer.predict import load_predictor, predict_file

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(sys.platform != "linux", reason="watches processes through /proc"),
]

ROWS, PARTS = 120, 12
PATIENCE = 90.0  # seconds that anything is waited for
# Texts are slow enough to be met half-way; a file FAST ends that.
SLOW = """
import os, sys, time
from pathlib import Path
from accel_trainer import bulk_prediction, predict
from accel_trainer.signals import ignore_stop_signals

label = bulk_prediction.label_rows
def slowly(*arguments):
    end = time.monotonic() + 0.5
    while time.monotonic() < end and not Path("FAST").exists():
        time.sleep(0.02)
    return label(*arguments)
bulk_prediction.label_rows = slowly
ignore_stop_signals()
predict.hardware.end_process(predict.main())
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
    left = place / "out" / "c" / ".part-00002.parquet.1.writing"  # as by one that was killed while it wrote
    left.parent.mkdir(exist_ok=True)
    left.touch()
    outcome = launch(place, 3)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == ["out: 120 rows"]
    assert before.items() <= parts(place).items()
    assert len(parts(place)) == PARTS
    check_complete(place)


def test_the_others_do_the_work_of_one_that_died(place: Path) -> None:
    """Without a launcher that ends them: two launches of one process share a folder, and one is killed."""
    one, two = Slow(place, 1), Slow(place, 1)
    one.wait_for(lambda: len(parts(place)) >= 4)
    pids = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and is_worker(p, place)}
    assert len(pids) == 2
    killed = min(pids)
    os.kill(killed, signal.SIGKILL)
    (place / "FAST").touch()
    assert sorted([one.ended() != 0, two.ended() != 0]) == [False, True]
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
