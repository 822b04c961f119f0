"""A model behind any OpenAI-compatible server: `Remote("http://127.0.0.1:8000/v1", "NAME")`.

What a server can do is asked, not believed: many accept `logprobs` and `echo` and ignore them, or answer zeros, which
would make every comparison of scores silently wrong. `capabilities()` tries each once; only what came back sane is
used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ralm.errors import CapabilityError, UsageError
from ralm.lm.pieces import first_stop, uncertain
from ralm.lm.remote_http import Client, ServerError, Unreachable

KNOWN = "The capital of France is Paris, and the capital of Italy is Rome."  # what `echo` is tried with
REFUSED = (400, 404, 405, 415, 422, 500, 501)  # a probe that ends so says "cannot"; other statuses are failures
Messages = Sequence[Mapping[str, str]]
Piece = tuple[str, float]


@dataclass(frozen=True)
class Way:
    """What one endpoint (chat or completions) does."""

    stream: bool = False
    logprobs: bool = False
    limit: str = "max_tokens"  # what it calls the most tokens to write


@dataclass(frozen=True)
class Capabilities:
    """What a server was seen to do. None where it cannot; `notes` say why, one line each."""

    models: tuple[str, ...] | None
    chat: Way | None
    completions: Way | None
    score: bool  # log-probabilities of given text are there and look like log-probabilities
    notes: tuple[str, ...] = ()


class Remote:
    """A language model that only speaks. gives text; log-probabilities of its own tokens where the server tells them.

    url: up to and with /v1. The key is `api_key`, $RALM_API_KEY or $OPENAI_API_KEY. timeout: seconds of silence
    allowed. Nothing is sent before the first call. Raises ServerError (a RalmError) for all that a server can do wrong."""

    gives = frozenset({"text"})

    def __init__(self, url: str, model: str, api_key: str | None = None, timeout: float = 60.0,
                 retries: int = 3, wait: float = 0.5):
        if not model:
            raise UsageError(f"no model named for {url}; write remote:{url}#NAME")
        self.client = Client(url, api_key, timeout, retries, wait)
        self.model, self.name = model, f"remote:{self.client.url}#{model}"
        self._known: Capabilities | None = None

    def __repr__(self) -> str:
        return f"Remote({self.client.url!r}, {self.model!r})"

    def close(self) -> None:
        self.client.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raises CapabilityError: a server gives text, not distributions."""
        raise CapabilityError(f"'{self.name}' gives text only; use a local model (bundled:base, hf:NAME)")

    # ---- writing ------------------------------------------------------------------------------------------------------

    def generate(self, prompt: str | Messages, max_tokens: int = 256, temperature: float = 0.0,
                 stop: Sequence[str] = (), stream: bool = True, reason: list[str] | None = None) -> Iterator[Piece]:
        """Yield (text, ln p of it) as it comes; nan where the server does not tell, or tells of several tokens at once.

        prompt: messages ({"role", "content"}), or a text: one user message where the server chats, else what it goes on
        from. stop: texts that end the answer and are no part of it, whatever the server makes of them. reason: is given
        why the text ended, "stop" or "length".
        Raises ServerError, and CapabilityError for messages to a server that does not chat."""
        if max_tokens < 1:
            raise UsageError(f"max_tokens={max_tokens} asks for no token; use at least 1")
        can = self.capabilities()
        if can.chat is None and not isinstance(prompt, str):
            raise CapabilityError(f"'{self.name}' does not chat, messages were given; give the prompt as one text")
        way = can.chat or can.completions
        body = self._body(way, prompt, can.chat is not None) | {way.limit: max_tokens, "temperature": temperature}
        if stop:
            body["stop"] = list(stop)
        why: list[str] = []
        pieces = self._ask(replace(way, stream=way.stream and stream), body, can.chat is not None, why)
        yield from until(pieces, [s for s in stop if s])
        if reason is not None:
            reason.append(why[-1] if why else "stop")  # no reason given: a stop text that the server went past

    def _body(self, way: Way, prompt: str | Messages, chat: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model}
        if chat:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            body["messages"] = [dict(m) for m in turns]
        else:
            body["prompt"] = prompt
        if way.logprobs:
            body["logprobs"] = True if chat else 1
        return body

    def _ask(self, way: Way, body: dict[str, Any], chat: bool, reason: list[str] | None = None) -> Iterator[Piece]:
        """The pieces of one answer; `reason` is given why it ended. Raises ServerError where it is cut off or none."""
        path = "/chat/completions" if chat else "/completions"
        reason = [] if reason is None else reason
        if not way.stream:
            choice = self._choice(self.client.json("POST", path, body), path)
            yield from pieces_of(choice, chat, "message")
            reason.append("length" if choice.get("finish_reason") == "length" else "stop")
            return
        count = 0
        for chunk in self.client.events(path, body | {"stream": True}):
            count += 1
            choice = self._choice(chunk, path, empty=True)
            if choice is None:  # usage, keep-alive
                continue
            yield from pieces_of(choice, chat, "message" if "message" in choice else "delta")
            if choice.get("finish_reason") is not None:
                reason.append("length" if choice["finish_reason"] == "length" else "stop")
        if not reason:
            raise ServerError(f"{self.client.url}{path} ended its stream after {count} events without saying that it "
                              "finished; the text is incomplete, look at the server's own log")

    def _choice(self, answer: Any, path: str, empty: bool = False) -> dict[str, Any] | None:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if empty and choices == []:
            return None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise ServerError(f"{self.client.url}{path} answers JSON without choices; is it an OpenAI-compatible server?")
        return choices[0]

    # ---- scoring ------------------------------------------------------------------------------------------------------

    def score(self, prompt: str, continuation: str) -> np.ndarray:
        """ln p of each token of `continuation` after `prompt`, float64 [T], in the server's own tokens.

        Raises CapabilityError where the server was not seen to score, UsageError for an empty prompt (the first token of
        a text has no ln p), ServerError where a token spans the border between the two."""
        if not prompt or not continuation:
            raise UsageError("scoring needs a prompt and a continuation; servers tell nothing of a text's first token")
        if not self.capabilities().score:
            why = next((n for n in self.capabilities().notes if n.startswith("score:")), "score: not tried")
            raise CapabilityError(f"'{self.name}' cannot score text ({why}); use a local model (hf:NAME)")
        path = "/completions"
        choice = self._choice(self.client.json("POST", path, self._echo(prompt + continuation)), path)
        offsets, logp = echoed(choice, prompt + continuation)
        edge = len(prompt)
        if edge not in offsets:
            raise ServerError(f"'{self.name}' reads the end of the prompt and the beginning of the continuation as one "
                              "token; move the border, usually in front of the space")
        return np.asarray([p for o, p in zip(offsets, logp) if o >= edge], np.float64)

    def _echo(self, text: str) -> dict[str, Any]:
        return dict(model=self.model, prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=1)

    # ---- probing ------------------------------------------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        """What the server does, asked once with a handful of tiny requests. Raises ServerError where it does nothing."""
        if self._known is None:
            notes: list[str] = []
            models = self._models(notes)
            chat, completions = self._way(True, models, notes), self._way(False, models, notes)
            if chat is None and completions is None:
                if models and self.model not in models:
                    raise self._absent(models)
                raise ServerError(f"'{self.name}' neither chats nor completes: {'; '.join(notes)}")
            score = completions is not None and self._scores(notes)
            self._known = Capabilities(models, chat, completions, score, tuple(notes))
        return self._known

    def _models(self, notes: list[str]) -> tuple[str, ...] | None:
        try:
            listed = self.client.json("GET", "/models")
            return tuple(str(m["id"]) for m in listed["data"])
        except ServerError as e:
            if _fatal(e) and e.status != 403:  # a key may be allowed to speak and not to list
                raise
            notes.append(f"models: {e}")
        except (KeyError, TypeError):
            notes.append("models: the list has another form than OpenAI's")
        return None

    def _way(self, chat: bool, models: tuple[str, ...] | None, notes: list[str]) -> Way | None:
        """Try an endpoint with everything, then with less, until it answers."""
        label = "chat" if chat else "completions"
        limits = ["max_tokens"]
        tries = [Way(True, True), Way(True, False), Way(False, False)]
        for way in (replace(w, limit=n) for n in limits for w in tries):
            body = self._body(way, "Count from one to nine.", chat) | {way.limit: 4, "temperature": 1.0}
            try:
                pieces = list(self._ask(way, body, chat))
            except ServerError as e:
                if e.status == 404 and models and self.model not in models:
                    raise self._absent(models) from e
                if _fatal(e):
                    raise
                if "max_completion_tokens" in str(e) and len(limits) == 1:
                    limits.append("max_completion_tokens")
                notes.append(f"{label} with{'' if way.stream else 'out'} stream, with{'' if way.logprobs else 'out'} "
                             f"logprobs: {e}")
                if e.status in (404, 405):
                    return None
                continue
            told = way.logprobs and sane([p for _, p in pieces])
            if way.logprobs and not told:
                notes.append(f"{label}: log-probabilities are accepted, but none came that make sense")
            return replace(way, logprobs=told)
        return None

    def _absent(self, models: Sequence[str]) -> ServerError:
        return ServerError(f"{self.client.url} has no model '{self.model}', it offers {', '.join(models[:8])}"
                           f"{' ...' if len(models) > 8 else ''}", 404)

    def _scores(self, notes: list[str]) -> bool:
        try:
            choice = self._choice(self.client.json("POST", "/completions", self._echo(KNOWN)), "/completions")
            _, logp = echoed(choice, KNOWN)
        except ServerError as e:
            if _fatal(e):
                raise
            notes.append(f"score: {e}")
            return False
        if not sane(logp[1:]) or len(set(logp[1:])) < 2:
            notes.append("score: the log-probabilities of a known text are all the same, missing or impossible")
            return False
        return True


def _fatal(e: ServerError) -> bool:
    """Whether a failed probe says that the server cannot be used at all, rather than that it cannot do this."""
    return isinstance(e, Unreachable) or (e.status is not None and e.status not in REFUSED)


def sane(logp: Sequence[float]) -> bool:
    """Whether numbers can be log-probabilities: some, all finite, none above 0, not all exactly 0."""
    return bool(logp) and all(math.isfinite(p) and p <= 1e-6 for p in logp) and any(p != 0 for p in logp)


def pieces_of(choice: Mapping[str, Any], chat: bool, part: str) -> Iterator[Piece]:
    """(text, logp) of one choice: token by token where the server's tokens spell the text, else in one piece."""
    if chat:
        text = (choice.get(part) or {}).get("content")
        told = (choice.get("logprobs") or {}).get("content") or []
        tokens = [(t.get("token"), t.get("logprob")) for t in told if isinstance(t, dict)]
    else:
        text, told = choice.get("text"), choice.get("logprobs") or {}
        tokens = list(zip(told.get("tokens") or [], told.get("token_logprobs") or []))
    if not isinstance(text, str) or not text:
        return
    if len(tokens) > 1 and "".join(str(t) for t, _ in tokens) == text:
        yield from ((t, _number(p)) for t, p in tokens)
    else:
        yield text, _number(tokens[0][1]) if len(tokens) == 1 else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def until(pieces: Iterator[Piece], stops: Sequence[str]) -> Iterator[Piece]:
    """Pieces up to the first stop text, which is left out. Text that may become a stop text is held back until it cannot."""
    held: list[Piece] = []
    for piece in pieces:
        held.append(piece)
        text = "".join(t for t, _ in held)
        cut = first_stop(text, stops)
        if cut >= 0:
            yield from _first(held, cut)
            return
        safe = len(text) - uncertain(text, stops)
        while held and len(held[0][0]) <= safe:
            safe -= len(held[0][0])
            yield held.pop(0)
    yield from held


def _first(pieces: Sequence[Piece], length: int) -> Iterator[Piece]:
    for text, logp in pieces:
        if length <= 0:
            return
        yield (text, logp) if len(text) <= length else (text[:length], math.nan)
        length -= len(text)


def echoed(choice: Mapping[str, Any], text: str) -> tuple[list[int], list[float]]:
    """(character offset, ln p) of every token of `text` in an answer with echo and logprobs; nan for the first.

    Raises ServerError unless the answer repeats `text`, says where each token stands, and gives a number for each."""
    told = choice.get("logprobs")
    if not isinstance(told, dict) or not told.get("tokens") or not told.get("token_logprobs"):
        raise ServerError("echo and logprobs are accepted, but no log-probabilities come back")
    if not str(choice.get("text", "")).startswith(text):
        raise ServerError("echo is accepted, but the prompt does not come back")
    tokens, logp, offsets = [str(t) for t in told["tokens"]], told["token_logprobs"], told.get("text_offset")
    if "".join(tokens).startswith(text):  # tokens that spell the text say best where they stand
        offsets = np.concatenate([[0], np.cumsum([len(t) for t in tokens])[:-1]]).tolist()
    if not isinstance(offsets, list) or not len(offsets) == len(tokens) == len(logp) or offsets != sorted(offsets):
        raise ServerError("the log-probabilities do not say which character each belongs to")
    inside = [(int(o), _number(p)) for o, p in zip(offsets, logp) if o < len(text)]
    if len(inside) < 2 or inside[0][0] != 0 or any(not math.isfinite(p) for _, p in inside[1:]):
        raise ServerError("the log-probabilities do not cover the prompt")
    return [o for o, _ in inside], [math.nan, *(p for _, p in inside[1:])]
