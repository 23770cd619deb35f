"""What a run leaves for others: the model folder with its card, and the predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accel_trainer.data import Split
from accel_trainer.labels import UNLABELLED
from accel_trainer.order import Rows
from accel_trainer.recipe import DatasetSection, Recipe
from accel_trainer.writing import committed


def probabilities(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Softmax over the last axis, in float64; shape as `logits`."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def predictions(logits: npt.NDArray[np.float32], label_names: list[str]) -> list[dict[str, Any]]:
    """The predicted label's name and every label's probability, for each row of logits (rows, num_labels)."""
    return [
        {
            "prediction": label_names[int(row.argmax())],
            "probabilities": {name: float(share) for name, share in zip(label_names, row, strict=True)},
        }
        for row in probabilities(logits)
    ]


def prediction_rows(
    split: Split, section: DatasetSection, logits: npt.NDArray[np.float32], label_names: list[str]
) -> Iterator[dict[str, Any]]:
    """One record per row of a split, in order: row, text, label, prediction, probabilities.

    Args:
        split: the rows.
        section: names the text columns.
        logits: (rows, num_labels).
        label_names: names by class id.
    """
    shown = predictions(logits, label_names)
    row = 0
    for texts, pairs in split.rows.texts(section):
        for i, text in enumerate(texts):
            label = int(split.rows.labels[row])
            yield {
                "row": row,
                "text": text,
                **({"text_pair": pairs[i]} if pairs else {}),
                "label": None if label == UNLABELLED else label_names[label],
                **shown[row],
            }
            row += 1


def named_rows(split: Split, section: DatasetSection, rows: Rows, label_names: list[str]) -> list[dict[str, Any]]:
    """Some rows of a split with their place in the data, their texts and labels.

    Args:
        split: the rows of a role.
        section: names the text columns.
        rows: indices into the split.
        label_names: names by class id.
    """
    table = split.rows.table.select_columns(section.text_columns)
    return [
        {
            "row": row,
            "place": split.rows.place(row),
            "label": label_names[int(split.rows.labels[row])],
            **table[row],
        }
        for row in rows.tolist()
    ]


def save_model(
    folder: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    step: int,
) -> None:
    """Write a folder that `transformers.pipeline("text-classification", folder)` loads.

    Raises:
        RunFolderError: it cannot be written; an earlier folder of the name stays.
    """
    with committed(folder) as writing:
        # safetensors looks at addresses in memory, which XLA's tensors do not have.
        model.save_pretrained(writing, state_dict={name: weight.cpu() for name, weight in weights.items()})
        tokenizer.save_pretrained(writing)
        (writing / "README.md").write_text(card, encoding="utf-8")
        (writing / "training.json").write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def model_card(recipe: Recipe, label_names: list[str], step: int, scores: dict[str, dict[str, float]]) -> str:
    """Model card: front matter that model hubs read, what the model does, its scores, how to use it, how it was made.

    Args:
        recipe: the resolved recipe.
        label_names: names by class id.
        step: optimizer steps that the weights have seen.
        scores: split → metric → value; may be empty.
    """
    base = recipe.model.checkpoint
    public = base is not None and not Path(base).is_absolute()
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["text-classification", "accel_trainer"],
    }
    if public:
        front["base_model"] = base
    data = recipe.dataset.path or "files of its own"
    named = Path(data).name if Path(data).is_absolute() else data
    lines = [
        "---",
        yaml.safe_dump(front, allow_unicode=True, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {recipe.description or 'Text classifier'}",
        "",
        f"Gives a text one of {len(label_names)} labels: {', '.join(label_names)}.",
        "",
        f"Made from {f'`{base}`' if public else 'a new encoder' if base is None else 'a local checkpoint'} on `{named}`, "
        f"{step} optimizer steps of {recipe.training.global_batch_size} examples. The recipe that repeats it is "
        "`recipe.yaml` of its run.",
        "",
    ]
    if scores:
        metrics = list(dict.fromkeys(name for values in scores.values() for name in values))
        lines += ["| split | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        lines += [
            f"| {split} | " + " | ".join(f"{values[m]:.4f}" if m in values else "" for m in metrics) + " |"
            for split, values in scores.items()
        ]
        lines.append("")
    lines += [
        "```python",
        "from transformers import pipeline",
        "",
        'classify = pipeline("text-classification", "path/of/this/folder")',
        'classify("…", truncation=True)',
        "```",
        "",
    ]
    return "\n".join(lines)
