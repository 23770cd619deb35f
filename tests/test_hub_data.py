"""The Hub, without a network: what is asked of it, what its caches answer, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from sample_files import section, texts, write_configs, write_texts

from accel_trainer import hub_data
from accel_trainer.errors import DataError
from accel_trainer.sources import read_source
from accel_trainer.tables import Origin

OLD, NEW = "a" * 40, "b" * 40


def hub_cache(home: Path) -> None:
    repository = home / "hub" / "datasets--org--reviews"
    write_configs(repository / "snapshots" / OLD, "old")
    write_configs(repository / "snapshots" / NEW, "new")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    (repository / "refs" / "v1").write_text(OLD)
    broken_off = home / "hub" / "datasets--org--partial"
    write_texts(broken_off / "snapshots" / NEW, **{"data__train-00000-of-00002_csv": "half"})
    (broken_off / "refs").mkdir()
    (broken_off / "refs" / "main").write_text(NEW)


def prepared_cache(home: Path, tmp_path: Path) -> None:
    """What `load_dataset("org/prepared")` leaves."""
    folder = write_texts(tmp_path / "prepared", train_csv="whole")
    built = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "built"))["train"]
    target = home / "datasets" / "org___prepared" / "default" / "0.0.0" / OLD
    shutil.copytree(Path(built.cache_files[0]["filename"]).parent, target)
    next(target.glob("*.arrow")).rename(target / "prepared-train.arrow")
    info = json.loads((target / "dataset_info.json").read_text())
    info |= {"dataset_name": "prepared", "config_name": "default"}
    for split in info["splits"].values():
        split["dataset_name"] = "prepared"
    (target / "dataset_info.json").write_text(json.dumps(info))


READ = """
import json, sys
from accel_trainer.errors import DataError
from accel_trainer.recipe import DatasetSection
from accel_trainer.sources import read_source
for keys in json.loads(sys.argv[1]):
    try:
        source = read_source(DatasetSection(splits={"train": "train"}, **keys), only=["train"])
        table = source.tables["train"]
        print(json.dumps([table.data["text"][:], source.revision, table.place(0)]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def test_hub_caches_offline(tmp_path):
    home = tmp_path / "home"
    hub_cache(home)
    prepared_cache(home, tmp_path)
    cases = [
        ({"path": "org/reviews", "name": "first"}, [["new first"], NEW, "org/reviews train, row 1"]),
        ({"path": "org/reviews", "name": "second"}, [["new second"], NEW, "org/reviews train, row 1"]),
        ({"path": "org/reviews", "name": "first", "revision": "v1"}, [["old first"], OLD, "org/reviews train, row 1"]),
        ({"path": f"hf://datasets/org/reviews@{OLD}", "name": "first"}, [["old first"], OLD, "org/reviews train, row 1"]),
        ({"path": "org/reviews", "data_files": "second.parquet"}, [["new second"], NEW, "org/reviews train, row 1"]),
        ({"path": "org/prepared"}, [["whole"], OLD, "org/prepared train, row 1"]),
        ({"path": "org/prepared", "revision": OLD}, [["whole"], OLD, "org/prepared train, row 1"]),
        ({"path": "org/prepared", "revision": NEW}, ["revision " + OLD, NEW, "connect once"]),
        ({"path": "org/prepared", "name": "other"}, ["org/prepared", "default"]),
        ({"path": "org/reviews", "name": "third"}, ["['first', 'second']", "`dataset.name`"]),
        ({"path": "org/reviews"}, ["['first', 'second']", "`dataset.name`"]),
        ({"path": "org/partial"}, ["org/partial", "connect once"]),
        ({"path": "org/unknown"}, ["org/unknown", "connect once"]),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([keys for keys, _ in cases])],
        env=environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", "progress bars or log lines"
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    for (keys, expected), answer in zip(cases, answers, strict=True):
        if isinstance(answer, str):
            assert [needle for needle in expected if needle not in answer] == [], (keys, answer)
        else:
            assert answer == expected, keys


def hub_error(kind, status):
    import httpx2 as client

    return kind("refused", response=client.Response(status, request=client.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize(
    ("kind", "status", "remedy"),
    [
        ("GatedRepoError", 403, "hf auth login"),
        ("RepositoryNotFoundError", 404, "correct `dataset.path`"),
        ("RevisionNotFoundError", 404, "correct `dataset.revision`"),
    ],
)
def test_answers_of_the_hub(monkeypatch, kind, status, remedy):
    def refuse(*_, **__):
        raise hub_error(getattr(huggingface_hub.errors, kind), status)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(DataError) as caught:
        read_source(section(path="org/reviews", revision="v9"))
    assert remedy in str(caught.value)


def test_what_is_asked_of_the_hub(monkeypatch):
    asked = {}

    def load_dataset(*args, **keys):
        asked[args] = keys
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]}))

    monkeypatch.setattr(hub_data, "_commit", lambda *_: NEW)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = read_source(section(path="org/reviews", name="first", revision="v1", data_files={"train": "a.csv"}))
    assert asked == {("org/reviews", "first"): {"revision": NEW, "data_files": {"train": "a.csv"}}}
    assert source.revision == NEW
    assert source.tables["train"].origins == (Origin("org/reviews train", 1),)


def test_a_hub_out_of_reach_is_no_error_where_a_snapshot_is_cached(tmp_path, monkeypatch, caplog):
    def time_out(*_, **__):
        raise TimeoutError("no answer")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", time_out)
    snapshot = write_configs(tmp_path / NEW, "cached")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    source = read_source(section(path="org/reviews", name="first"))
    assert texts(source) == {"train": ["cached first"]}
    assert source.revision == NEW
    assert "the Hub is not reached (TimeoutError)" in caplog.text


def test_datasets_that_need_a_script(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Dataset scripts are no longer supported, but found reviews.py")

    monkeypatch.setattr(hub_data, "_commit", lambda *_: NEW)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"org/reviews: .*; export the dataset to parquet"):
        read_source(section(path="org/reviews"))
