"""Prompt extension by a language model on this machine: a tiny Qwen made on the spot."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.wan21.tiny_qwen import write_text_model, write_vision_model
from wan21.errors import MissingPackageError, UsageError
from wan21.events import Span
from wan21.prompt.extend import ExtendedPrompt, extend_prompt
from wan21.prompt.instructions import instruction
from wan21.prompt.settings import LANGUAGES, make_prompt_extension, repository
from wan21.runtime import CpuRuntime, CudaRuntime


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("qwen") / "text")


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("qwen") / "vision")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan21.prompt.local_qwen.MOST_NEW_TOKENS", 16)


class Listener:
    """Notes every span, and what is allocated when it ends."""

    wants_blocks = False

    def __init__(self, runtime: CpuRuntime) -> None:
        self.runtime = runtime
        self.ends: list[tuple[str, str]] = []
        self.allocated: dict[str, int] = {}

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        yield
        self.ends.append((span.kind, span.name))
        self.allocated[span.kind] = self.runtime.memory().allocated_bytes


def extend(model: Path, seed: int = 1, pictures: tuple[np.ndarray, ...] = ()) -> ExtendedPrompt:
    extension = make_prompt_extension(model=str(model), target_lang="en", has_pictures=bool(pictures))
    return extend_prompt("a red kite", extension, pictures=pictures, seed=seed, runtime=CpuRuntime())


def test_a_local_model_extends_the_prompt_and_the_seed_decides_how(text_model: Path) -> None:
    first = extend(text_model)
    assert (first.problem, first.original) == ("", "a red kite")
    assert first.prompt not in {"", "a red kite"}
    assert extend(text_model) == first
    assert extend(text_model, seed=2).prompt != first.prompt


def test_what_torch_draws_next_does_not_depend_on_the_extension(text_model: Path) -> None:
    torch.manual_seed(5)
    plain = torch.rand(3)
    torch.manual_seed(5)
    extend(text_model)
    assert torch.equal(torch.rand(3), plain)


def test_the_model_is_a_component_of_its_phase_and_gone_after_it(text_model: Path) -> None:
    runtime = CpuRuntime()
    listener = Listener(runtime)
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        extend_prompt(
            "a kite",
            make_prompt_extension(model=str(text_model)),
            seed=1,
            runtime=runtime,
            observer=listener,
        )
        after = runtime.memory().allocated_bytes
    assert listener.ends == [("component", "qwen"), ("phase", "extend_prompt"), ("release", "qwen")]
    weights = 2 * 300 * 32 * 4  # its two largest tensors: tokens in and tokens out
    assert listener.allocated["component"] - before > weights
    assert after - before < weights / 10


def test_pictures_change_what_a_vision_model_says(vision_model: Path) -> None:
    red, blue = np.full((64, 96, 3), (255, 0, 0), np.uint8), np.full((80, 40, 3), (0, 0, 255), np.uint8)
    answers = [extend(vision_model, pictures=pictures) for pictures in ((red,), (blue,), (red, blue), (blue, red))]
    assert [answer.problem for answer in answers] == [""] * 4
    assert len({answer.prompt for answer in answers}) == 4
    assert extend(vision_model).problem == ""


def test_the_tokens_of_a_picture_are_as_many_as_its_patches_after_merging(vision_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from wan21.events import SILENT
    from wan21.prompt.local_qwen import FEWEST_PIXELS, MOST_PIXELS, PICTURE_TOKEN, LocalQwen

    picture = np.zeros((1000, 3000, 3), np.uint8)
    writer = LocalQwen(str(vision_model), CpuRuntime(), SILENT)
    writer._tokenizer = AutoTokenizer.from_pretrained(vision_model)
    writer._model = AutoModelForImageTextToText.from_pretrained(vision_model)
    inputs = writer._inputs("be brief", "a kite", [picture])
    t, h, w = inputs["image_grid_thw"][0].tolist()
    num_tokens = int(inputs["mm_token_type_ids"].sum())
    assert num_tokens == t * h * w // 4
    assert FEWEST_PIXELS <= num_tokens * PICTURE_TOKEN <= MOST_PIXELS
    assert w / h == pytest.approx(3, rel=0.05)
    assert len(inputs["pixel_values"]) == t * h * w


def test_a_model_that_sees_no_pictures_leaves_the_original_prompt(text_model: Path) -> None:
    extended = extend(text_model, pictures=(np.zeros((64, 96, 3), np.uint8),))
    assert extended.prompt == "a red kite"
    assert "sees no pictures" in extended.problem
    assert "QwenVL2.5_7B" in extended.advice


def test_a_damaged_folder_leaves_the_original_prompt(text_model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in text_model.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:100])
    extended = extend(damaged)
    assert extended.prompt == "a red kite"
    assert extended.problem
    assert extended.advice


def test_memory_that_runs_out_leaves_the_original_prompt_and_an_empty_device(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen2ForCausalLM

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", fail)
    runtime = CpuRuntime()
    with runtime.counting():
        before = runtime.memory().allocated_bytes
        extended = extend_prompt("a kite", make_prompt_extension(model=str(text_model)), seed=1, runtime=runtime)
        assert runtime.memory().allocated_bytes - before < 10_000
    assert extended.prompt == "a kite"
    assert "out of memory" in extended.problem
    assert "smaller" in extended.advice


def test_ctrl_c_passes_and_the_model_is_released(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen2ForCausalLM

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", interrupt)
    listener = Listener(runtime := CpuRuntime())
    extension = make_prompt_extension(model=str(text_model))
    with pytest.raises(KeyboardInterrupt):
        extend_prompt("a kite", extension, seed=1, runtime=runtime, observer=listener)
    assert listener.ends[-1] == ("release", "qwen")


def test_short_names_stand_for_repositories_and_defaults_follow_the_pictures() -> None:
    assert repository(make_prompt_extension().model) == "Qwen/Qwen2.5-14B-Instruct"
    assert repository(make_prompt_extension(has_pictures=True).model) == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert repository("QwenVL2.5_3B") == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert repository("Someone/Else") == "Someone/Else"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "oracle"}, "prompt_extend_method=oracle is not known; choose local_qwen, dashscope"),
        ({"target_lang": "fr"}, "prompt_extend_target_lang=fr is not known; choose zh, en"),
        ({"model": "./nowhere"}, "prompt_extend_model=./nowhere is not a folder"),
        ({"model": "Qwen2.5_7B", "has_pictures": True}, "sees no pictures.*QwenVL2.5_3B or QwenVL2.5_7B"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_prompt_extension(**settings)


def test_a_missing_transformers_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(MissingPackageError, match=r"pip install 'wan-sweep\[prompt\]'"):
        make_prompt_extension()


def test_instructions_differ_by_language_pictures_and_task() -> None:
    told = {
        instruction(language, num_pictures=num_pictures, is_image=False)
        for language in LANGUAGES
        for num_pictures in (0, 1, 2)
    }
    assert len(told) == 6
    for language, still, camera in (("en", "still", "camera"), ("zh", "静态", "镜头")):
        image = instruction(language, num_pictures=0, is_image=True)
        assert still in image
        assert camera not in image
        assert camera in instruction(language, num_pictures=0, is_image=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_model_leaves_nothing_behind_and_the_seed_decides(text_model: Path) -> None:
    runtime = CudaRuntime(0)
    runtime.warm_up()
    extension = make_prompt_extension(model=str(text_model))

    def prompt(seed: int) -> str:
        return extend_prompt("a kite", extension, seed=seed, runtime=runtime).prompt

    first = prompt(1)
    before = runtime.memory()
    state = torch.cuda.get_rng_state()
    assert prompt(1) == first
    assert prompt(2) != first
    after = runtime.memory()
    assert after.allocated_bytes == before.allocated_bytes
    assert after.reserved_bytes == before.reserved_bytes
    assert torch.equal(torch.cuda.get_rng_state(), state)
