"""Print the accuracy of logistic regression on a bag of words: what a dataset gives away without word order.

python benchmarks/bag_of_words.py TRAIN.csv TEST.csv --text_column review --label_column label
"""

import argparse
import csv
import re
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

# A word is a run of letters or digits, but each Chinese character and each symbol outside ASCII (an emoji) is its own.
WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+(?:'[a-z]+)?|[^\w\s\u0000-\u2fff\u3000-\u303f\uff00-\uffef]")


def read(path: Path, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Return the texts and the labels of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row[text_column] for row in rows], [row[label_column] for row in rows]


def words(text: str) -> list[str]:
    """Split a text into lowercased words."""
    return WORD.findall(text.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--text_column", default="review")
    parser.add_argument("--label_column", default="label")
    arguments = parser.parse_args()
    train_texts, train_labels = read(arguments.train, arguments.text_column, arguments.label_column)
    test_texts, test_labels = read(arguments.test, arguments.text_column, arguments.label_column)
    for name, longest in (("unigrams", 1), ("unigrams and bigrams", 2)):
        bag = CountVectorizer(tokenizer=words, token_pattern=None, lowercase=False, ngram_range=(1, longest))
        model = make_pipeline(bag, LogisticRegression(max_iter=1000))
        model.fit(train_texts, train_labels)
        print(f"{name:<22}{model.score(test_texts, test_labels):.4f}")


if __name__ == "__main__":
    main()
