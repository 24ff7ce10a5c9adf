"""A prompt extended by a language model on this machine, run by transformers.

Models that see pictures are given them without transformers' processor, which asks for torchvision: the picture's
patches come from the image processor, and the prompt holds one placeholder for each token that they become.

Letters: L tokens.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from wan21.events import Observer, Span
from wan21.prompt.settings import VISION_MODELS, repository
from wan21.prompt.writer import MOST_NEW_TOKENS, ExtensionError
from wan21.runtime import Runtime

COMPONENT = "qwen"
PICTURE_TOKEN = 28 * 28
"""Pixels of a picture that become one token."""
FEWEST_PIXELS, MOST_PIXELS = 256 * PICTURE_TOKEN, 1280 * PICTURE_TOKEN
PICTURE_START, PICTURE_PAD, PICTURE_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


class LocalQwen:
    """Loads a model, asks it, and lets it go.

    Args:
        model: a short name, a folder or a repository (`settings.PromptExtension`).
        runtime: where it computes.
        observer: hears of the model's load, as the component "qwen", and of its release.
    """

    def __init__(self, model: str, runtime: Runtime, observer: Observer) -> None:
        self._name = repository(model)
        self._runtime = runtime
        self._observer = observer
        self._model: Any = None

    def write(self, instruction: str, prompt: str, pictures: Sequence[np.ndarray], seed: int) -> str:
        """The answer: the same for the same seed, and torch's own generators are left as they were.

        Raises:
            ExtensionError: pictures, and a model that sees none.
        """
        with _quiet():
            model = self._loaded(has_pictures=bool(pictures))
            inputs = self._inputs(instruction, prompt, pictures)
            device = self._runtime.device
            with _seeded(seed, device), torch.no_grad():
                ids = model.generate(
                    **{name: value.to(device) for name, value in inputs.items()},
                    max_new_tokens=MOST_NEW_TOKENS,
                    do_sample=True,
                )
            return str(self._tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    def close(self) -> None:
        """Takes the model off the device."""
        is_there = self._model is not None
        with self._observer.span(Span(kind="release", name=COMPONENT)) if is_there else nullcontext():
            self._runtime.synchronize()
            self._model = None
            gc.collect()  # such models hold themselves in circles, one whose load failed as well
            self._runtime.empty_cache()

    def _loaded(self, *, has_pictures: bool) -> Any:  # noqa: ANN401  # transformers carries no types
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

        sees_pictures = hasattr(AutoConfig.from_pretrained(self._name), "vision_config")
        if has_pictures and not sees_pictures:
            raise ExtensionError(
                f"{self._name} sees no pictures", f"choose prompt_extend_model={' or '.join(VISION_MODELS)}"
            )
        self._tokenizer = AutoTokenizer.from_pretrained(self._name)
        kind = AutoModelForImageTextToText if sees_pictures else AutoModelForCausalLM
        with self._observer.span(Span(kind="component", name=COMPONENT)):
            self._model = kind.from_pretrained(self._name, dtype="auto").eval().to(self._runtime.device)
        return self._model

    def _inputs(self, instruction: str, prompt: str, pictures: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """What the model takes: input_ids and attention_mask [1, L], and what it needs to know of the pictures."""
        seen = self._patches(pictures) if pictures else {}
        merge = self._model.config.vision_config.spatial_merge_size**2 if pictures else 1
        places = "".join(
            f"{PICTURE_START}{PICTURE_PAD * (int(grid.prod()) // merge)}{PICTURE_END}"
            for grid in seen.get("image_grid_thw", ())
        )
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": places + prompt}]
        # A model that can think aloud first is told not to; templates of others do not look at it.
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        inputs = dict(self._tokenizer([text], return_tensors="pt"))
        if pictures:
            pad = self._tokenizer.convert_tokens_to_ids(PICTURE_PAD)
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == pad).int()
        return inputs | seen

    def _patches(self, pictures: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """pixel_values, and image_grid_thw [pictures, 3]: patches of each along time, height and width."""
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(
            self._name, backend="pil", min_pixels=FEWEST_PIXELS, max_pixels=MOST_PIXELS
        )
        return dict(processor(images=list(pictures), input_data_format="channels_last", return_tensors="pt"))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's own generators, which transformers draws from, start from the seed inside and are put back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and remarks off the terminal, which shows the job's own progress."""
    from transformers.utils import logging as theirs

    level, has_bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if has_bars:
            theirs.enable_progress_bar()
