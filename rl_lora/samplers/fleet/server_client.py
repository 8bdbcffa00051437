"""HTTP requests to one `vllm serve`: limits in time and size, and one kind of error."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from dataclasses import dataclass
from typing import Any

import httpx

from rl_lora.samplers.fleet.replica import ReplicaError

API_KEY = "VLLM_API_KEY"  # environment variable, also vLLM's own
# A busy learner may not get to see for seconds that a connection is there.
CONNECT_S = 60.0
CONTROL_S = 60.0  # for an answer about the server itself
LOAD_S = 600.0  # for reading an adapter from a shared file system
CONTROL_BYTES = 4 * 2**20  # of an answer about the server itself
_MAX_SHOWN = 300  # characters of what a server says


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered.

    Example: Answer(url="http://node7:8000/version", status=200, body=b'{"version":"0.32.0"}')
    """

    url: str
    status: int
    body: bytes

    @property
    def is_ok(self) -> bool:
        """Whether the server did what it was asked."""
        return self.status == 200

    def json(self) -> dict[str, Any]:
        """The body's object. Raises ReplicaError if the server did not answer with one."""
        if not self.is_ok:
            raise ReplicaError(f"{self.url} answered {self.described()}")
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise ReplicaError(f"{self.url} answered no JSON: {_shown(self.body)}") from error
        if not isinstance(found, dict):
            raise ReplicaError(f"{self.url} answered no JSON object: {_shown(self.body)}")
        return found

    def shown(self) -> str:
        """The beginning of the body, in one printable line."""
        return _shown(self.body)

    def described(self) -> str:
        """Status and reason of a refusal, as in vLLM's, FastAPI's or another error, in one line."""
        reason: Any = None
        try:
            found = json.loads(self.body)
            error = found.get("error", found.get("detail"))
            reason = error.get("message") if isinstance(error, dict) else error
        except (ValueError, RecursionError, AttributeError):
            pass  # another server's page of HTML, say
        return f"{self.status}: {_shown(str(reason).encode() if reason else self.body)}"


class ServerClient:
    """Talks to one server; to be made, used and closed in one event loop.

    The API key is sent with each request, and is in no message. Proxies and passwords of the
    environment (HTTP_PROXY, .netrc) are not used.

    Args:
        url: http://HOST:PORT, maybe with a path that vLLM's own follow.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        key = os.environ.get(API_KEY)
        self._http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            # Each connection is used once: a kept one fails where the server is just closing it.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
            verify=ssl.create_default_context() if url.startswith("https:") else False,
        )

    async def get(self, path: str) -> Answer:
        """Raises ReplicaError as `post`."""
        return await self._send("GET", path, None, CONTROL_S, CONTROL_BYTES)

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        *,
        limit_s: float | None = CONTROL_S,
        max_bytes: int = CONTROL_BYTES,
    ) -> Answer:
        """The answer to a JSON body, whatever its status.

        Args:
            path: from "/".
            body: sent as JSON.
            limit_s: for the whole answer; None: the caller watches the server's progress.
            max_bytes: of the answer.

        Raises:
            ReplicaError: there is no answer, or a longer one.
        """
        return await self._send("POST", path, body, limit_s, max_bytes)

    async def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        limit_s: float | None,
        max_bytes: int,
    ) -> Answer:
        url, content = self.url + path, bytearray()
        try:
            async with (
                asyncio.timeout(limit_s),
                self._http.stream(method, url, json=body) as response,
            ):
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > max_bytes:
                        raise ReplicaError(f"{url} answers with more than {max_bytes:,} bytes")
            return Answer(url, response.status_code, bytes(content))
        except TimeoutError as error:
            raise ReplicaError(f"{url} gave no answer for {limit_s:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            what = str(error) or type(error).__name__
            raise ReplicaError(f"{url} does not answer: {what}") from error

    async def close(self) -> None:
        """Ends all connections."""
        await self._http.aclose()


def _shown(body: bytes) -> str:
    """The beginning of what a server says, in one printable line."""
    text = body[: 4 * _MAX_SHOWN].decode("utf-8", errors="replace")
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text[:_MAX_SHOWN] + "..." * (len(text) > _MAX_SHOWN) if text else "nothing"
