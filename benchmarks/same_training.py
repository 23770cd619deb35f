"""Print what an update does when the same examples are cut into other micro-batches: by this trainer and by its peers.

python benchmarks/same_training.py [--json FILE]

One update over 16 examples, as 16 × 1, 4 × 4 and 1 × 16 (micro-batch × accumulation) and by two processes; one epoch of 14
examples, 4 to an update; and one update with dropout. Plain SGD on a tiny BERT classifier, float32, on the CPU, without a
network. Every cell is a launch of its own; all 60 take some ten minutes of one core. The trainers:

- accel_trainer: `accel_trainer.train`, cut by `--max_tokens_per_device`
- Trainer: that of transformers, as it comes. Where a model's forward takes **kwargs it leaves the division to the model, and
  multiplies by the number of processes; BERT's head ignores the count it is handed (see huggingface/transformers#47688)
- Trainer, compute_loss_func: the same, given a loss that divides by that count
- Trainer, accepts_loss_kwargs: the same, told by `model.accepts_loss_kwargs = False` that the model does not divide
- complete_nlp_example, gradient_accumulation: the loops of examples/complete_nlp_example.py (nlp_example.py updates at the
  same steps) and examples/by_feature/gradient_accumulation.py in huggingface/accelerate; two processes get another order

Weights are float32, so that agreement shows as differences of about 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from accel_trainer import hardware, train

ROOT = Path(__file__).resolve().parent.parent
# What an update is, under the names that a recipe and TrainingArguments share; neither clips nor decays.
STEPS: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
MATHEMATICS: dict[str, Any] = {"seed": 42, "num_train_epochs": 1, **STEPS}
# The first word of row i is "row{i}": the tokens that reach the embeddings tell which rows are trained on.
ROWS = 16
WORDS = [f"word{i}" for i in range(40)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"row{i}" for i in range(ROWS)), *WORDS]
FIRST_ROW = VOCABULARY.index("row0")
# Initialised ten times as wide as BERT, or all examples would have nearly the same logits and gradients.
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG: dict[str, Any] = {**SIZES, "initializer_range": 0.2, "vocab_size": len(VOCABULARY)}
# Tokens of a row, in turn. Chosen so that a budget of b·20 tokens makes micro-batches of b rows for each b used below.
LENGTHS = (17, 18, 19, 20)


@dataclass(frozen=True)
class Job:
    """One training run over the first `rows` rows."""

    trainer: str
    micro_batch: int
    accumulation: int
    processes: int
    rows: int
    model: str  # folder of the initial weights and the tokenizer
    output: str

    @property
    def layout(self) -> str:
        cut = f"{self.micro_batch} × {self.accumulation}"
        return cut if self.processes == 1 else f"{self.processes} processes, {cut}"


def examples(count: int) -> list[dict[str, Any]]:
    """Rows of a text and a label, the same at every call."""
    draw = random.Random(0)
    texts = [f"row{i} {' '.join(draw.choices(WORDS, k=LENGTHS[i % 4] - 3))}" for i in range(count)]  # and [CLS], [SEP]
    return [{"text": text, "label": draw.randrange(2)} for text in texts]


def load(folder: str | Path, count: int) -> tuple[Any, Any, Any]:
    """The model, the tokenised rows and what makes batches of them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{**tokenizer(row["text"]), "label": row["label"]} for row in examples(count)]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return model, rows, transformers.DataCollatorWithPadding(tokenizer)


# The trainers. Each leaves the weights in `output/model` and returns the loss that it reports for the first update.


def run_accel_trainer(job: Job) -> float:
    output = Path(job.output)
    data, recipe = (output.with_name(f"{output.name}-{os.environ.get('RANK', 0)}.{kind}") for kind in ("jsonl", "yaml"))
    data.write_text("\n".join(map(json.dumps, examples(job.rows))), encoding="utf-8")
    global_batch_size = job.micro_batch * job.accumulation * job.processes
    sections = {
        "dataset": {"data_files": {"train": str(data)}, "splits": {"train": "train"}, "labels": ["0", "1"]},
        "model": {"checkpoint": job.model},
        "training": {**MATHEMATICS, "global_batch_size": global_batch_size, "max_grad_norm": None},
        "evaluation": {"eval_strategy": "no"},
        "saving": {"save_strategy": "no"},
        "tracking": {"logging_steps": 1},
    }
    recipe.write_text(yaml.safe_dump(sections), encoding="utf-8")
    budget = str(job.micro_batch * max(LENGTHS))
    code = train.main([str(recipe), "--output_dir", str(output), "--max_tokens_per_device", budget])
    assert code == 0, f"accel_trainer ended with exit code {code}"
    return float(json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"])


def divided_by_count(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def run_trainer(job: Job, loss: Callable[..., Tensor] | None = None, model_divides: bool = True) -> float:
    model, rows, collate = load(job.model, job.rows)
    if not model_divides:
        model.accepts_loss_kwargs = False
    cut = {"per_device_train_batch_size": job.micro_batch, "gradient_accumulation_steps": job.accumulation}
    silence = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    settings: dict[str, Any] = {**MATHEMATICS, **cut, **silence, "max_grad_norm": 0, "use_cpu": True}
    arguments = transformers.TrainingArguments(job.output, **settings)
    trainer = transformers.Trainer(model, arguments, collate, rows, compute_loss_func=loss)
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(f"{job.output}/model")
    return float(trainer.state.log_history[0]["loss"])


def run_accelerate(job: Job, *, accumulate: bool) -> float | None:
    """The loops of Accelerate's examples, without schedule and evaluation."""
    accelerator = Accelerator(gradient_accumulation_steps=job.accumulation if accumulate else 1)
    bare_model, rows, collate = load(job.model, job.rows)
    set_seed(MATHEMATICS["seed"])
    loader: Any = DataLoader(rows, shuffle=True, collate_fn=collate, batch_size=job.micro_batch)
    sgd = torch.optim.SGD(bare_model.parameters(), lr=MATHEMATICS["learning_rate"])
    model, optimizer, loader = accelerator.prepare(bare_model.train(), sgd, loader)
    total_loss = 0.0
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model) if accumulate else nullcontext():  # accumulate divides, and holds steps back
            loss = model(**batch).loss / (1 if accumulate else job.accumulation)
            total_loss += loss.item()
            accelerator.backward(loss)
            if accumulate or step % job.accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
    if accelerator.is_main_process:
        bare_model.save_pretrained(f"{job.output}/model")
    return None if accumulate else total_loss / len(loader)  # the one example tracks this, the other nothing


TRAINERS: dict[str, Callable[[Job], float | None]] = {
    "accel_trainer": run_accel_trainer,
    "Trainer": run_trainer,
    "Trainer, compute_loss_func": partial(run_trainer, loss=divided_by_count),
    "Trainer, accepts_loss_kwargs": partial(run_trainer, model_divides=False),
    "complete_nlp_example": partial(run_accelerate, accumulate=False),
    "gradient_accumulation": partial(run_accelerate, accumulate=True),
}


def work(job: Job) -> None:
    """Train in this process, as one of `job.processes`, and note which rows each update was computed from."""
    pending: list[int] = []
    updates: list[list[int]] = []

    def see_rows(module: nn.Module, inputs: Any) -> None:
        is_words = isinstance(module, nn.Embedding) and module.num_embeddings == len(VOCABULARY)
        if is_words and torch.is_grad_enabled():
            rows = inputs[0].flatten() - FIRST_ROW
            rows = rows[(rows >= 0) & (rows < ROWS)].tolist()
            assert updates or len(rows) == job.micro_batch, f"a micro-batch of {len(rows)} in {job}"
            pending.extend(rows)

    def see_update(*_: Any) -> None:
        # Processes that do not know of each other each train alone, and no launcher says so.
        together = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        assert together == job.processes, f"{together} processes train together, not {job.processes}"
        updates.append(pending.copy())
        pending.clear()

    register_module_forward_pre_hook(see_rows)
    register_optimizer_step_post_hook(see_update)
    seen = {"loss": TRAINERS[job.trainer](job), "updates": updates}
    Path(f"{job.output}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen), encoding="utf-8")


def weights(folder: str | Path) -> Tensor:
    """All weights of a model in one row."""
    tensors = load_file(Path(folder, "model.safetensors"))
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def launch(job: Job) -> dict[str, Any]:
    """Run a job in processes of its own, and read what it left."""
    print(f"{job.rows} rows, {Path(job.model).name}: {job.trainer}, {job.layout}", file=sys.stderr, flush=True)
    config = str(ROOT / "accelerate_configs" / "multi_cpu.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config] if job.processes > 1 else []
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--worker", json.dumps(asdict(job))]
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    apart = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{job.output}-cache", "TMPDIR": str(Path(job.output).parent)}
    done = subprocess.run(command, env={**os.environ, **cpu, **apart}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job}\n{done.stdout}\n{done.stderr}")
    ranks = [json.loads(Path(f"{job.output}-{rank}.json").read_text()) for rank in range(job.processes)]
    updates = [sorted(chain(*parts)) for parts in zip(*(rank["updates"] for rank in ranks), strict=True)]
    used, distinct = sum(map(len, updates)), len(set(chain(*updates)))
    note = f"{distinct}, {used - distinct} of them twice" if used > distinct else f"{distinct}"
    return {"weights": weights(f"{job.output}/model"), "loss": ranks[0]["loss"], "updates": updates, "examples": note}


Table = dict[str, dict[str, dict[str, Any]]]  # trainer → layout → what came of it


def measure(folder: Path, rows: int, layouts: Sequence[tuple[int, int, int]], defined: Tensor | None = None) -> Table:
    """Every trainer in every layout (micro-batch, accumulation, processes); lengths are relative."""
    jobs = [
        Job(trainer, *layout, rows, str(folder), str(folder / f"{rows}-{i}-{'-'.join(map(str, layout))}"))
        for i, trainer in enumerate(TRAINERS)
        for layout in layouts
    ]
    initial, table = weights(folder), dict[str, dict[str, dict[str, Any]]]()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for job, result in zip(jobs, pool.map(launch, jobs), strict=True):
            table.setdefault(job.trainer, {})[job.layout] = result
    for results in table.values():
        first = next(iter(results.values()))["weights"]
        for result in results.values():
            after = result.pop("weights")
            result["length"] = float((after - initial).norm() / (first - initial).norm())
            result["difference"] = float((after - first).norm() / (first - initial).norm())
            if defined is not None:
                result["error"] = float((after - defined).norm() / (defined - initial).norm())
    return table


def show(title: str, table: Table, key: str, form: str = "") -> None:
    """Print a Markdown table: trainers down, layouts across."""
    layouts = list(next(iter(table.values())))
    print(f"\n{title}\n\n| | {' | '.join(layouts)} |\n|---|{'---:|' * len(layouts)}")
    for trainer, results in table.items():
        cells = ("–" if result[key] is None else format(result[key], form) for result in results.values())
        print(f"| {trainer} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(Job(**json.loads(arguments.worker)))
        return
    with tempfile.TemporaryDirectory() as name:
        plain, dropout, stepped = (Path(name, kind) for kind in ("no dropout", "dropout 0.1", "stepped"))
        torch.manual_seed(MATHEMATICS["seed"])
        model: Any = transformers.BertForSequenceClassification(transformers.BertConfig(**CONFIG))
        for folder, probability in ((dropout, 0.1), (plain, 0.0)):
            model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = probability
            model.save_pretrained(folder)
            transformers.BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(folder)
        # What an update is by definition: one batch, its mean loss, one step.
        model, rows, collate = load(plain, 16)
        loss = model(**collate(rows)).loss
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=MATHEMATICS["learning_rate"]).step()
        model.save_pretrained(stepped)
        update = measure(plain, 16, [(16, 1, 1), (4, 4, 1), (1, 16, 1), (8, 1, 2)], weights(stepped))
        epoch = measure(plain, 14, [(4, 1, 1), (1, 4, 1), (2, 1, 2)])
        with_dropout = measure(dropout, 16, [(16, 1, 1), (4, 4, 1), (8, 1, 2)])
    facts = {**hardware.versions(), **MATHEMATICS}
    print(" · ".join(f"{name} {value}" for name, value in facts.items()))
    show("One update over 16 examples: its length, 16 × 1 being 1", update, "length", ".4f")
    show("The same: distance from that update in plain torch, whose length is 1", update, "error", ".1e")
    show("The same: examples that it was computed from", update, "examples")
    show(f"The same: reported loss (plain torch: {loss.item():.4f})", update, "loss", ".4f")
    show("14 examples, 4 to an update: difference from 4 × 1 after an epoch", epoch, "difference", ".1e")
    show("The same: examples that the updates were computed from", epoch, "examples")
    show("One update with dropout 0.1: difference from 16 × 1", with_dropout, "difference", ".1e")
    if arguments.json:
        numbers = {"facts": facts, "update": update, "epoch": epoch, "with_dropout": with_dropout}
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
