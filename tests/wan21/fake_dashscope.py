"""A server on this machine that answers like DashScope, or badly."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD_KEY = "sk-good-0123456789abcdef"
ANSWER = "A red paper kite climbs over a windy harbour, seen from the quay in warm evening light."


@dataclass
class FakeDashScope:
    """What it was asked, and how it answers: an item of `plan` for each request, the last one for all further ones.

    An item is an HTTP status, raw bytes as the whole body, "hang" (no answer), "drop" (the connection ends), or
    "redirect" (to another path of the same server).
    """

    url: str = ""
    plan: list[int | bytes | str] = field(default_factory=lambda: [200])
    requests: list[dict[str, Any]] = field(default_factory=list)
    answer: str = ANSWER


def _content(fake: FakeDashScope, path: str) -> str | list[dict[str, str]]:
    return [{"text": fake.answer}] if "multimodal" in path else fake.answer


class _Server(ThreadingHTTPServer):
    """Knows what it pretends to be."""

    fake: FakeDashScope
    released: threading.Event


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Authorization"].removeprefix("Bearer ")
        self.server.fake.requests.append({"path": self.path, "key": key, "body": body})
        plan, requests = self.server.fake.plan, self.server.fake.requests
        self._answer(plan[min(len(requests), len(plan)) - 1], key)

    def do_GET(self) -> None:
        """Where a redirection would lead."""
        self.server.fake.requests.append({"path": self.path, "key": self.headers["Authorization"], "body": None})
        self._send(200, b"{}")

    def _answer(self, how: int | bytes | str, key: str) -> None:
        if how == "hang":
            self.server.released.wait(30)
        elif how == "drop":
            self.close_connection = True
        elif how == "redirect":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
        elif isinstance(how, bytes):
            self._send(200, how)
        elif how == 200 and key == GOOD_KEY:
            message = {"role": "assistant", "content": _content(self.server.fake, self.path)}
            choices = [{"finish_reason": "stop", "message": message}]
            self._send(200, json.dumps({"output": {"choices": choices}, "request_id": "1"}).encode())
        else:
            status = 401 if how == 200 else how
            told = {"code": "InvalidApiKey", "message": f"Invalid API-key provided: {key}.", "request_id": "1"}
            self._send(int(status), json.dumps(told).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keeps the terminal clean."""


@contextmanager
def serving() -> Iterator[FakeDashScope]:
    """The server, while inside."""
    fake, released = FakeDashScope(), threading.Event()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.fake, server.released = fake, released
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/api/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()
