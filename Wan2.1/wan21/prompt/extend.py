"""The phase "extend_prompt": before anything of Wan2.1 is loaded, and gone from the device when it ends.

Letters: H, W of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wan21.events import SILENT, Observer, Span
from wan21.prompt.dashscope import DashScope
from wan21.prompt.instructions import instruction
from wan21.prompt.local_qwen import LocalQwen
from wan21.prompt.settings import PromptExtension
from wan21.prompt.writer import ExtensionError, Writer
from wan21.runtime import Runtime

LONGEST_PROBLEM = 300
QUOTES = ('""', "''", "“”", "‘’", "「」")  # noqa: RUF001  # models like to put an answer into them


@dataclass(frozen=True, kw_only=True)
class ExtendedPrompt:
    """What came out.

    prompt: to generate from: the extended one, or the original where there was a problem.
    original: what the user gave.
    problem: why the prompt was not extended; empty if it was.
    advice: what the user can do about it.
    """

    prompt: str
    original: str
    problem: str = ""
    advice: str = ""


def extend_prompt(
    prompt: str,
    extension: PromptExtension,
    *,
    pictures: Sequence[np.ndarray] = (),
    is_image: bool = False,
    seed: int,
    runtime: Runtime,
    observer: Observer = SILENT,
) -> ExtendedPrompt:
    """The prompt written out by a language model, or as it was with the reason.

    Whatever goes wrong on the way is no error of the run, memory that runs out included: the original prompt will do.

    Args:
        prompt: what the user gave.
        extension: who extends it.
        pictures: that the task begins from, [H, W, 3] in uint8: first frame, or first and last.
        is_image: whether an image is made.
        seed: of the model's choices; the same seed gives the same words from a local model.
        runtime: where a local model computes.
        observer: hears of the phase, and of a local model's load and release.
    """
    writer: Writer
    if extension.method == "dashscope":
        writer = DashScope(extension.model)
    else:
        writer = LocalQwen(extension.model, runtime, observer)
    told = instruction(extension.target_lang, num_pictures=len(pictures), is_image=is_image)
    try:
        with observer.span(Span(kind="phase", name="extend_prompt")):
            return _ask(writer, told, prompt, pictures, seed)
    finally:
        writer.close()


def _ask(writer: Writer, told: str, prompt: str, pictures: Sequence[np.ndarray], seed: int) -> ExtendedPrompt:
    try:
        answer = _plain(writer.write(told, prompt, pictures, seed))
    except ExtensionError as error:
        problem, advice = str(error), error.advice
    except Exception as error:  # noqa: BLE001  # of transformers, its hub, or the model: any of it leaves the original
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_PROBLEM]
        advice = "see that prompt_extend_model can be read and fits the device, or choose a smaller one"
    else:
        if answer:
            return ExtendedPrompt(prompt=answer, original=prompt)
        problem, advice = "the answer was empty", "choose another seed or prompt_extend_model"
    return ExtendedPrompt(prompt=prompt, original=prompt, problem=problem, advice=advice)


def _plain(answer: str) -> str:
    """An answer in one line, without quotes around it."""
    words = " ".join(answer.split())
    for quotes in QUOTES:
        if len(words) > 1 and (words[0], words[-1]) == tuple(quotes) and quotes[0] not in words[1:-1]:
            return words[1:-1].strip()
    return words
