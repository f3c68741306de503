"""The demo's HTTP server: one page and four questions, on loopback only, from this machine's browser only."""

from __future__ import annotations

import errno
import json
import math
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raptr_ds.errors import ConfigError, RaptrError
from raptr_ds.json_text import parse_json

if TYPE_CHECKING:  # transformers takes seconds to import: a port in use is reported before
    from raptr_ds.demo.model import DemoModel

ADDRESS = "127.0.0.1"
PORT = 8765
_NAMES = {ADDRESS, "localhost"}
_MOST_BYTES = 64 << 10  # of a request's body
_SILENT_SECONDS = 30.0  # after which a connection that sends nothing is closed
_MOST_NEW_TOKENS = 512
_PAGE = Path(__file__).with_name("page.html")
_NONCE = "{nonce}"


class _RefusedError(Exception):
    """A request that is not answered, and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class DemoServer(ThreadingHTTPServer):
    """Listens as soon as it is made; answers once it has a model.

    Raises: ConfigError if the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, port: int = PORT) -> None:
        if not 0 <= port < 1 << 16:
            raise ConfigError(f"--port {port}: give 1 to 65535, or 0 for any free one.")
        self.model: DemoModel | None = None
        self.turn = threading.Lock()  # of the model, which answers one question at a time
        self.ending = threading.Event()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror or error})"
            raise ConfigError(
                f"port {port} of {ADDRESS} {why}. Choose another with --port N, or --port 0 for any free one."
            ) from error

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def serve(self, model: DemoModel, announce: Callable[[], None] = lambda: None) -> None:
        """Announce it and answer until the process is interrupted (Ctrl-C), then let what is being answered end."""
        self.model = model
        try:
            announce()
            self.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self.ending.set()
            self.server_close()
            self.turn.acquire(timeout=_SILENT_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong in an answer, unless the browser has left or the server ends."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError) and not self.ending.is_set():
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request. Nothing in a path or a body is ever looked up on the disk."""

    server: DemoServer  # type: ignore[assignment]
    server_version, sys_version = "raptr_ds", ""
    timeout = _SILENT_SECONDS

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/api/model": lambda: self._json(self._model.about())})

    def do_POST(self) -> None:
        self._answer({"/api/fill": self._fill, "/api/losses": self._losses, "/api/complete": self._complete})

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: what is typed is nobody's business."""

    @property
    def _model(self) -> DemoModel:
        assert self.server.model is not None
        return self.server.model

    def _answer(self, known: Mapping[str, Callable[[], None]]) -> None:
        try:
            self._check_sender()
            if self.path not in known:
                raise _RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here")
            known[self.path]()
        except _RefusedError as refused:
            self._json({"error": str(refused)}, refused.status)
        except RaptrError as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except (ConnectionError, TimeoutError):  # the browser has left, as it does when the next question comes
            self.close_connection = True

    def _check_sender(self) -> None:
        """Refuse other sites' pages: by name, if theirs leads here (DNS rebinding), or by where they say they are."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in _NAMES and host not in _NAMES:
            raise _RefusedError(HTTPStatus.FORBIDDEN, f"open the page as {self.server.url}")
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise _RefusedError(HTTPStatus.FORBIDDEN, "another site asks")

    def _page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        body = _PAGE.read_text(encoding="utf-8").replace(_NONCE, nonce).encode()
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._head(HTTPStatus.OK, "text/html; charset=utf-8", len(body), {"Content-Security-Policy": policy})
        self.wfile.write(body)

    def _fill(self) -> None:
        asked = self._asked()
        hidden = asked.get("hidden", [])
        if not isinstance(hidden, list) or not all(type(number) is int for number in hidden):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "hidden: give a list of whole numbers")
        with self.server.turn:
            words = self._model.fill(_text(asked), hidden, _number(asked, "depth", int))
        self._json({"words": words})

    def _losses(self) -> None:
        text = _text(self._asked())
        with self.server.turn:
            losses = self._model.losses(text)
        self._json(losses)

    def _complete(self) -> None:
        from raptr_ds.hf.generation import Sampling

        asked = self._asked()
        text, mode, depth = _text(asked), str(asked.get("mode")), _number(asked, "depth", int)
        sampling = Sampling(_number(asked, "temperature", float, 0.0), seed=_number(asked, "seed", int, 0))
        most = min(_MOST_NEW_TOKENS, _number(asked, "max_new_tokens", int, 64))
        begun = False

        def write(piece: str) -> None:
            nonlocal begun
            if self.server.ending.is_set():
                raise ConnectionAbortedError
            if not begun:  # not before: what is wrong with the question has a status of its own
                self._head(HTTPStatus.OK, "application/x-ndjson; charset=utf-8")
                begun = True
            self.wfile.write(json.dumps({"text": piece}).encode() + b"\n")

        with self.server.turn:
            end = self._model.complete(text, mode, depth, sampling, most, write)
        self.wfile.write(json.dumps({"end": end}).encode() + b"\n")

    def _asked(self) -> dict[str, Any]:
        """Return the request's body. Raises: _RefusedError unless it is JSON, an object, and not too large."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "the request does not have its length")
        if int(length) > _MOST_BYTES:
            why = f"the text is too long: {_MOST_BYTES:,} bytes at most"
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        if self.headers.get_content_type() != "application/json":  # which other sites' pages cannot send
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the request is not JSON")
        try:
            asked = parse_json(self.rfile.read(int(length)))
        except ValueError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"the request is not JSON: {error}") from error
        if not isinstance(asked, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the request is not an object")
        return asked

    def _json(self, content: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        body = json.dumps(content).encode()
        self._head(status, "application/json; charset=utf-8", len(body))
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None, more: Mapping[str, str] = {}) -> None:
        """Begin a response; one without a length ends with the connection, as HTTP/1.0 has it."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in {
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            **more,
        }.items():
            self.send_header(name, value)
        self.end_headers()


def _text(asked: Mapping[str, Any]) -> str:
    text = asked.get("text")
    if not isinstance(text, str):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "text: give a string")
    return text


def _number(asked: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = asked.get(key, default)
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        is_number = False
    if not is_number or kind(value) != value:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"{key}: give a {'whole ' if kind is int else ''}number")
    return kind(value)
