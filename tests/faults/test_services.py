"""Trackers and the Hub may be down, and no secret reaches what a run leaves or says."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from harness import Outcome, run_trainer, write_recipe_in

from accel_trainer import cli, tracking

HUB_TOKEN = "hf_PlantedPlantedPlantedPlanted1234"
PASSWORD = "planted-password"


class Service(GeneralTracker):
    """A tracker whose service is up until the moment a test chose."""

    name = "tensorboard"
    requires_logging_directory = False
    main_process_only = True
    down_at = "never"
    told: list[Any]

    def __init__(self, run_name: str, **_: Any) -> None:
        super().__init__()
        self.check("start")
        type(self).told = [run_name]

    @property
    def tracker(self) -> None:
        return None

    def check(self, moment: str) -> None:
        if moment == self.down_at:
            raise ConnectionError(f"503 for token {HUB_TOKEN}\nand a long page")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.check("settings")
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.check(f"step {step}")
        self.told.append((step, values))

    def finish(self) -> None:
        self.check("finish")
        self.told.append("finished")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Service]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Service)
    Service.told = []
    yield Service
    Service.down_at = "never"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("services")
    write_recipe_in(place, tracking={"report_to": ["tensorboard"], "project_name": "soup"})
    return place


@pytest.fixture(scope="module")
def untracked(place: Path) -> Outcome:
    outcome = run_trainer(place / "tiny.yaml", place / "untracked", "tracking.report_to=[]")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.parametrize("moment", ["never", "start", "settings", "step 1", "step 5", "finish"])
def test_a_tracker_that_is_down_stops_nothing(
    place: Path, untracked: Outcome, service: type[Service], moment: str
) -> None:
    service.down_at = moment
    outcome = run_trainer(place / "tiny.yaml", place / moment.replace(" ", "-"))
    assert outcome.code == 0, outcome.err
    assert outcome.lines == untracked.lines
    assert outcome.weights_sha256 == untracked.weights_sha256
    said = [line for line in outcome.err.splitlines() if "tracking.report_to: tensorboard could not" in line]
    assert len(said) == (moment != "never")
    assert "Traceback" not in outcome.err
    assert HUB_TOKEN not in outcome.err
    steps = [told[0] for told in service.told if isinstance(told, tuple)]
    reached = {"start": 0, "settings": 0, "step 1": 0, "step 5": 4}.get(moment, 8)
    assert sorted(set(steps)) == list(range(1, reached + 1))


def test_one_that_is_down_takes_no_other_along() -> None:
    class Accelerator:
        """The part that trackers concern."""

        def __init__(self) -> None:
            self.log_with, self.trackers = ["good", "bad", "better"], []

        def init_trackers(self, project_name: str, config: Any) -> None:
            (name,) = self.log_with
            if name == "bad":
                raise ConnectionError
            self.trackers.append(Recorder(name))

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.steps, self.finished = name, [], False

        def log(self, values: Any, step: int) -> None:
            if self.name == "good" and step == 2:
                raise TimeoutError("slow")
            self.steps.append(step)

        def finish(self) -> None:
            self.finished = True

    accelerator: Any = Accelerator()
    tracking.start_trackers(accelerator, "soup", {})
    good, better = accelerator.trackers
    assert (good.name, better.name) == ("good", "better")
    for step in (1, 2, 3):
        tracking.track(accelerator, {"loss": 1.0}, step)
    assert (good.steps, better.steps) == ([1], [1, 2, 3])
    tracking.close_trackers(accelerator)
    assert better.finished
    assert accelerator.trackers == []


def everything_written(folder: Path) -> str:
    return "\n".join(
        path.read_bytes().decode("utf-8", errors="replace") for path in folder.rglob("*") if path.is_file()
    )


def test_planted_secrets_reach_nothing(
    place: Path, service: type[Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the environment, in what libraries complain of, and in the address of a service."""
    for name, value in {
        "HF_TOKEN": HUB_TOKEN,
        "WANDB_API_KEY": PASSWORD,
        "ACCELERATE_TRACKER_PASSWORD": PASSWORD,
        "ACCELERATE_PROXY": f"https://ann:{PASSWORD}@proxy:1",
    }.items():
        monkeypatch.setenv(name, value)
    service.down_at = "step 3"

    def talkative(*_: Any, **__: Any) -> None:
        logging.getLogger("accel_trainer").info("using %s and %s", HUB_TOKEN, PASSWORD)

    monkeypatch.setattr("accel_trainer.opening.quieten_libraries", talkative)
    outcome = run_trainer(place / "tiny.yaml", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "using *** and ***" in outcome.err

    def leaking(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"401 for https://ann:{PASSWORD}@host/x?token={HUB_TOKEN} and {HUB_TOKEN}")

    with monkeypatch.context() as patch:
        patch.setattr("accel_trainer.train.example_losses", leaking)
        broken = run_trainer(place / "tiny.yaml", tmp_path / "broken")
    assert broken.code == 1
    assert "Traceback" in broken.err
    assert "401 for https://***@host/x?***" in broken.json("status.json")["reason"]
    everything = [
        everything_written(tmp_path),
        json.dumps(service.told),
        outcome.out,
        outcome.err,
        broken.out,
        broken.err,
    ]
    for text in everything:
        assert HUB_TOKEN not in text
        assert PASSWORD not in text


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("dataset", "path", f"https://ann:{PASSWORD}@host/reviews.csv"),
        ("dataset", "path", f"https://host/reviews.csv?token={PASSWORD}"),
        ("model", "checkpoint", f"team/{HUB_TOKEN}"),
        ("tracking", "project_name", HUB_TOKEN),
    ],
)
def test_a_recipe_with_a_secret_is_refused_and_does_not_show_it(
    place: Path, capsys: pytest.CaptureFixture[str], section: str, key: str, value: str
) -> None:
    sections: dict[str, Any] = {section: {key: value}}
    if key == "checkpoint":
        sections["model"] |= {"from_config": None, "train_tokenizer": None}
    recipe = write_recipe_in(place, "secret.yaml", **sections)
    overridden = run_trainer(place / "tiny.yaml", place / "overridden", f"{section}.{key}={value}")
    written = run_trainer(recipe, place / "written")
    assert cli.main(["check", str(recipe)]) == 2
    checked = capsys.readouterr().err
    for code, said in ((overridden.code, overridden.err), (written.code, written.err), (2, checked)):
        assert code == 2
        assert f"{section}.{key}: there is a token or a password in it" in said
        assert HUB_TOKEN not in said
        assert PASSWORD not in said
    for folder in ("overridden", "written"):
        assert HUB_TOKEN not in everything_written(place / folder)
        assert PASSWORD not in everything_written(place / folder)
