"""`rl-lora report --watch`: the page on localhost, rebuilt when the run's files change.

The browser polls `version`; when it changes, the browser fetches `data` and redraws in place, which
keeps filters, zoom and scroll position.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from rl_lora.errors import UserError
from rl_lora.report.build import build_page
from rl_lora.report.page import Page, to_html

HOST = "127.0.0.1"
PORT = 8000  # if it is taken and the user gave none: any free port
_POLL_S = 1.0  # between looks at the files
_BUSY_FACTOR = 5  # pause after a build, in units of its duration: a sixth of a core at most


class LiveReport:
    """The newest page of the runs, read by the server's threads.

    Raises:
        UserError: a folder is not a run's.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._state: object = None  # of the files, at the last build
        self.built: tuple[Page, bytes, str]  # the page being served, its JSON and its version
        self.problem = ""
        self.refresh()
        if self.problem:
            raise UserError(self.problem)

    def refresh(self) -> bool:
        """Rebuilds the page if files have changed; returns whether it did.

        If a record is damaged right now the page stays as it is, and `problem` says why.
        """
        state = self._look()
        if state == self._state:
            return False
        self._state, self.problem = state, ""
        try:
            self.built = *build_page(self._folders), str(time.time_ns())
        except UserError as error:
            self.problem = str(error)
        return not self.problem

    def _look(self) -> list[tuple[str, int, int]]:
        """(path, size, modification time) of the files that a report is built from."""
        found = []
        for folder in self._folders:
            for pattern in ("*.json", "*.jsonl*", "eval/*.json*"):
                for path in sorted(folder.glob(pattern)):
                    with contextlib.suppress(FileNotFoundError):  # replaced or deleted meanwhile
                        status = path.stat()
                        found.append((str(path), status.st_size, status.st_mtime_ns))
        return found


def make_server(report: LiveReport, port: int | None) -> ThreadingHTTPServer:
    """A server on localhost, not yet started; port None: PORT if it is free; 0: any free port.

    Raises:
        UserError: the given port is in use or not allowed.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            own_names = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}  # type: ignore[attr-defined]
            if self.headers.get("Host") not in own_names:
                # DNS rebinding: a site whose name resolves to this address must not read the page.
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            page, data, version = report.built
            match urlsplit(self.path).path:
                case "/":
                    html = to_html(page, data, live_version=version)
                    self._answer("text/html; charset=utf-8", html.encode())
                case "/version":
                    self._answer("text/plain", version.encode())
                case "/data":
                    self._answer("application/json", data)
                case _:
                    self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, content_type: str, body: bytes) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: every browser polls every two seconds."""

    try:
        return ThreadingHTTPServer((HOST, PORT if port is None else port), Handler)
    except (OSError, OverflowError) as error:
        if port is not None:
            raise UserError(
                f"port {port} cannot be used ({error}); choose another with --port"
            ) from error
    return ThreadingHTTPServer((HOST, 0), Handler)


def serve(folders: Sequence[Path], port: int | None = None) -> None:
    """Serves until Ctrl-C.

    Raises:
        UserError: a folder is not a run's, or the port is in use.
    """
    report, shown = LiveReport(folders), ""
    server = make_server(report, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://{HOST}:{server.server_port}/  (Ctrl-C stops)", flush=True)
    try:
        while True:
            start = time.monotonic()
            report.refresh()
            if report.problem and report.problem != shown:
                print(f"page not updated: {report.problem}", flush=True)
            shown = report.problem
            time.sleep(max(_POLL_S, _BUSY_FACTOR * (time.monotonic() - start)))
    except KeyboardInterrupt:
        print("stopped")
    finally:
        server.shutdown()
        server.server_close()
