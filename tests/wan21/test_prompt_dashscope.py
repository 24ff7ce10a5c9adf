"""Prompt extension by DashScope, against a fake of it on this machine."""

import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.wan21.fake_dashscope import ANSWER, GOOD_KEY, FakeDashScope, serving
from wan21.errors import UsageError
from wan21.prompt.dashscope import MOST_PIXELS, NUM_ATTEMPTS, DashScope
from wan21.prompt.extend import ExtendedPrompt, extend_prompt
from wan21.prompt.instructions import instruction
from wan21.prompt.settings import make_prompt_extension
from wan21.prompt.writer import ExtensionError
from wan21.runtime import CpuRuntime

BAD_KEY = "sk-bad-fedcba9876543210"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDashScope]:
    with serving() as server:
        monkeypatch.setenv("DASH_API_URL", server.url)
        monkeypatch.setenv("DASH_API_KEY", GOOD_KEY)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


def ask(pictures: tuple[np.ndarray, ...] = (), seed: int = 7, timeout_seconds: float = 60.0) -> tuple[str, list[float]]:
    """An answer and the pauses before it."""
    pauses: list[float] = []
    writer = DashScope("qwen-plus", timeout_seconds=timeout_seconds, sleep=pauses.append)
    return writer.write("be brief", "a kite", pictures, seed), pauses


def extend(monkeypatch: pytest.MonkeyPatch, pictures: tuple[np.ndarray, ...] = ()) -> ExtendedPrompt:
    monkeypatch.setattr("wan21.prompt.dashscope.FIRST_PAUSE_SECONDS", 0.0)
    extension = make_prompt_extension(method="dashscope", target_lang="en", has_pictures=bool(pictures))
    return extend_prompt("a kite", extension, pictures=pictures, seed=7, runtime=CpuRuntime())


def test_the_answer_of_the_service_becomes_the_prompt(fake: FakeDashScope, monkeypatch: pytest.MonkeyPatch) -> None:
    assert extend(monkeypatch) == ExtendedPrompt(prompt=ANSWER, original="a kite")
    (request,) = fake.requests
    assert request["path"] == "/api/v1/services/aigc/text-generation/generation"
    body = request["body"]
    assert body["model"] == "qwen-plus"
    assert body["parameters"]["seed"] == 7
    told = instruction("en", num_pictures=0, is_image=False)
    assert [message["content"] for message in body["input"]["messages"]] == [told, "a kite"]


def test_pictures_are_sent_small_and_in_order(fake: FakeDashScope, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = np.full((512, 2048, 3), (255, 0, 0), np.uint8), np.zeros((32, 64, 3), np.uint8)
    assert extend(monkeypatch, (first, last)).prompt == ANSWER
    (request,) = fake.requests
    assert request["path"] == "/api/v1/services/aigc/multimodal-generation/generation"
    assert request["body"]["model"] == "qwen-vl-max"
    *pictures, text = request["body"]["input"]["messages"][1]["content"]
    assert text == {"text": "a kite"}
    sent = [
        Image.open(io.BytesIO(base64.b64decode(part["image"].removeprefix("data:image/png;base64,"))))
        for part in pictures
    ]
    assert [picture.size for picture in sent] == [(1024, 256), (64, 32)]
    assert sent[0].width * sent[0].height <= MOST_PIXELS
    assert sent[0].getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("trouble", [429, 500, 503, "drop"])
def test_what_may_pass_is_tried_again_after_a_pause(fake: FakeDashScope, trouble: int | str) -> None:
    fake.plan = [trouble, trouble, 200]
    answer, pauses = ask()
    assert answer == ANSWER
    assert pauses == [1.0, 2.0]
    assert len(fake.requests) == 3


def test_after_four_attempts_the_reason_is_told(fake: FakeDashScope) -> None:
    fake.plan = [503]
    with pytest.raises(ExtensionError, match="4 attempts: HTTP status 503") as refused:
        ask()
    assert len(fake.requests) == NUM_ATTEMPTS == 4
    assert "127.0.0.1" in refused.value.advice


def test_silence_ends_after_the_time_limit(fake: FakeDashScope) -> None:
    fake.plan = ["hang"]
    with pytest.raises(ExtensionError, match=r"no answer within 0\.05 s"):
        ask(timeout_seconds=0.05)


def test_nobody_at_the_address_leaves_the_original_prompt(fake: FakeDashScope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASH_API_URL", "http://127.0.0.1:9")
    extended = extend(monkeypatch)
    assert extended.prompt == "a kite"
    assert "refused" in extended.problem
    assert not fake.requests


def test_a_bad_key_is_tried_once_and_never_repeated_in_words(
    fake: FakeDashScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASH_API_KEY", BAD_KEY)
    extended = extend(monkeypatch)
    assert extended.prompt == extended.original == "a kite"
    assert "401 (InvalidApiKey: Invalid API-key provided: ***.)" in extended.problem
    assert "DASH_API_KEY" in extended.advice
    assert BAD_KEY not in repr(extended)
    assert [request["key"] for request in fake.requests] == [BAD_KEY]


def test_a_redirection_is_not_followed_with_the_key(fake: FakeDashScope, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.plan = ["redirect"]
    extended = extend(monkeypatch)
    assert "302" in extended.problem
    assert "redirection" in extended.advice
    assert [request["path"] for request in fake.requests] == ["/api/v1/services/aigc/text-generation/generation"]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"{}",
        b"[]",
        b"null",
        b'{"output": {"choices": []}}',
        b'{"output": {"choices": [{"message": {"content": null}}]}}',
        b'{"output": {"choices": [{"message": {"content": [5]}}]}}',
        b"\xff\xfe",
    ],
)
def test_an_answer_of_another_form_leaves_the_original_prompt(
    fake: FakeDashScope, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.plan = [body]
    extended = extend(monkeypatch)
    assert extended.prompt == "a kite"
    assert "not of the known form" in extended.problem


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [('  "A kite\n flies."  ', "A kite flies."), ("“风筝”", "风筝"), ('"Go" and "stop"', '"Go" and "stop"')],
)
def test_quotes_and_line_breaks_around_an_answer_go(
    fake: FakeDashScope, answer: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.answer = answer
    assert extend(monkeypatch).prompt == prompt


def test_an_empty_answer_leaves_the_original_prompt(fake: FakeDashScope, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answer = " \n"
    extended = extend(monkeypatch)
    assert (extended.prompt, extended.problem) == ("a kite", "the answer was empty")


def test_the_seed_fits_what_the_service_takes(fake: FakeDashScope) -> None:
    ask(seed=2**62 + 5)
    assert fake.requests[0]["body"]["parameters"]["seed"] == 5


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"DASH_API_KEY": " "}, "needs a key: set the environment variable DASH_API_KEY"),
        ({"DASH_API_KEY": "sk\nX-Other: 1"}, "characters that no key has"),
        ({"DASH_API_URL": "ftp://example.com"}, "is not an address"),
        ({"DASH_API_URL": "https://user:secret@example.com"}, "is not an address"),
        ({"DASH_API_URL": "http://example.com/api/v1"}, "unencrypted to example.com; use https"),
    ],
)
def test_a_missing_key_or_a_careless_address_is_refused_before_anything_starts(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASH_API_KEY", GOOD_KEY)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words) as refused:
        make_prompt_extension(method="dashscope")
    assert "secret" not in str(refused.value)
    assert "X-Other" not in str(refused.value)
