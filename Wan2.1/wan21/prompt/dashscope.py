"""A prompt extended by DashScope, Alibaba Cloud's service, through its HTTP interface.

The key stands in the header of the request and nowhere else: not in what is raised, also where a server repeats it, and
no redirection carries it to another machine.

Reference: DashScope's HTTP interface, text-generation and multimodal-generation.
"""

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np

from wan21.prompt.settings import KEY_VARIABLE, URL_VARIABLE, api_key, api_url
from wan21.prompt.writer import MOST_NEW_TOKENS, ExtensionError

TEXT_SERVICE = "services/aigc/text-generation/generation"
PICTURE_SERVICE = "services/aigc/multimodal-generation/generation"
NUM_ATTEMPTS = 4
TIMEOUT_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 1.0
MOST_PIXELS = 512 * 512
"""Of a picture that is sent along; it is made smaller beforehand."""
MOST_ANSWER_BYTES = 2**20
LONGEST_PROBLEM = 300
SEED_RANGE = 2**31

_PASSING = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
"""What another attempt may mend."""


class _PassingError(Exception):
    """Another attempt may succeed."""


class _StayHere(HTTPRedirectHandler):
    """Follows no redirection, since the key would go along."""

    def redirect_request(
        self,
        req: Request,  # noqa: ARG002  # urllib's signature
        fp: IO[bytes],  # noqa: ARG002
        code: int,  # noqa: ARG002
        msg: str,  # noqa: ARG002
        headers: Message,  # noqa: ARG002
        newurl: str,  # noqa: ARG002
    ) -> None:
        return None


class DashScope:
    """Asks the service.

    Args:
        model: its name there.
        timeout_seconds: how long one attempt may wait for an answer.
        sleep: waits between attempts.

    Raises:
        UsageError: no key, or an address to which it must not be sent.
    """

    def __init__(
        self, model: str, *, timeout_seconds: float = TIMEOUT_SECONDS, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._model = model
        self._key = api_key()
        self._url = api_url()
        self._timeout_seconds = timeout_seconds
        self._sleep = sleep
        self._opener = build_opener(_StayHere)

    def write(self, instruction: str, prompt: str, pictures: Sequence[np.ndarray], seed: int) -> str:
        """The answer.

        Raises:
            ExtensionError: the service refused, gave no answer in several attempts, or one that is none.
        """
        system, user = (_parts(text, pictures) for text, pictures in ((instruction, ()), (prompt, pictures)))
        body = {
            "model": self._model,
            "input": {
                "messages": [
                    {"role": "system", "content": system if pictures else instruction},
                    {"role": "user", "content": user if pictures else prompt},
                ]
            },
            "parameters": {"result_format": "message", "seed": seed % SEED_RANGE, "max_tokens": MOST_NEW_TOKENS},
        }
        request = Request(  # noqa: S310  # the address was checked: https, or http to this machine
            f"{self._url}/{PICTURE_SERVICE if pictures else TEXT_SERVICE}",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
            method="POST",
        )
        return _text_of(self._send(request))

    def close(self) -> None:
        """Nothing of it is on the device."""

    def _send(self, request: Request) -> bytes:
        """What came back, in a few attempts."""
        for attempt in range(NUM_ATTEMPTS):
            try:
                return self._attempt(request)
            except _PassingError as error:
                problem = str(error)
            if attempt + 1 < NUM_ATTEMPTS:
                self._sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise ExtensionError(
            f"DashScope gave no answer in {NUM_ATTEMPTS} attempts: {problem}",
            f"see that {urlsplit(self._url).hostname} can be reached, or set {URL_VARIABLE}",
        )

    def _attempt(self, request: Request) -> bytes:
        try:
            with self._opener.open(request, timeout=self._timeout_seconds) as answer:
                return bytes(answer.read(MOST_ANSWER_BYTES))
        except HTTPError as error:
            with error:
                problem = f"HTTP status {error.code}{self._told(error)}"
            if error.code in _PASSING:
                raise _PassingError(problem) from None
            raise ExtensionError(f"DashScope refused: {problem}", _advice(error.code)) from None
        except TimeoutError:
            raise _PassingError(f"no answer within {self._timeout_seconds:g} s") from None
        except (URLError, HTTPException, OSError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            words = f"no answer within {self._timeout_seconds:g} s" if isinstance(reason, TimeoutError) else str(reason)
            raise _PassingError(self._without_key(words or type(error).__name__)) from None

    def _told(self, error: HTTPError) -> str:
        """The service's own code and message, if its answer holds them."""
        try:
            told = json.loads(error.read(MOST_ANSWER_BYTES))
            words = ": ".join(str(told[name]) for name in ("code", "message") if told.get(name))
        except (ValueError, AttributeError, OSError, HTTPException):
            return ""
        return f" ({self._without_key(words)[:LONGEST_PROBLEM]})" if words else ""

    def _without_key(self, words: str) -> str:
        return " ".join(words.replace(self._key, "***").split())


def _advice(status: int) -> str:
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return f"see that the key in {KEY_VARIABLE} is valid, belongs to this region, and may use the model"
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        return f"set {URL_VARIABLE} to the address itself; a redirection is not followed, since the key would go along"
    return "see that prompt_extend_model is a model of the service that takes such a request"


def _parts(text: str, pictures: Sequence[np.ndarray]) -> list[dict[str, str]]:
    """A message's content where pictures may stand in it."""
    return [*({"image": _data_url(picture)} for picture in pictures), {"text": text}]


def _data_url(pixels: np.ndarray) -> str:
    """A picture as text: a PNG of at most MOST_PIXELS pixels."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    scale = (MOST_PIXELS / (picture.width * picture.height)) ** 0.5
    if scale < 1:
        picture = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _text_of(answer: bytes) -> str:
    """The text in an answer: plain, or in parts where pictures were shown."""
    try:
        content: Any = json.loads(answer)["output"]["choices"][0]["message"]["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content if "text" in part)
    except (ValueError, LookupError, TypeError) as error:
        raise ExtensionError(
            f"DashScope's answer is not of the known form ({type(error).__name__})",
            f"see that {URL_VARIABLE} is DashScope's own address",
        ) from None
    return text
