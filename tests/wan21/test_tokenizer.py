"""Cleaning, truncation, files; transformers reads the same ids from what is saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from wan21.errors import CheckpointError
from wan21.models import MODELS
from wan21.text.clean import clean
from wan21.text.tokenizer import Tokenizer

TEXTS = (
    "",
    "a",
    "A red paper kite climbs over a windy harbour.",
    "  schön &amp;amp; billig\n\tÃ©tÃ©  风筝 🪁 ",
    "an end </s> in the middle",
    "word " * 300,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schÃ¶n", "schön"),
        ("âœ” No problems", "✔ No problems"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("  two\t\twords \n here  ", "two words here"),
        ("a\u3000b\u00a0c", "a b c"),
        ("&nbsp; edge &nbsp;", "edge"),
        ("   ", ""),
        ("plain", "plain"),
    ],
)
def test_cleaning(text: str, expected: str) -> None:
    assert expected == clean(text)


def word_backend(*, adds_end: bool) -> Any:
    """A tokenizer of five words, as a file may hold it."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "kite"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")  # noqa: S106 - not a password
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if adds_end:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return backend


def test_built_in_ids_are_the_bytes_moved_by_three_and_the_end() -> None:
    ids = Tokenizer.built_in()("Aé 风")
    assert [*(byte + 3 for byte in "Aé 风".encode()), 1] == ids


def test_built_in_ids_fit_the_tiny_vocabulary() -> None:
    tokenizer = Tokenizer.built_in()
    assert max(max(tokenizer(text)) for text in TEXTS) < 259 <= MODELS["tiny"].text.vocab_size


def test_the_text_is_cleaned_first() -> None:
    tokenizer = Tokenizer.built_in()
    assert tokenizer("salt & pepper") == tokenizer("  salt &amp;amp;\npepper ")


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 512])
def test_truncation_keeps_the_end_token(max_tokens: int) -> None:
    full = Tokenizer.built_in(max_tokens=10_000)("word " * 300)
    ids = Tokenizer.built_in(max_tokens=max_tokens)("word " * 300)
    assert [*full[: max_tokens - 1], 1] == ids


def test_a_text_that_just_fits_is_whole() -> None:
    assert Tokenizer.built_in(max_tokens=4)("abc") == Tokenizer.built_in()("abc")


@pytest.mark.parametrize("adds_end", [True, False])
def test_the_end_token_comes_once_whether_or_not_the_file_adds_it(tmp_path: Path, *, adds_end: bool) -> None:
    backend = word_backend(adds_end=adds_end)
    # Settings that a file may carry and that are not ours.
    backend.enable_padding(length=20, pad_id=0, pad_token="<pad>")  # noqa: S106 - not a password
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path)("a red kite") == [3, 4, 5, 1]
    assert Tokenizer.from_folder(tmp_path, max_tokens=3)("a red kite") == [3, 4, 1]
    assert Tokenizer.from_folder(tmp_path)("") == [1]


@pytest.mark.parametrize("max_tokens", [6, 512])
@pytest.mark.parametrize("text", TEXTS)
def test_transformers_reads_the_same_ids_from_a_saved_folder(tmp_path: Path, text: str, max_tokens: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.built_in(max_tokens=max_tokens)
    tokenizer.save(tmp_path / "google" / "umt5-xxl")
    official = AutoTokenizer.from_pretrained(str(tmp_path / "google" / "umt5-xxl"))
    padded = official([clean(text)], padding="max_length", truncation=True, max_length=max_tokens)
    num_real = sum(padded["attention_mask"][0])
    assert padded["input_ids"][0][:num_real] == tokenizer(text)
    assert set(padded["input_ids"][0][num_real:]) <= {0}
    assert tokenizer(text) == Tokenizer.from_folder(tmp_path / "google" / "umt5-xxl", max_tokens=max_tokens)(text)


def test_a_saved_folder_gives_the_text_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.built_in()
    tokenizer.save(tmp_path)
    official = AutoTokenizer.from_pretrained(str(tmp_path))
    assert official.decode(tokenizer("schön 风筝"), skip_special_tokens=True) == "schön 风筝"


def test_saving_leaves_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer.built_in(max_tokens=3)
    tokenizer.save(tmp_path)
    assert [3 + ord("a"), 3 + ord("b"), 1] == tokenizer("abcdef")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 3


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing; copy it from google/umt5-xxl"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_with_sentencepiece_only_says_how_to_make_the_file(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\0")
    with pytest.raises(CheckpointError, match=r"spiece\.model alone is not read.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe\x00"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer file"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # noqa: S106 - not a password
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has no token </s>"):
        Tokenizer.from_folder(tmp_path)
