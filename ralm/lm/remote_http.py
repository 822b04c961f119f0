"""Talking to a server: one request, one clear line when it fails. Keys are never shown, redirects never followed."""

from __future__ import annotations

import email.utils
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ralm.errors import RalmError, UsageError, need

AGAIN = (429, 502, 503, 504)  # what may pass by itself
LONGEST_WAIT = 20.0  # seconds; a server that asks for more is reported, not waited for
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEYS = ("RALM_API_KEY", "OPENAI_API_KEY")


class ServerError(RalmError):
    """A server refused, failed, or left its protocol. `status` is the HTTP status where the status was the failure."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Unreachable(ServerError):
    """No connection, no answer in time, or a connection that broke off: trying another request would not help."""


def base_url(url: str) -> str:
    """`http://HOST:PORT/v1` without a trailing slash; an address without a path gets /v1. Raises UsageError."""
    shown = url.strip().rpartition("@")[2].partition("?")[0]  # without what may be a secret
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as e:
        raise UsageError(f"'{shown}' has an impossible host or port; write http://HOST:PORT/v1") from e
    if parts.username or parts.password:
        raise UsageError(f"the address of {host} holds a user or password; put the key into $RALM_API_KEY instead")
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"'{shown}' is not an address of a server; write http://HOST:PORT/v1 or https://HOST/v1")
    if parts.query or parts.fragment:
        raise UsageError(f"'{shown}' came with a query or fragment, which is no part of it; write http://HOST:PORT/v1")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def api_key(given: str | None, url: str) -> tuple[str | None, str]:
    """(key, what to say of it): the argument, $RALM_API_KEY or $OPENAI_API_KEY. Raises UsageError for unsafe keys."""
    source, key = "api_key", given
    for name in KEYS if key is None else ():
        if os.environ.get(name, "").strip():
            source, key = f"${name}", os.environ[name]
            break
    if key is None:
        return None, "no key was sent; set $RALM_API_KEY"
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"the key in {source} cannot be sent (empty, spaces, line breaks or not ASCII); set it anew")
    parts = urlsplit(url)
    if source == "$OPENAI_API_KEY" and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise UsageError(f"$OPENAI_API_KEY would go to {parts.hostname} unencrypted; use https, or set $RALM_API_KEY to "
                         "the key of that server")
    return key, f"the key in {source} was sent"


class Client:
    """JSON over HTTP to one server. Requests that may pass later (429, 502-504) are repeated at most `retries` times."""

    def __init__(self, url: str, key: str | None = None, timeout: float = 60.0, retries: int = 3, wait: float = 0.5):
        self._httpx = need("httpx", "a remote language model", "remote")
        self.url = base_url(url)
        self._key, self._sent = api_key(key, self.url)
        if not timeout > 0 or retries < 0:
            raise UsageError(f"timeout={timeout}, retries={retries}: use seconds above 0, and 0 or more retries")
        self.timeout, self.retries, self.wait = timeout, retries, wait
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = self._httpx.Client(headers=headers, follow_redirects=False,
                                          trust_env=urlsplit(self.url).hostname not in LOOPBACK,  # no proxy to oneself
                                          timeout=self._httpx.Timeout(timeout, connect=min(timeout, 10.0)))

    def close(self) -> None:
        self._client.close()

    def json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The parsed answer. Raises ServerError."""
        with self._open(method, path, body) as response:
            return self._parse(self._read(response, path), path)

    def events(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        """The parsed `data:` of each server-sent event, until [DONE] or the end; the answer where it is plain JSON.

        Raises ServerError, also in the middle."""
        with self._open("POST", path, body) as response:
            if "text/event-stream" not in response.headers.get("content-type", ""):
                yield self._parse(self._read(response, path), path)
                return
            with self._told(path):
                for data in sse(response.iter_bytes()):
                    if data.strip() == "[DONE]":
                        return
                    yield self._parse(data.encode(), path)

    # ---- failures -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _open(self, method: str, path: str, body: dict[str, Any] | None):
        """An answer with status 2xx, its body not yet read."""
        for attempt in range(self.retries + 1):
            with self._told(path):
                request = self._client.build_request(method, self.url + path, json=body)
                response = self._client.send(request, stream=True)
            try:
                if response.is_success:
                    yield response
                    return
                wait = self._patience(response, attempt)
                if wait is None:
                    raise self._refused(response, path)
            finally:
                response.close()
            time.sleep(wait)

    def _patience(self, response: Any, attempt: int) -> float | None:
        """Seconds until this request is worth repeating; None where it is not."""
        if response.status_code not in AGAIN or attempt >= self.retries:
            return None
        asked = _retry_after(response.headers.get("retry-after", ""))
        wait = self.wait * 2 ** attempt if asked is None else asked
        return wait if wait <= LONGEST_WAIT else None

    def _refused(self, response: Any, path: str) -> ServerError:
        status, said = response.status_code, self._detail(self._read(response, path))
        said = f": {said}" if said else ""
        if status in (401, 403):
            line = f"{self.url} refuses access ({status}){said}; {self._sent}"
        elif status == 404:
            line = f"{self.url}{path} or the model is not there (404){said}; check the address (usually .../v1) and the name"
        elif 300 <= status < 400:
            host = urlsplit(response.headers.get("location", "")).netloc or "another path"
            line = f"{self.url}{path} redirects ({status}) to {host}, which is not followed; give the final address"
        elif status == 429:
            after = response.headers.get("retry-after", "")
            later = f" in {after} s" if after.isdigit() else " later"
            line = f"{self.url} is asked too often (429){said}; try again{later}, or ask less at once"
        elif status >= 500:
            line = f"{self.url}{path} failed inside the server ({status}){said}; look at the server's own log"
        else:
            line = f"{self.url}{path} refuses the request ({status}){said}"
        return ServerError(self._hide(line), status)

    @contextmanager
    def _told(self, path: str):
        """Failures of the connection, as one line."""
        try:
            yield
        except self._httpx.ConnectError as e:
            line = f"no server answers at {self.url} ({_line(e)}); start it, or correct the address"
            raise Unreachable(self._hide(line)) from e
        except self._httpx.TimeoutException as e:
            raise Unreachable(f"{self.url}{path} said nothing for {self.timeout:g} s; wait longer (timeout=...), or look "
                              "whether the server still works") from e
        except self._httpx.HTTPError as e:
            line = f"{self.url}{path} broke the connection off ({_line(e)}); look at the server's own log"
            raise Unreachable(self._hide(line)) from e

    def _read(self, response: Any, path: str) -> bytes:
        with self._told(path):
            return response.read()

    def _parse(self, data: bytes, path: str) -> Any:
        try:
            value = json.loads(data)
        except ValueError as e:
            raise ServerError(f"{self.url}{path} answers something that is not JSON ({self._hide(_short(data))}); "
                              "is it an OpenAI-compatible server?") from e
        if isinstance(value, dict) and value.get("error"):  # some report failures with status 200, or in mid-stream
            raise ServerError(f"{self.url}{path} reports an error: {self._detail(data)}")
        return value

    def _detail(self, data: bytes) -> str:
        """What a refusal says of itself, in one short line."""
        try:
            value = json.loads(data)
        except ValueError:
            return self._hide(_short(data))
        for name in ("error", "detail", "message"):
            if isinstance(value, dict) and value.get(name):
                value = value[name]
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return self._hide(_short(text.encode("utf-8", "replace")))

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def sse(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each event of a text/event-stream. Lines end with LF or CRLF only: JSON may hold other line separators."""
    rest, data = b"", []
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for raw in lines:
            line = raw.rstrip(b"\r").decode("utf-8", "replace")
            if not line and data:
                yield "\n".join(data)
                data = []
            elif line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
    if rest.startswith(b"data:"):  # a last line without its end
        data.append(rest[5:].decode("utf-8", "replace").removeprefix(" "))
    if data:
        yield "\n".join(data)


def _retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, given as a number or a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def _short(data: bytes) -> str:
    text = " ".join(data[:2000].decode("utf-8", "replace").split())
    return text if len(text) <= 200 else text[:200] + "…"
