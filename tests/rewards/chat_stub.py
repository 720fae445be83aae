"""An OpenAI-compatible service on this machine: answers each request by the next of `replies`."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a reply may be: a function of the request's body to the model's text, or a raw answer.
Reply = Callable[[dict[str, Any]], str] | tuple[int, dict[str, str], bytes] | str


class Service:
    def __init__(self) -> None:
        self.replies: list[Reply] = []  # the last one stands for all further requests
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.url = ""
        self.closing = threading.Event()


def nonce_of(body: dict[str, Any]) -> str:
    return re.findall(r"VERDICT-(\w+): CORRECT", body["messages"][0]["content"])[0]


def says(word: str) -> Callable[[dict[str, Any]], str]:
    return lambda body: f"The results agree.\nVERDICT-{nonce_of(body)}: {word}"


def completion(text: Any, finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps({"choices": [choice | {"finish_reason": finish}]}).encode()


@contextmanager
def serving() -> Iterator[Service]:
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            service.requests.append((self.path, dict(self.headers), json.loads(data)))
            turn = min(len(service.requests), len(service.replies)) - 1
            reply = service.replies[turn]
            if reply == "hang":
                service.closing.wait(30)
            elif reply == "hang up":
                self.close_connection = True
            elif reply == "trickle":
                self._trickle()
            elif isinstance(reply, tuple):
                self._send(*reply)
            else:
                assert callable(reply)
                self._send(200, {}, completion(reply(service.requests[-1][2])))

        def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def _trickle(self) -> None:
            self._send(200, {"Content-Length": "10000"}, b"")
            try:
                while not service.closing.is_set():
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:  # the other side hung up
                return

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield service
    finally:
        service.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
