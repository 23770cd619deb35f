"""Metrics against scikit-learn, against hand-made counts, and without a network or a file left behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time

import evaluate
import numpy as np
import pytest
import sklearn.metrics
import torch
from datasets import Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from accel_trainer import metrics as m
from accel_trainer import shipped_metrics
from accel_trainer.errors import UserError
from accel_trainer.recipe import SHIPPED_METRICS

pytestmark = [pytest.mark.filterwarnings("error::UserWarning"), pytest.mark.filterwarnings("error::RuntimeWarning")]

AVERAGES = ("macro", "micro", "weighted")


def logits_of(predictions, num_labels):
    """Logits whose argmax is `predictions`."""
    return np.eye(num_labels)[np.asarray(predictions)] * 3.0


@st.composite
def class_ids(draw):
    """(number of classes, true ids, predicted ids), each side drawn from classes of its own, so that some are absent."""
    num_labels = draw(st.integers(2, 6))
    n = draw(st.integers(1, 30))
    present = st.sets(st.integers(0, num_labels - 1), min_size=1).map(sorted)
    sides = [
        draw(st.lists(st.sampled_from(draw(present)), min_size=n, max_size=n)) for _ in ("references", "predictions")
    ]
    return num_labels, np.array(sides[0]), np.array(sides[1])


def by_hand(num_labels, references, predictions):
    """Rows (c, 4) of precision, recall, f1 and support, counted in plain Python."""
    rows = []
    for label in range(num_labels):
        both = sum(p == label and r == label for p, r in zip(predictions, references, strict=True))
        predicted, true = sum(p == label for p in predictions), sum(r == label for r in references)
        ratios = [part / whole if whole else 0.0 for part, whole in ((both, predicted), (both, true))]
        rows.append((*ratios, 2 * both / (predicted + true) if predicted + true else 0.0, true))
    return np.array(rows, dtype=float)


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shipped_metrics_are_the_recipe_s_and_bear_its_names():
    assert tuple(shipped_metrics.SHIPPED) == SHIPPED_METRICS
    assert set(m.AVERAGED) == {
        name for name, kind in shipped_metrics.SHIPPED.items() if issubclass(kind, shipped_metrics.AveragedMetric)
    }
    for name, kind in shipped_metrics.SHIPPED.items():
        module = kind()
        assert module.name == name
        assert isinstance(module, evaluate.Metric)
        assert list(module.compute(predictions=[0, 1, 1], references=[0, 1, 0])) == [name]


def test_values_counted_by_hand():
    # class 0: 2 right of 3 predicted, 4 true; class 1: 2 right of 4 predicted, 3 true; class 2: no row at all
    references, predictions = np.array([0, 0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 0])
    results = m.compute_metrics(m.load_metrics(SHIPPED_METRICS), logits_of(predictions, 3), references, "macro")
    assert results.pop("loss") == pytest.approx(mean_loss_of_eye(references, predictions, 3))
    assert results == pytest.approx(
        {
            "accuracy": 4 / 7,
            "precision": (2 / 3 + 2 / 4 + 0) / 3,
            "recall": (2 / 4 + 2 / 3 + 0) / 3,
            "f1": (4 / 7 + 4 / 7 + 0) / 3,
            "matthews_correlation": (2 * 2 - 2 * 1) / math.sqrt(4 * 3 * 3 * 4),
        }
    )


def mean_loss_of_eye(references, predictions, num_labels):
    """Logits of 3 at the prediction and 0 elsewhere cost log(e³ + c - 1), less 3 where the prediction is right."""
    right = sum(references == predictions)
    return math.log(math.exp(3) + num_labels - 1) - 3 * right / len(references)


@given(class_ids())
@settings(max_examples=40)
def test_shipped_metrics_are_scikit_learn_s_over_all_classes(case):
    num_labels, references, predictions = case
    loaded = m.load_metrics(SHIPPED_METRICS)
    for average in AVERAGES if num_labels > 2 else (*AVERAGES, "binary"):
        results = m.compute_metrics(loaded, logits_of(predictions, num_labels), references, average)
        assert list(results) == ["loss", *SHIPPED_METRICS]
        assert all(type(value) is float for value in results.values())
        expected = {
            name: getattr(sklearn.metrics, f"{name}_score")(
                references, predictions, labels=list(range(num_labels)), average=average, zero_division=0
            )
            for name in ("precision", "recall", "f1")
        }
        expected["accuracy"] = np.mean(references == predictions)
        assert {name: results[name] for name in expected} == pytest.approx(expected)
        assert results["matthews_correlation"] == pytest.approx(matthews_by_hand(num_labels, references, predictions))


def matthews_by_hand(num_labels, references, predictions):
    """Pearson's correlation of the two one-hot tables, all classes taken together; 0 where a side is constant."""
    x, y = (np.eye(num_labels)[side] for side in (references, predictions))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    spread = math.sqrt((x * x).sum() * (y * y).sum())
    return (x * y).sum() / spread if spread > 1e-9 else 0.0


@given(class_ids())
@settings(max_examples=60)
def test_detailed_report_counts_what_hands_count(case):
    num_labels, references, predictions = case
    names = [f"name {label}" for label in range(num_labels)]
    report = m.detailed_report(logits_of(predictions, num_labels), references, names)
    assert json.loads(json.dumps(report)) == report
    assert list(report["per_class"]) == names
    rows = [
        [scores[key] for key in ("precision", "recall", "f1", "support")] for scores in report["per_class"].values()
    ]
    np.testing.assert_allclose(rows, by_hand(num_labels, references, predictions), rtol=1e-12)
    supports = np.array([row[3] for row in rows])
    for name, weights in (("macro", np.full(num_labels, 1 / num_labels)), ("weighted", supports / supports.sum())):
        scores = report["averages"][name]
        found = [scores[key] for key in ("precision", "recall", "f1")]
        np.testing.assert_allclose(found, weights @ np.array(rows)[:, :3], rtol=1e-9, atol=1e-12)
        assert scores["support"] == len(references)
    accuracy = pytest.approx(float(np.mean(references == predictions)))
    assert report["averages"]["micro"] == {
        "precision": accuracy,
        "recall": accuracy,
        "f1": accuracy,
        "support": len(references),
    }
    for true, counts in enumerate(report["confusion_matrix"]):
        for predicted, count in enumerate(counts):
            assert count == sum((references == true) & (predictions == predicted))


def test_binary_is_the_class_with_the_higher_id():
    references, predictions = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    results = m.compute_metrics(
        m.load_metrics(["precision", "recall"]), logits_of(predictions, 2), references, "binary"
    )
    assert (results["precision"], results["recall"]) == (1.0, 0.5)
    with pytest.raises(UserError, match=r"evaluation\.average: binary with 3 labels"):
        m.compute_metrics({}, logits_of(predictions, 3), references, "binary")


def test_a_class_without_rows_counts_in_macro():
    same = np.zeros(5, dtype=int)
    for num_labels in (2, 3, 6):
        results = m.compute_metrics(m.load_metrics(["f1"]), logits_of(same, num_labels), same, "macro")
        assert results["f1"] == pytest.approx(1 / num_labels)


# ── loss ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(2, 6), st.sampled_from([1e-3, 1.0, 300.0]))
@settings(max_examples=40)
def test_loss_is_torch_s_in_float64(seed, n, num_labels, scale):
    random = np.random.default_rng(seed)
    logits = (random.normal(size=(n, num_labels)) * scale).astype(np.float32)
    labels = random.integers(0, num_labels, n)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    assert m.compute_metrics({}, logits, labels, "macro") == {"loss": pytest.approx(expected.item(), rel=1e-12)}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_make_the_loss_nan_and_nothing_else(bad):
    logits = logits_of([0, 1, 1, 0], 2)
    logits[2, 1] = bad
    results = m.compute_metrics(m.load_metrics(SHIPPED_METRICS), logits, np.array([0, 1, 0, 0]), "macro")
    assert math.isnan(results.pop("loss"))
    assert set(results) == set(SHIPPED_METRICS)
    assert all(math.isfinite(value) for value in results.values())


@pytest.mark.parametrize("labels", [[0, -1], [0, 2], [0], [0.0, 1.0]], ids=["unlabelled", "range", "length", "float"])
def test_labels_that_do_not_fit_break_an_invariant(labels):
    with pytest.raises(AssertionError):
        m.compute_metrics({}, logits_of([0, 1], 2), np.array(labels), "macro")


# ── as evaluate modules ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_metric_works_alone_again_and_again():
    f1 = shipped_metrics.F1()
    for _ in range(2):
        assert f1.compute(predictions=[0, 1, 1], references=[0, 1, 0], average="macro")["f1"] == pytest.approx(2 / 3)
    assert f1.compute(predictions=[0, 2, 1], references=[0, 1, 1], average=None)["f1"] == pytest.approx([1, 2 / 3, 0])
    assert f1.compute(predictions=[1], references=[1], labels=range(4), average="macro") == {"f1": 0.25}


def test_rows_added_one_by_one_in_batches_and_at_once_are_the_same_rows():
    for metric in (
        shipped_metrics.F1(),
        shipped_metrics.F1(keep_in_memory=True),
        shipped_metrics.MatthewsCorrelation(),
        shipped_metrics.Accuracy(),
    ):
        at_once = metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
        for _ in range(2):
            metric.add(prediction=0, reference=0)
            metric.add_batch(predictions=[1, 1], references=[1, 0])
            assert metric.compute(predictions=[0], references=[0]) == at_once


def test_modules_combine():
    combined = evaluate.combine([shipped_metrics.Accuracy(), shipped_metrics.Recall()])
    assert combined.compute(predictions=[0, 1], references=[1, 1]) == {"accuracy": 0.5, "recall": 0.5}


@pytest.mark.parametrize("predictions", [[0.5, 1.0], [math.nan, 1.0], [[0], [1]], ["0", "1"], [1]])
def test_what_is_no_class_id_per_row_is_refused(predictions):
    with pytest.raises(ValueError, match=r"class ids|numbers of samples"):
        shipped_metrics.Accuracy().compute(predictions=predictions, references=[0, 1])


def test_a_million_float_predictions_are_quick():
    random = np.random.default_rng(0)
    references, predictions = random.integers(0, 3, (2, 10**6)).astype(np.float64)
    start = time.perf_counter()
    shipped_metrics.F1().compute(predictions=predictions, references=references, average="macro")
    assert time.perf_counter() - start < 2


def test_a_metric_on_disk_still_works(tmp_path):
    metric = shipped_metrics.Accuracy(keep_in_memory=False, cache_dir=str(tmp_path))
    metric.add_batch(predictions=[0, 1], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.5}


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Foreign(evaluate.Metric):
    """Stands for a script of the Hub: several values, some of which are no numbers."""

    def _info(self):
        features = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"foreign": 0.25, "spread": np.float32(0.5), "rows": 3, "note": "text", "per_class": [1.0], "ok": True}


class OneNumber(Foreign):
    def _compute(self, predictions, references):
        return {"score": 0.5}


class BareNumber(Foreign):
    def _compute(self, predictions, references):
        return 0.75


class NoNumber(Foreign):
    def _compute(self, predictions, references):
        return {"note": "text"}


class Fussy(Foreign):
    def _compute(self, predictions, references):
        raise ZeroDivisionError("no curve")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Answers `evaluate.load` from a dict, and records what was asked; an exception is raised."""
    answers, asked = {}, []

    def load(name, **kwargs):
        asked.append(name)
        answer = answers.get(name, FileNotFoundError("no such script"))
        if isinstance(answer, Exception):
            raise answer
        return answer(
            **{key: value for key, value in kwargs.items() if key == "keep_in_memory"}, cache_dir=tmp_path / "c"
        )

    monkeypatch.setattr(evaluate, "load", load)
    monkeypatch.chdir(tmp_path)
    return answers, asked


def test_a_foreign_metric_s_values_bear_its_name(hub):
    answers, asked = hub
    answers |= {"foreign": Foreign, "owner/foreign": Foreign, "one": OneNumber, "bare": BareNumber}
    loaded = m.load_metrics(["foreign", "f1", "owner/foreign", "one", "bare"], allow_remote_code=True)
    assert asked == ["foreign", "owner/foreign", "one", "bare"]
    results = m.compute_metrics(loaded, logits_of([0, 1], 2), np.array([0, 1]), "macro")
    assert list(results.items())[1:] == [
        *{"foreign": 0.25, "foreign_spread": 0.5, "foreign_rows": 3.0, "f1": 1.0}.items(),
        *{"owner/foreign": 0.25, "owner/foreign_spread": 0.5, "owner/foreign_rows": 3.0}.items(),
        *{"one": 0.5, "bare": 0.75}.items(),
    ]
    assert all(type(value) is float for value in results.values())


def test_an_unknown_name_tells_what_there_is(hub):
    with pytest.raises(UserError) as caught:
        m.load_metrics(["accuracy", "acuracy"])
    message = str(caught.value)
    assert message.startswith("evaluation.metrics: acuracy cannot be loaded")
    assert "did you mean accuracy?" in message
    assert ", ".join(SHIPPED_METRICS) in message
    assert "Hub" in message
    with pytest.raises(UserError) as caught:
        m.load_metrics(["rouge"])
    assert "did you mean" not in str(caught.value)


def test_a_script_s_own_error_is_told(hub):
    answers, _ = hub
    answers |= {"picky": ImportError("pip install picky"), "fussy": Fussy, "none": NoNumber}
    for name, told in (("picky", "pip install picky"), ("fussy", "no curve"), ("none", "no number")):
        with pytest.raises(UserError, match=f"evaluation.metrics: {name} .*{told}"):
            m.load_metrics([name])


def test_loss_is_no_metric_to_ask_for(hub):
    with pytest.raises(UserError, match="always reported"):
        m.load_metrics(["loss"])
    assert hub[1] == []


@pytest.mark.parametrize("name", ["mine.py", "./mine.py", "folder/mine", "./mine", "mine", "missing.py"])
@pytest.mark.parametrize("allowed", [False, True])
def test_local_code_never_runs(monkeypatch, tmp_path, name, allowed):
    script = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit\n"
    for path in ("mine.py", "mine/mine.py", "folder/mine/mine.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(script)
    monkeypatch.chdir(tmp_path)  # evaluate.load is the real one: it would run them
    with pytest.raises(UserError, match="no code is run from a recipe"):
        m.load_metrics([name], allow_remote_code=allowed)
    assert not list(tmp_path.rglob("ran"))


def test_an_owner_s_script_needs_leave(hub):
    with pytest.raises(UserError, match="--trust_remote_code"):
        m.load_metrics(["somebody/metric"])
    assert hub[1] == []
    with pytest.raises(UserError, match="cannot be loaded"):
        m.load_metrics(["somebody/metric"], allow_remote_code=True)


# ── processes, files, network ─────────────────────────────────────────────────────────────────────────────────────────

CHILD = """
import json, os, socket, sys
from pathlib import Path

sys.modules["transformers"] = None  # evaluate imports it where it can, and torch with it: seconds
import numpy as np
from accel_trainer import metrics as m
from accel_trainer.errors import UserError
light = not {"evaluate", "sklearn", "scipy", "torch", "transformers"} & {k for k, v in sys.modules.items() if v}
from accel_trainer.shipped_metrics import SHIPPED
del sys.modules["transformers"]
torch_imported = "torch" in sys.modules

def wait_for_the_other():
    print("ready", flush=True)
    sys.stdin.readline()

wait_for_the_other()
results = []
for _ in range(30):
    loaded = m.load_metrics(list(SHIPPED))
    results.append(m.compute_metrics(loaded, np.eye(3)[[0, 1, 1]], np.array([0, 1, 0]), "macro"))
    f1 = SHIPPED["f1"]()
    f1.add_batch(predictions=[0, 1], references=[0, 1])
    results.append(f1.compute())
left = [str(path) for root in (os.environ["HF_HOME"], ".") for path in Path(root).rglob("*")]

wait_for_the_other()
dialled = []
for name in ("getaddrinfo", "create_connection"):
    setattr(socket, name, lambda *args, **kwargs: dialled.append(str(args)) or sys.exit("dialled"))
try:
    m.load_metrics(["rouge"])
except UserError as error:
    answer = {"results": results, "left": left, "dialled": dialled, "error": str(error)}
    print(json.dumps(answer | {"torch": torch_imported, "light": light}))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes say that compute at once, with the same caches and folder, offline."""
    here, home = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("home")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_METRICS_CACHE": str(home / "metrics"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::UserWarning:sklearn", "-c", CHILD]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=here, env=environment, text=True) for _ in range(2)
    ]
    for _ in ("compute", "load"):
        assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
    answers = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    return [json.loads(answer) for answer in answers]


def test_two_processes_compute_the_same_and_leave_no_file(two_processes):
    first, second = two_processes
    assert first["results"] == second["results"]
    assert len(first["results"]) == 60
    assert first["results"][1] == {"f1": 1.0}
    assert first["left"] == second["left"] == []


def test_offline_a_foreign_metric_is_the_user_s_mistake_and_nobody_dials(two_processes):
    for answer in two_processes:
        assert answer["error"].startswith("evaluation.metrics: rouge cannot be loaded")
        assert answer["dialled"] == []


def test_torch_is_not_imported_by_the_module_itself(two_processes):
    assert [answer["torch"] for answer in two_processes] == [False, False]


def test_what_scores_are_computed_with_waits_for_the_first_score(two_processes):
    assert [answer["light"] for answer in two_processes] == [True, True]


# ── best, and text ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "best", "greater", "threshold", "expected"),
    [
        (0.5, None, True, 0.0, True),
        (0.5, None, False, 0.1, True),
        (0.5, 0.5, True, 0.0, False),
        (0.5, 0.5, False, 0.0, False),
        (0.6, 0.5, True, 0.0, True),
        (0.6, 0.5, False, 0.0, False),
        (0.4, 0.5, False, 0.0, True),
        (0.75, 0.5, True, 0.25, False),
        (0.75, 0.5, True, 0.2, True),
        (0.25, 0.5, False, 0.25, False),
        (math.nan, None, True, 0.0, False),
        (math.nan, 0.5, True, 0.0, False),
        (math.nan, 0.5, False, 0.0, False),
        (math.inf, 0.5, False, 0.0, False),
    ],
)
def test_improved_is_strict_and_never_nan(value, best, greater, threshold, expected):
    assert m.improved(value, best, greater, threshold) is expected


def test_report_as_text():
    references, predictions = np.array([0] * 4 + [1] * 6), np.array([0, 0, 0, 1] + [1] * 4 + [0] * 2)
    text = m.classification_report(m.detailed_report(logits_of(predictions, 2), references, ["差评", "POSITIVE"]))
    assert text == (
        "          precision  recall      f1  support\n"
        "差评         0.6000  0.7500  0.6667        4\n"
        "POSITIVE     0.8000  0.6667  0.7273        6\n"
        "macro        0.7000  0.7083  0.6970       10\n"
        "weighted     0.7200  0.7000  0.7030       10\n"
        "accuracy                     0.7000       10\n"
        "\n"
        "confusion matrix: rows true, columns predicted\n"
        "            0  1\n"
        "0 差评      3  1\n"
        "1 POSITIVE  2  4"
    )


@given(class_ids(), st.lists(st.text("a差é中B", min_size=1, max_size=9), min_size=6, max_size=6, unique=True))
@settings(max_examples=30)
def test_report_as_text_is_aligned_on_screen_and_means_what_scikit_learn_means(case, names):
    num_labels, references, predictions = case
    report = m.detailed_report(logits_of(predictions, num_labels), references, names[:num_labels])
    scores, matrix = (block.splitlines() for block in m.classification_report(report).split("\n\n"))
    assert len({cell_len(line) for line in scores}) == 1
    assert len({cell_len(line) for line in matrix[1:]}) == 1
    labels = list(range(num_labels))
    for line, average in zip(scores[-3:-1], ("macro", "weighted"), strict=True):
        expected = sklearn.metrics.precision_recall_fscore_support(
            references, predictions, labels=labels, average=average, zero_division=0
        )
        assert line.split()[0] == average
        assert [float(cell) for cell in line.split()[1:4]] == pytest.approx(expected[:3], abs=6e-5)
    assert scores[-1].split() == ["accuracy", f"{np.mean(references == predictions):.4f}", str(len(references))]
