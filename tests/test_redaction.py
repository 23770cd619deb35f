"""No secret gets through, whatever stands around it; what is none stays as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_trainer.redaction import HIDDEN, Parser, holds_secret, without_secrets

AROUND = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)
SECRETS = [
    ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"),
    ("ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789", "ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"),
    ("sk-proj-AbCdEfGhIjKlMnOpQrStUvWx", "AbCdEfGhIjKlMnOpQrStUvWx"),
    ("AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("https://ann:hunter2@host.org/a.csv", "hunter2"),
    ("https://:hunter2@host.org/a.csv", "hunter2"),
    ("https://0123456789abcdef0123@github.com/team/x.git", "0123456789abcdef0123"),
    ("https://host.org/a.csv?token=hunter2", "hunter2"),
    ("s3://bucket/a.csv?versionId=3&X-Amz-Signature=deadbeef&b=1", "deadbeef"),
    ("Authorization: Bearer abcdefghijklmnop.qrstuv", "abcdefghijklmnop.qrstuv"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
@given(before=AROUND, after=AROUND)
def test_a_secret_is_hidden(text: str, secret: str, before: str, after: str) -> None:
    whole = f"{before} {text} {after}"
    assert holds_secret(whole)
    shown = without_secrets(whole)
    assert secret not in shown.removeprefix(before).removesuffix(after)
    assert HIDDEN in shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the basket held 12 tokens; a key=value pair",
        "https://host.org/a.csv?page=2#rows",
        "git@github.com:team/recipes.git",
        "https://git@github.com/team/recipes.git",
        "面 https://主机.org/评论.csv?行=3",
        "hf_transfer, sk-learn, /home/ann/gh_pages",
        "run accel_trainer.train recipes/a.yaml training.seed=3",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text
    assert not holds_secret(text)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "my_secret"]
)
def test_what_the_environment_calls_a_secret_is_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "correct horse")
    assert without_secrets("it said: correct horse!") == f"it said: {HIDDEN}!"


@pytest.mark.parametrize(("name", "value"), [("TOKENIZERS_PARALLELISM", "correct horse"), ("HF_TOKEN", "short")])
def test_other_variables_are_not(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert without_secrets(f"it said: {value}!") == f"it said: {value}!"


def test_a_command_line_shows_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("--steps", type=int)
    token = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
    for arguments in (["--hub_token", token], ["--steps", token]):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(arguments)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert token not in said
        assert HIDDEN in said
