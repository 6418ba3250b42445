"""A proxy before a real S3 server that answers some requests as a bad day on S3 would.

Requests go on with the Host header and everything else that was signed as it came, so that the
server finds the signatures right.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("error", "slow_down", "reset", "lost", "truncated", "delay")
_ANSWERS = {
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "denied": (403, "AccessDenied", "Access Denied."),
    "chatty": (400, "InvalidRequest", "Invalid."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "unknown": (501, "NotImplemented", "A header you provided implies functionality."),
}


class FaultyS3(ThreadingHTTPServer):
    """Forwards to `upstream`, and does to some requests one of these:

    error, slow_down: answer 500 or 503; the server never sees the request.
    reset: break the connection; the server never sees the request.
    lost: break the connection after the server has done what was asked.
    truncated: break it in the middle of the answer's body (without a body: as `lost`).
    delay: answer late.
    denied, chatty (only where asked for): answer 403 or 400 and repeat the request's headers.

    Whether a request is hit depends on the seed, its name, and how often that name was asked for;
    not on how threads take turns.

    Beside these, all requests:

    expired: with one of these access keys are answered ExpiredToken.
    conditions: a PUT with If-Match or If-None-Match is answered 501 ("refused"), or as if it had
        been done where its condition fails ("ignored").
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        upstream: str,
        *,
        probability: float = 0.0,
        seed: int = 0,
        faults: Sequence[str] = FAULTS,
        delay: float = 0.3,
        conditions: str = "kept",
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.probability = probability
        self.faults = tuple(faults)
        self.delay = delay
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.last_authorization = ""
        self.on_request: Callable[[str, str], None] | None = None
        self.conditions = conditions
        self.expired: set[str] = set()
        self.headers: dict[str, dict[str, str]] = {}  # of the last request of each method
        self._seed = seed
        self._asked: Counter[str] = Counter()
        self._down_until = 0.0
        self._lock = threading.Lock()

    def outage(self, seconds: float) -> None:
        """Break every connection, without asking the server, until `seconds` have passed."""
        self._down_until = time.monotonic() + seconds

    def fault_for(self, method: str, path: str) -> str | None:
        """What to do to this request; None is to forward it."""
        with self._lock:
            self.requests[method] += 1
            name = f"{method} {path.partition('?')[0]}"
            self._asked[name] += 1
            draw = random.Random(f"{self._seed} {name} {self._asked[name]}")
            fault = None
            if time.monotonic() < self._down_until:
                fault = "outage"
            elif draw.random() < self.probability:
                fault = draw.choice(self.faults)
            if fault is not None:
                self.injected[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are nothing to report here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.on_request is not None:
            self.server.on_request(self.command, self.path)
        self.server.last_authorization = self.headers.get("Authorization", "")
        self.server.headers[self.command] = dict(self.headers)
        fault = self.server.fault_for(self.command, self.path)
        if any(f"={key}/" in self.server.last_authorization for key in self.server.expired):
            fault = "expired"
        conditional = self.command == "PUT" and {"If-Match", "If-None-Match"} & {*self.headers}
        if conditional and self.server.conditions == "refused":
            fault = "unknown"
        if fault in _ANSWERS:
            self._refuse(*_ANSWERS[fault])
        elif fault in {"reset", "outage"}:
            self._break()
        else:
            if fault == "delay":
                time.sleep(self.server.delay)
            status, headers, data = self._forward(body)
            if conditional and self.server.conditions == "ignored" and status == 412:
                status, headers, data = 200, [], b""
            if fault == "lost" or (fault == "truncated" and not data):
                self._break()
                return
            self._answer(status, headers, data[: len(data) // 2] if fault == "truncated" else data)
            if fault == "truncated":
                self._break()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"connection", "expect"}:
                connection.putheader(name, value)
        connection.endheaders(body or None)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, response.getheaders(), data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        named = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in {"transfer-encoding", "connection"}:
                self.send_header(name, value)
        if "content-length" not in named and status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        if status in {400, 403}:
            message += f" {self.headers}"
        xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(xml)))]
        self._answer(status, headers, xml.encode())

    def _break(self) -> None:
        # With nothing to linger for, closing sends a reset.
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Silence; the server's counts say what happened."""


@contextmanager
def faulty_s3(upstream: str, **options: Any) -> Iterator[FaultyS3]:
    """A `FaultyS3` that runs until the block ends."""
    server = FaultyS3(upstream, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
