"""Write the food_reviews dataset: English and Chinese reviews of food, restaurants and deliveries, labelled by verdict.

All of the wording is original and lies in food_reviews_material/: word lists, clauses, sentence frames with slots, and
complete hand-written reviews. A review is a frame whose slots are filled at random and whose text is then roughened up
as people do: typos, dropped punctuation, stretched words, capitals, emoji. Many frames take either verdict, so that a
negation or the order of two clauses, and not the words alone, decides the label.

Every sentence frame, clause and hand-written review belongs to exactly one split. Common to all are single words, dish
names, amounts, emoji, neutral notes and short closing verdicts; no longer clause stands in two splits (`check` asserts
it). The words of a held-out frame are ones that several entries of train have, so that what is measured is whether a
new construction is understood and not whether an unseen word is guessed.

    python scripts/food_reviews.py --output recipes/data/food_reviews
"""

import argparse
import csv
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 20
ROWS = {"train": 5000, "validation": 400, "test": 600}
POSITIVE_SHARE = 0.54
MATERIAL = {"en": "english.txt", "zh": "chinese.txt"}

# The split of the n-th entry of a section is the n-th letter, over and over. Neighbouring entries are variants of one
# construction, so that each split sees the construction and none sees another's wording of it.
DEALING = "TTVTTETTTE"
SPLIT_LETTERS = {"train": "T", "validation": "V", "test": "E"}

ASPECTS = {"food": 5.0, "service": 2.0, "delivery": 1.5, "place": 1.5, "price": 1.5, "portion": 1.0}
MOODS = {True: "good", False: "bad"}
# What all splits share.
WORD_LISTS = {"dish", "dishes", "price", "minutes", "day", "clock", "very", "neutral"} | {
    f"{subject} {kind}"
    for subject, kinds in {
        **dict.fromkeys(ASPECTS, ("subjects", "good", "bad")),
        **dict.fromkeys(MOODS.values(), ("emoji", "verdict")),
    }.items()
    for kind in kinds
}

CONSTRUCTIONS = {"plain frame", "contrast frame", "emoji frame", "direct clause", "negated clause"} | {
    f"{mood} short" for mood in MOODS.values()
}

# Contrast and negation take the most examples to learn, so train shows more of them than the held-out splits, whose
# shares are nearer to life.
FRAME_WEIGHTS = {
    "train": {"plain frame": 69, "contrast frame": 13, "mood contrast frame": 4, "long frame": 8, "emoji frame": 6},
    "held out": {"plain frame": 73, "contrast frame": 9, "mood contrast frame": 3, "long frame": 8, "emoji frame": 7},
}
CLAUSE_WEIGHTS = {
    "train": {"direct clause": 78, "negated clause": 18, "aspect clause": 4},
    "held out": {"direct clause": 86, "negated clause": 11, "aspect clause": 3},
}

HEARD_OFTEN = 3

LONG_CLAUSE_WORDS = 6
LONG_CLAUSE_CHARACTERS = 10

HOMOPHONES = {
    "的": "得",
    "得": "的",
    "再": "在",
    "味道": "味到",
    "这么": "怎么",
    "已经": "以经",
    "服务员": "服务圆",
    "吃": "次",
}
SLOT = re.compile(r"{([^{}]+)}")
CLAUSE_BREAK = re.compile(r"[^\w\s'’\-$£]+")
HAN = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Row:
    """One labelled review."""

    review: str
    label: str
    language: str


def words_of(entry: str) -> set[str]:
    """Return the words of an entry, each Chinese character as one, without its slots."""
    return set(re.findall(r"[a-z']+|[\u4e00-\u9fff]", SLOT.sub(" ", entry).lower()))


def read_material(path: Path) -> dict[str, list[str]]:
    """Read `[section]` headings, each followed by entries: one a line, or several parted by " / "."""
    sections: dict[str, list[str]] = {}
    entries: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            entries = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            entries.extend(line.split(" / "))
    return sections


def share_of(sections: dict[str, list[str]], split: str) -> dict[str, list[str]]:
    """Return what one split may use: every word list whole, and its own part of everything else."""
    dealt = {
        name: [(DEALING[number % len(DEALING)], entry) for number, entry in enumerate(entries)]
        for name, entries in sections.items()
    }
    heard = Counter(
        word
        for name, entries in dealt.items()
        for letter, entry in entries
        if name in WORD_LISTS or letter == "T"
        for word in words_of(entry)
    )

    def owner(name: str, letter: str, entry: str) -> str:
        # A frame with a word that train hardly has would test guessing, not the understanding of a new construction.
        rare = any(heard[word] < HEARD_OFTEN for word in words_of(entry))
        return "T" if name in CONSTRUCTIONS and rare else letter

    letter_of_split = SPLIT_LETTERS[split]
    return {
        name: [
            entry for letter, entry in entries if name in WORD_LISTS or owner(name, letter, entry) == letter_of_split
        ]
        for name, entries in dealt.items()
    }


class Writer:
    """Writes the reviews of one language for one split."""

    def __init__(self, language: str, split: str, sections: dict[str, list[str]], rng: random.Random) -> None:
        self.language = language
        self.sections = share_of(sections, split)
        weights = "train" if split == "train" else "held out"
        self.frame_weights = FRAME_WEIGHTS[weights]
        self.clause_weights = CLAUSE_WEIGHTS[weights]
        self.rng = rng
        self.aspects: list[str] = []

    def handwritten(self) -> Iterator[Row]:
        """Yield each complete review of the material once."""
        for positive, mood in MOODS.items():
            for text in self.sections[f"{mood} short"] + self.sections[f"{mood} review"]:
                yield self.row(text, positive)

    def composed(self) -> Row:
        """Compose one review."""
        positive = self.rng.random() < POSITIVE_SHARE
        kind = self.pick_weighted(self.frame_weights).replace("mood", MOODS[positive])
        self.aspects = []
        text = self.fill(self.pick(kind), positive)
        return self.row(self.roughen(text, positive, with_emoji=kind != "emoji frame"), positive)

    def row(self, text: str, positive: bool) -> Row:
        return Row(text, "positive" if positive else "negative", self.language)

    def pick(self, section: str) -> str:
        return self.rng.choice(self.sections[section])

    def pick_weighted(self, weights: dict[str, int]) -> str:
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def fill(self, frame: str, positive: bool) -> str:
        """Fill the slots of a frame; what fills a slot may have slots of its own."""
        mood = MOODS[positive]

        def filling(match: re.Match[str]) -> str:
            slot = match[1]
            if slot in "XY":
                return self.clause(positive if slot == "X" else not positive)
            section = {"V": f"{mood} verdict", "E": f"{mood} emoji", "N": "neutral"}.get(slot, slot)
            return self.fill(self.pick(section), positive)

        return SLOT.sub(filling, frame)

    def clause(self, positive: bool) -> str:
        """Write a clause about an aspect of the meal that the review has not judged yet."""
        if not self.aspects:
            self.aspects = sorted(ASPECTS, key=lambda aspect: self.rng.random() ** (1 / ASPECTS[aspect]))
        aspect = self.aspects.pop()
        kind = self.pick_weighted(self.clause_weights)
        if kind == "aspect clause":
            if self.sections[f"{aspect} {MOODS[positive]} clause"]:
                return self.fill(self.pick(f"{aspect} {MOODS[positive]} clause"), positive)
            kind = "direct clause"
        subject = self.fill(self.pick(f"{aspect} subjects"), positive)
        plural = subject.endswith("s") and not subject.endswith("ss")
        words = {
            "it": subject,
            "very": self.pick("very"),
            "was": "were" if plural else "was",
            "is": "are" if plural else "is",
            "wasn't": "weren't" if plural else "wasn't",
            "isn't": "aren't" if plural else "isn't",
            "y": self.pick(f"{aspect} {MOODS[not positive]}"),
        }
        frame = self.pick(kind)
        agreeing = self.sections[f"{aspect} {MOODS[positive]}"]
        judgements = iter(self.rng.sample(agreeing, len(agreeing)))
        if "{x}{x}" in frame:
            frame = frame.replace("{x}", next(judgements))
        return SLOT.sub(lambda match: next(judgements) if match[1] == "x" else words[match[1]], frame)

    def roughen(self, text: str, positive: bool, with_emoji: bool) -> str:
        """Give a text the looks of something typed on a phone."""
        text = self.roughen_english(text) if self.language == "en" else self.roughen_chinese(text)
        if with_emoji and self.chance(0.12):
            agrees = self.chance(0.94)
            text += self.rng.choice(["", " "]) + self.pick(f"{MOODS[positive == agrees]} emoji") * self.rng.choice(
                [1, 1, 1, 2, 3]
            )
        return text

    def roughen_english(self, text: str) -> str:
        if self.chance(0.75):
            text = re.sub(r"(^|[.!?]\s+)([a-z])", lambda match: match[1] + match[2].upper(), text)
        elif self.chance(0.5):
            text = text.lower()
        if self.chance(0.07):
            text = re.sub(r"[.,;'](?!\d)", "", text)
        if self.chance(0.06):
            text = self.mistype(text)
        if self.chance(0.05):
            text = re.sub(r"\b(so|really|very|super|always)\b", lambda match: self.stretch(match[1]), text)
        if self.chance(0.03):
            text = text.upper()
        if self.chance(0.08):
            text = text.rstrip(".!") + "!" * self.rng.randint(1, 4)
        return text

    def roughen_chinese(self, text: str) -> str:
        if self.chance(0.10):
            text = re.sub(r"[，。；]", self.rng.choice([" ", ""]), text).strip()
        if self.chance(0.05):
            wrong = [word for word in HOMOPHONES if word in text]
            if wrong:
                word = self.rng.choice(wrong)
                text = text.replace(word, HOMOPHONES[word], 1)
        if self.chance(0.15):
            text = text.rstrip("。！") + self.rng.choice(
                ["！！", "！！！", "~", "～～", "…", "。。。", "哈哈", "啊啊啊", "呀"]
            )
        return text

    def mistype(self, text: str) -> str:
        """Swap, drop or double a letter inside one longer word."""
        words = list(re.finditer(r"[a-z]{5,}", text))
        if not words:
            return text
        word = self.rng.choice(words)
        at = self.rng.randrange(word.start() + 1, word.end() - 1)
        slip = self.rng.choice([text[at + 1] + text[at], text[at + 1], text[at] * 2 + text[at + 1]])
        return text[:at] + slip + text[at + 2 :]

    def stretch(self, word: str) -> str:
        return word[:-1] + word[-1] * self.rng.randint(3, 6)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def fingerprint(text: str) -> str:
    """Return the text without case, spacing and ASCII punctuation: two reviews that share it count as duplicates."""
    return re.sub(r"[\s!-/:-@，。！？；：、…~～]+", "", text.lower()) or text


def long_clauses(text: str) -> set[str]:
    """Return the clauses between punctuation marks that are long enough to be recognised again."""
    clauses = (" ".join(clause.lower().split()) for clause in CLAUSE_BREAK.split(text))
    return {
        clause
        for clause in clauses
        if len(clause.split()) >= LONG_CLAUSE_WORDS or len(HAN.findall(clause)) >= LONG_CLAUSE_CHARACTERS
    }


def make(material: Path) -> dict[str, list[Row]]:
    """Make all splits, the held-out ones first so that what train must not repeat never narrows them."""
    rng = random.Random(SEED)
    splits: dict[str, list[Row]] = {}
    texts: set[str] = set()
    clauses_elsewhere: set[str] = set()
    for split in ("test", "validation", "train"):
        rows: list[Row] = []
        for language, name in MATERIAL.items():
            writer = Writer(language, split, read_material(material / name), rng)
            wanted = len(rows) + ROWS[split] // len(MATERIAL)
            rows += (row for row in writer.handwritten())
            texts.update(fingerprint(row.review) for row in rows)
            while len(rows) < wanted:
                row = writer.composed()
                if fingerprint(row.review) in texts or long_clauses(row.review) & clauses_elsewhere:
                    continue
                texts.add(fingerprint(row.review))
                rows.append(row)
        clauses_elsewhere.update(clause for row in rows for clause in long_clauses(row.review))
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def check(splits: dict[str, list[Row]]) -> None:
    """Assert that no text stands twice anywhere and that no long clause stands in two splits."""
    texts = [fingerprint(row.review) for rows in splits.values() for row in rows]
    repeated = {text for text in texts if texts.count(text) > 1} if len(texts) != len(set(texts)) else set()
    assert not repeated, f"texts stand twice: {sorted(repeated)[:5]}"
    owner: dict[str, str] = {}
    for split, rows in splits.items():
        for clause in {clause for row in rows for clause in long_clauses(row.review)}:
            assert owner.setdefault(clause, split) == split, f"{clause!r} stands in {owner[clause]} and in {split}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("recipes/data/food_reviews"), help="folder of the CSV files"
    )
    output: Path = parser.parse_args().output
    splits = make(Path(__file__).parent / "food_reviews_material")
    check(splits)
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with (output / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["review", "label", "language"])
            table.writerows((row.review, row.label, row.language) for row in rows)
        positive = sum(row.label == "positive" for row in rows)
        print(f"{split}: {len(rows)} rows, {positive} positive, {len(rows) - positive} negative")


if __name__ == "__main__":
    main()
