"""Who extends a prompt and in which language, checked before anything starts. No torch in here.

Reference: names, defaults and limits of Wan2.1's prompt extension; its instructions are not used.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from wan21.errors import MissingPackageError, UsageError, one_of

Method = Literal["local_qwen", "dashscope"]
Language = Literal["zh", "en"]

METHODS: tuple[str, ...] = get_args(Method)
LANGUAGES: tuple[str, ...] = get_args(Language)

TEXT_MODELS = {f"Qwen2.5_{size}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("3B", "7B", "14B")}
VISION_MODELS = {f"QwenVL2.5_{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B")}
DEFAULT_MODELS = {
    ("local_qwen", False): "Qwen2.5_14B",
    ("local_qwen", True): "QwenVL2.5_7B",
    ("dashscope", False): "qwen-plus",
    ("dashscope", True): "qwen-vl-max",
}
"""By method, and by whether pictures are shown to the model."""

KEY_VARIABLE = "DASH_API_KEY"
URL_VARIABLE = "DASH_API_URL"
DEFAULT_URL = "https://dashscope.aliyuncs.com/api/v1"
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
EXTRA = "wan-sweep[prompt]"


@dataclass(frozen=True, kw_only=True)
class PromptExtension:
    """Who extends the prompt, and in which language it answers. Build it with `make_prompt_extension`.

    model: of DashScope, or for local_qwen a short name of TEXT_MODELS or VISION_MODELS, a folder, or a repository.
    """

    method: Method
    model: str
    target_lang: Language


def make_prompt_extension(
    *,
    method: str = "local_qwen",
    model: str | None = None,
    target_lang: str = "zh",
    has_pictures: bool = False,
) -> PromptExtension:
    """Checked settings; None as the model means the method's default.

    Args:
        method: local_qwen runs a model on this machine; dashscope asks a service, with the key in DASH_API_KEY.
        model: see PromptExtension.
        target_lang: zh or en, the language of the extended prompt.
        has_pictures: whether the task begins from pictures, which are then shown to the model.

    Raises:
        UsageError: an unknown value, a model that sees no pictures, a folder that is not there, no key, or an
            address to which a key must not be sent.
        MissingPackageError: local_qwen without transformers.
    """
    one_of("prompt_extend_method", method, METHODS)
    one_of("prompt_extend_target_lang", target_lang, LANGUAGES)
    model = model or DEFAULT_MODELS[method, has_pictures]
    if method == "dashscope":
        api_key()
        api_url()
    else:
        _check_local(model, has_pictures=has_pictures)
    return PromptExtension(method=method, model=model, target_lang=target_lang)  # type: ignore[arg-type]


def _check_local(model: str, *, has_pictures: bool) -> None:
    if has_pictures and model in TEXT_MODELS:
        raise UsageError(
            f"prompt_extend_model={model} sees no pictures, which this task begins from; "
            f"choose {' or '.join(VISION_MODELS)}"
        )
    if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
        raise UsageError(
            f"prompt_extend_model={model} is not a folder; give one in Hugging Face's layout, the name of a "
            f"repository there, or one of {', '.join((*TEXT_MODELS, *VISION_MODELS))}"
        )
    if importlib.util.find_spec("transformers") is None:
        raise MissingPackageError(
            f"prompt_extend_method=local_qwen needs the package transformers; install it with "
            f"pip install '{EXTRA}', or choose prompt_extend_method=dashscope"
        )


def repository(model: str) -> str:
    """The folder or repository of a local model."""
    known = TEXT_MODELS | VISION_MODELS
    return known.get(model) or (str(Path(model).expanduser()) if model.startswith("~") else model)


def api_key() -> str:
    """The key of DashScope. It goes into the request's header and nowhere else.

    Raises:
        UsageError: there is none, or it could not stand in a header.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise UsageError(
            f"prompt_extend_method=dashscope needs a key: set the environment variable {KEY_VARIABLE}, "
            "or choose prompt_extend_method=local_qwen"
        )
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{KEY_VARIABLE} holds characters that no key has; set it again")
    return key


def api_url() -> str:
    """The address of DashScope's API, without a slash at its end.

    Raises:
        UsageError: it is no address, or would carry the key unencrypted to another machine.
    """
    url = os.environ.get(URL_VARIABLE, "").strip().rstrip("/") or DEFAULT_URL
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.username is not None or parts.scheme not in {"https", "http"}:
        raise UsageError(f"{URL_VARIABLE} is not an address such as {DEFAULT_URL}; set it again, or unset it")
    if parts.scheme == "http" and host not in THIS_MACHINE:
        raise UsageError(f"{URL_VARIABLE} would send the key unencrypted to {host}; use https")
    return url
