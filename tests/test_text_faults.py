"""A fault shows where it is, and sound text of any language shows none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer.text_faults import EXCERPT, TEXT_FAULTS, excerpt, text_faults

CHINESE = "很好吃，下次再来。味道不错，送餐很快。"
FAULTY = {
    "lost characters": ["caf\ufffd", "好吃锟斤拷"],
    "mojibake": [
        "it’s a café".encode().decode("cp1252"),
        "déjà vu".encode().decode("latin-1"),
        "很好".encode().decode("latin-1"),
        CHINESE.encode().decode("gb18030", "ignore"),
        "非常好吃".encode("gb18030").decode("latin-1"),
    ],
    "control characters": ["a\x08b", "dash \x96 here", "\ufefftext"],
    "markup": ["one<br />two", "<b>good</b>", "<a href='x'>y</a>", "<div class='a'>", "Tom &amp; Jerry", "it&#39;s", "&QUOT;"],
    "escapes": [r"one\nTwo", r"\u597d\u5403", r"caf\xe9"],
    "no words": ["12345", "...", "3.5 !!", "！！！", "(", "￥20"],
}  # fmt: skip
SOUND = [
    "It's a café, naïve; déjà vu: “good”, ‘fine’ – 5 € … ½ off, 30 °C!",
    "CAFÉ» ¿¿¿Qué??? ¡¡¡¡¡¡¡¡ °°°°°°°° ········ NÃO, SÃO, PÂTÉ, Âge, ÄÖÜßäöü",
    "élève, øl, Łódź, São Tomé, naïveté, œuvre, İstanbul, Ελληνικά, Привет, שלום, مرحبا, 日本語です, 한국어",
    CHINESE,
    "這家餐廳的服務非常好",
    "鉄板焼き 锛子",
    "I <3 you, a < b and c > d, x<y>z, if a<b and c>d then <unknown>",
    "AT&T, R&D; Q&A &c; fish & chips;",
    r"C:\new\temp\readme and \section{x}",
    "tab\there\nnext line\r\nend\u200b\u3000",
    "10/10",
    "5 stars",
    "😀👍",
    "<unk> [UNK] http://x.org/?a=1&b=2",
]


def kinds(text):
    return [TEXT_FAULTS[i].kind for i, _ in text_faults(text)]


def test_every_kind_is_tried():
    assert set(FAULTY) == {fault.kind for fault in TEXT_FAULTS}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FAULTY.items() for text in texts])
def test_faults_are_seen(kind, text):
    assert kind in kinds(text)
    if kind != "no words":
        assert kind in kinds(f"{CHINESE} good soup {text} more")


@pytest.mark.parametrize("text", SOUND)
def test_sound_text_is_left_alone(text):
    assert kinds(text) == []


@given(
    st.text(st.characters(max_codepoint=127, categories=["L", "N", "Zs"]), min_size=1).map(lambda text: f"good {text}")
)
def test_plain_words_are_sound(text):
    assert kinds(text) == []


@given(
    st.text(st.sampled_from(CHINESE + "的一是不了人我在有他这为之大来以个中上们"), min_size=1).map(
        lambda text: f"好{text}"
    )
)
def test_chinese_is_sound_and_its_misreadings_are_not(text):
    assert kinds(text) == []
    assert "mojibake" in kinds((text + "很好").encode().decode("latin-1"))


@given(st.text(), st.integers(0, 200))
def test_an_excerpt_is_one_short_line_of_the_text(text, position):
    shown = excerpt(text, min(position, len(text)))
    assert shown[0] == "“"
    assert shown[-1] == "”"
    assert len(shown) <= EXCERPT + 4
    inner = shown[1:-1].strip("…")
    assert len(inner.splitlines()) <= 1
    assert "".join(inner.split()) in "".join(text.split())


def test_an_excerpt_shows_the_place():
    text = "a" * 500 + "<br />" + "b" * 500
    ((_, position),) = text_faults(text)
    assert "<br />" in excerpt(text, position)
    assert excerpt("short <br />", 6) == "“short <br />”"
