"""What `path` and `data_files` name is found, grouped by split and read; addresses never show their secrets."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import fsspec
import pytest
from sample_files import section, texts, write_configs, write_texts

from accel_trainer.errors import DataError
from accel_trainer.sources import read_source
from accel_trainer.tables import Origin


@pytest.fixture(autouse=True)
def own_downloads(tmp_path_factory, monkeypatch):
    downloads = tmp_path_factory.mktemp("downloads")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", downloads)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train_csv", "dev_csv", "test_csv"], {"train": 1, "validation": 1, "test": 1}),
        (["reviews_csv", "more_csv"], {"train": 2}),
        (["reviews_csv", "test_csv"], {"train": 1, "test": 1}),
        (["train_csv", "test_csv", "notes_csv"], {"train": 1, "test": 1}),
        (["train__a_csv", "train__b_csv", "test__a_csv"], {"train": 2, "test": 1}),
        (["a_csv", ".hidden_csv", ".git__b_csv"], {"train": 1}),
        (["data__train-00000-of-00002_csv", "data__train-00001-of-00002_csv", "data__extra-00000-of-00001_csv"],
         {"train": 2, "extra": 1}),
    ],
)  # fmt: skip
def test_files_of_a_folder_are_grouped_by_name(tmp_path, files, expected):
    folder = write_texts(tmp_path / "reviews [1]", **dict.fromkeys(files, "x"))
    (folder / "notes.md").write_text("no data")
    source = read_source(section(path=str(folder)))
    assert {split: len(table.data) for split, table in source.tables.items()} == expected
    assert source.revision is None


def test_a_name_that_tells_of_two_splits_is_refused(tmp_path):
    write_texts(tmp_path, train_csv="a", **{"train_test_csv": "b"})
    with pytest.raises(DataError, match=r"train_test\.csv: .*train and test; name the files"):
        read_source(section(path=str(tmp_path)))


def test_only_the_splits_asked_for_are_read(tmp_path):
    write_texts(tmp_path, train_csv="a", test_csv="b")
    (tmp_path / "test.csv").write_text("")
    assert texts(read_source(section(path=str(tmp_path)), only={"train"})) == {"train": ["a"]}
    with pytest.raises(DataError, match="no split 'dev', only train, test; correct"):
        read_source(section(path=str(tmp_path)), only={"dev"})


def test_data_files(tmp_path, monkeypatch):
    folder = write_texts(tmp_path, a1_csv="1", a2_csv="2", b_csv="3", **{"odd[1]_csv": "4"})
    monkeypatch.chdir(tmp_path)
    named = {"train": ["a*.csv", "a1.csv"], "dev": str(folder / "b.csv"), "odd": "odd[1].csv"}
    expected = {"train": ["1", "2"], "dev": ["3"], "odd": ["4"]}
    assert texts(read_source(section(path=str(folder), data_files=named))) == expected
    assert texts(read_source(section(data_files=named))) == expected
    assert texts(read_source(section(path="b.csv"))) == {"train": ["3"]}
    for wrong, match in {"c*.csv": "no file is found.*; correct", "c.csv": "no such file; correct"}.items():
        with pytest.raises(DataError, match=match):
            read_source(section(path=str(folder), data_files=wrong))


def test_folders_without_data(tmp_path):
    with pytest.raises(DataError, match=r"holds no data files; known are \.csv"):
        read_source(section(path=str(tmp_path)))
    with pytest.raises(DataError, match="no such file; correct"):
        read_source(section(path=str(tmp_path / "missing")))


def test_saved_to_disk(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    data.with_format("numpy").save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    assert texts(read_source(section(path=str(tmp_path / "one")))) == {"train": ["a", "b"]}
    source = read_source(section(path=str(tmp_path / "two")))
    assert texts(source) == {"train": ["a", "b"], "test": ["b"]}
    assert source.tables["test"].place(0) == f"{tmp_path / 'two' / 'test'}, row 1"
    next((tmp_path / "two" / "test").glob("*.arrow")).write_bytes(b"")
    assert texts(read_source(section(path=str(tmp_path / "two")), only=["train"])) == {"train": ["a", "b"]}
    with pytest.raises(DataError, match=r"saved dataset is damaged.*; save it again"):
        read_source(section(path=str(tmp_path / "two")))


def test_configs_of_a_folder(tmp_path):
    folder = write_configs(tmp_path / "glue", "local")
    source = read_source(section(path=str(folder), name="second"))
    assert texts(source) == {"train": ["local second"], "test": ["local first"]}
    assert source.tables["train"].place(0) == f"{folder} train, row 1"
    for name in ("third", None):
        with pytest.raises(DataError, match=r"\['first', 'second'\].*`dataset.name`"):
            read_source(section(path=str(folder), name=name))


# --- addresses --------------------------------------------------------------------------------------------------------


class Server(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_are_read_again_when_changed_and_never_show_secrets(tmp_path, served):
    url = f"http://user:secret@{served}/a.csv?token=hidden"
    for text in ("one", "two"):
        write_texts(tmp_path, a_csv=text)
        table = read_source(section(path=url)).tables["train"]
        assert table.data["text"][:] == [text]
        assert table.origins == (Origin(f"http://{served}/a.csv", 1),)
    (tmp_path / "a.csv").write_text("text\n")
    for address in (url, url.replace("a.csv", "b.csv"), url.replace("a.csv", "c.doc")):
        with pytest.raises(DataError) as caught:
            read_source(section(data_files=address))
        assert str(caught.value).startswith("http://127.0.0.1")
        assert "secret" not in str(caught.value)
        assert "hidden" not in str(caught.value)


def test_folders_and_patterns_of_any_file_system(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    memory = fsspec.filesystem("memory")
    for name in ("train_1", "train_2", "test"):
        memory.pipe(f"/reviews/{name}.csv", f"text\n{name}\n".encode())
    expected = {"train": ["train_1", "train_2"], "test": ["test"]}
    assert texts(read_source(section(path="memory://reviews"))) == expected
    assert texts(read_source(section(path="memory://reviews", data_files="tr*.csv"))) == {"train": expected["train"]}
    assert texts(read_source(section(data_files="memory://reviews/test.csv"))) == {"train": ["test"]}
    with pytest.raises(DataError, match=r"memory://reviews/x\*: no file is found.*; correct"):
        read_source(section(data_files="memory://reviews/x*"))
