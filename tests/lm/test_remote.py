"""The client against a real server (`transformers serve` with a tiny model), and against servers that misbehave."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

httpx = pytest.importorskip("httpx")

from ralm.errors import CapabilityError, RalmError, UsageError  # noqa: E402
from ralm.lm import load  # noqa: E402
from ralm.lm.remote import Remote, until  # noqa: E402
from ralm.lm.remote_http import ServerError, Unreachable, sse  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.types import Cited, Done, Retrieved, Token  # noqa: E402

KEY = "sk-secret-4711"


# ---- a real server ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """(address, model name) of `transformers serve` on 127.0.0.1; killed by its pid whatever happens."""
    program = Path(sys.executable).parent / "transformers"
    pytest.importorskip("fastapi", reason="`transformers serve` needs transformers[serving]")
    if not program.exists():
        pytest.skip(f"no {program.name} beside {sys.executable}")
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny.make("llama", max_position_embeddings=2048).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    port = free_port()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
                                   stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 300  # seconds; about ten where the machine has nothing else to do
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"transformers serve did not start:\n{(folder / 'log.txt').read_text()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_real_server_is_probed_and_streams(served):
    remote = load(f"remote:{served[0]}#{served[1]},timeout=120")
    can = remote.capabilities()
    assert can.models == (served[1],) and can.chat.stream and can.completions.stream
    assert not can.score and any(n.startswith("score:") for n in can.notes)  # it accepts echo and ignores it: seen, not believed
    with pytest.raises(CapabilityError, match="cannot score text"):
        remote.score("The capital", " of France")
    reason: list[str] = []
    pieces = list(remote.generate("Hello", max_tokens=12, reason=reason))
    assert len(pieces) > 3 and reason == ["length"] and all(math.isnan(p) for _, p in pieces)
    whole = "".join(t for t, _ in pieces)
    at_once = "".join(t for t, _ in remote.generate("Hello", max_tokens=12, stream=False))
    assert at_once.rstrip("\ufffd") == whole  # greedy both times; only at once does it show an unfinished character
    stop = whole[3:5]
    stopped = "".join(t for t, _ in remote.generate("Hello", max_tokens=12, stop=[stop], reason=reason))
    assert stopped == whole[:whole.index(stop)] and reason[-1] == "stop"


def test_a_real_server_without_the_model_says_what_it_offers(served):
    with pytest.raises(ServerError, match=r"has no model 'other', it offers .*tiny"):
        Remote(served[0], "other").capabilities()


def test_answers_over_a_real_server(served, store, bm25):
    ralm = RALM(f"remote:{served[0]}#{served[1]},timeout=120", bm25, how="prepend:k=3")
    events = list(ralm.stream("Who built the lighthouse?", max_tokens=8))
    assert isinstance(events[0], Retrieved) and events[0].query == "Who built the lighthouse?"
    assert isinstance(events[-1], Done) and events[-1].reason == "length"
    assert "".join(e.text for e in events if isinstance(e, Token)) == events[-1].text
    answer = ralm.answer("Who built the lighthouse?", max_tokens=8)
    assert not answer.abstained and answer.answer == events[-1].text.strip()
    assert list(answer.evidence) == list(events[0].passages) and 1 <= len(answer.evidence) <= 3
    for c in [*answer.citations, *answer.evidence]:
        assert c.quote == store.document(c.document).text[c.start:c.end]


# ---- servers that misbehave -------------------------------------------------------------------------------------------


@contextmanager
def server(behave):
    """A server whose every request is answered by behave(handler, path, body); yields its address and what it was sent."""
    seen: list[tuple[str, dict, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self):
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            seen.append((self.path, body, self.headers.get("authorization")))
            behave(self, self.path, body)

        do_GET = do_POST = handle_request

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}/v1", seen
    finally:
        made.shutdown()
        made.server_close()
        thread.join(5)


def send(h, status, text, kind="application/json", **headers):
    data = text.encode()
    h.send_response(status)
    for name, value in ({"content-type": kind, "content-length": str(len(data))} | headers).items():
        h.send_header(name.replace("_", "-"), value)
    h.end_headers()
    h.wfile.write(data)


def chat(text, finish="stop"):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]})


def event(text=None, finish=None, **more):
    choice = {"delta": {"content": text} if text else {}, "finish_reason": finish}
    return "data: " + json.dumps({"choices": [choice]} | more) + "\n\n"


def talks(pieces, finish="stop", ending="data: [DONE]\n\n"):
    """A server that chats and streams these pieces; a probe (4 tokens) is always answered well."""
    def behave(h, path, body):
        if path == "/v1/models":
            send(h, 200, json.dumps({"data": [{"id": "m"}]}))
        elif path != "/v1/chat/completions":
            send(h, 404, '{"error": "no such path"}')
        elif body.get("stream"):
            probe = body.get("max_tokens") == 4
            last = event(finish="stop" if probe else finish) if probe or finish else ""
            send(h, 200, "".join(event(p) for p in pieces) + last + ("" if probe else ending), "text/event-stream")
        else:
            send(h, 200, chat("".join(pieces), finish))

    return behave


def refuses(status, text="{}", **headers):
    return lambda h, path, body: send(h, status, text, **headers)


def told(behave, **settings) -> str:
    """The one line a failing server is reported with; never the key."""
    with server(behave) as (url, seen):
        with pytest.raises(RalmError) as caught:
            list(Remote(url, "m", api_key=KEY, **({"wait": 0.01, "timeout": 5} | settings)).generate("Hello"))
        assert any(auth == f"Bearer {KEY}" for *_, auth in seen)
    line = str(caught.value)
    assert KEY not in line and "\n" not in line
    return line


def test_nobody_answers():
    with pytest.raises(Unreachable, match=r"no server answers at http://127\.0\.0\.1"):
        list(Remote(f"http://127.0.0.1:{free_port()}/v1", "m").generate("Hello"))


@pytest.mark.parametrize(("behave", "line"), [
    (refuses(401, json.dumps({"error": {"message": f"no key {KEY}"}})), r"refuses access \(401\): no key \[key\]; the key in"),
    (refuses(500, "Traceback\n  in main\n"), r"failed inside the server \(500\): Traceback in main"),
    (refuses(200, "<html>It works</html>"), "not JSON .*It works"),
    (refuses(200, '{"hello": 1}'), "without choices"),
    (refuses(200, '{"error": {"message": "out of memory"}}'), "reports an error: out of memory"),
    (refuses(302, "", location=f"http://elsewhere.invalid/?k={KEY}"), r"redirects \(302\) to elsewhere.invalid, which is not"),
    (refuses(429, "slow down", retry_after="3600"), r"asked too often \(429\): slow down; try again in 3600 s"),
    (talks(["a", "b"], finish=None, ending=""), "ended its stream after 2 events without saying"),
    (talks(["a"], finish=None, ending="data: {broken\n\n"), "not JSON"),
    (talks(["a"], finish=None, ending='data: {"error": "lost the model"}\n\n'), "reports an error: lost the model"),
])
def test_failures_are_one_line(behave, line):
    import re

    assert re.search(line, told(behave))


def test_silence_is_reported_after_the_timeout():
    def sleeps(h, path, body):
        time.sleep(1.5)

    began = time.monotonic()
    assert "said nothing for 0.3 s" in told(sleeps, timeout=0.3, retries=0)
    assert time.monotonic() - began < 10


def test_a_connection_cut_off_in_the_middle():
    def cuts(h, path, body):
        h.send_response(200)
        h.send_header("content-type", "text/event-stream")
        h.send_header("content-length", "5000")
        h.end_headers()
        h.wfile.write(event("a").encode())
        h.close_connection = True

    line = told(lambda h, path, body: cuts(h, path, body) if body.get("stream") else send(h, 404, "{}"))
    assert "broke the connection off" in line


def test_what_passes_by_itself_is_repeated():
    left = [2]

    def busy(h, path, body):
        if path == "/v1/chat/completions" and left[0]:
            left[0] -= 1
            send(h, 503, "loading")
        else:
            talks(["Hel", "lo"])(h, path, body)

    with server(busy) as (url, _):
        remote, reason = Remote(url, "m", wait=0.01), []
        assert "".join(t for t, _ in remote.generate("Hi", reason=reason)) == "Hello"
        assert "".join(t for t, _ in remote.generate("Hi", stop=["l"], reason=reason)) == "He" and reason == ["stop", "stop"]

    with server(talks(["Hel", "lo"], finish="length")) as (url, _):
        remote, reason = Remote(url, "m"), []
        assert list(remote.generate("Hi", reason=reason)) and list(remote.generate("Hi", stop=["e"], reason=reason))
        assert reason == ["length", "stop"]


def test_a_server_that_knows_only_the_newer_name_of_the_limit():
    def behave(h, path, body):
        if "max_tokens" in body:
            send(h, 400, '{"error": "use max_completion_tokens"}')
        else:
            talks(["ok"])(h, path, body)

    with server(behave) as (url, seen):
        remote = Remote(url, "m")
        assert remote.capabilities().chat.limit == "max_completion_tokens"
        assert list(remote.generate("Hi", max_tokens=3)) and seen[-1][1]["max_completion_tokens"] == 3


def test_log_probabilities_that_lie_are_not_believed():
    def zeros(h, path, body):
        if path == "/v1/models":
            send(h, 404, "{}")
        elif path == "/v1/completions":
            text = body["prompt"]
            logp = {"tokens": list(text), "token_logprobs": [None] + [0.0] * (len(text) - 1)}
            send(h, 200, json.dumps({"choices": [{"text": text if body.get("echo") else "ab", "finish_reason": "stop",
                                                  "logprobs": logp if body.get("echo") else None}]}))
        else:
            send(h, 404, "{}")

    with server(zeros) as (url, _):
        remote = Remote(url, "m")
        can = remote.capabilities()
        assert can.chat is None and not can.completions.logprobs and not can.score
        with pytest.raises(CapabilityError, match="all the same, missing or impossible"):
            remote.score("a", "b")
        with pytest.raises(CapabilityError, match="does not chat"):
            list(remote.generate([{"role": "user", "content": "x"}]))


def test_scores_of_a_server_that_echoes():
    def echoes(h, path, body):
        if path != "/v1/completions":
            send(h, 404, "{}")
            return
        words = body["prompt"].split(" ")
        tokens = [words[0], *(" " + w for w in words[1:])]
        told = {"tokens": [*tokens, "."], "token_logprobs": [None, *(-float(len(t)) for t in tokens[1:]), -9.0]}
        send(h, 200, json.dumps({"choices": [{"text": body["prompt"] + ".", "finish_reason": "length", "logprobs": told}]}))

    with server(echoes) as (url, _):
        remote = Remote(url, "m")
        assert np.array_equal(remote.score("one two", " three four"), [-6.0, -5.0])
        with pytest.raises(ServerError, match="one token; move the border"):
            remote.score("one tw", "o three")


# ---- answers from a server --------------------------------------------------------------------------------------------


def test_citations_resolve_and_nothing_is_guessed(store, bm25):
    """[0] and [9] name no passage; markers may come in pieces; quotes are the documents' own characters."""
    said = ["It was built by Maria Holt in 1873 [", "1", "]. Nobody lives there [0]. It is", " white [9]."]
    with server(talks(said)) as (url, seen):
        ralm = RALM(Remote(url, "m"), bm25, how="prepend:k=3")
        events = list(ralm.stream("Who built the lighthouse of Brennick?"))
        answer = ralm.answer("Who built the lighthouse of Brennick?")
    passages = events[0].passages
    assert f"[1] {passages[0].quote}" in seen[-1][1]["messages"][0]["content"]
    cited = [e for e in events if isinstance(e, Cited)]
    assert [c.number for c in cited] == [1]
    assert cited[0].citation.quote == "The lighthouse of Brennick was built in 1873 by Maria Holt."
    assert list(answer.citations) == [cited[0].citation]
    for c in [*answer.citations, *answer.evidence]:
        assert c.quote == store.document(c.document).text[c.start:c.end]


def test_an_answer_without_evidence_abstains(bm25):
    with server(talks(["I know it."])) as (url, _):
        answer = RALM(Remote(url, "m"), bm25, how="prepend").answer("zzzz qqqq xxxx")
    assert answer.abstained and answer.answer == "" and not answer.citations and not answer.evidence


@pytest.mark.parametrize("said", ["I do not know.", " I don't know\n", "I don’t know!", "i do not know [1]."])
def test_an_answer_that_declines_abstains(bm25, said):
    """The prompt asks for these words where the passages hold no answer; they are no answer to be cited or scored."""
    with server(talks([said[:4], said[4:]])) as (url, seen):
        answer = RALM(Remote(url, "m"), bm25, how="prepend").answer("Who painted the lighthouse?")
    assert "reply only: I do not know" in seen[-1][1]["messages"][0]["content"]
    assert answer.abstained and answer.answer == "" and not answer.citations and answer.evidence


def test_an_answer_that_only_begins_like_a_refusal_is_one(bm25):
    with server(talks(["I do not know", " of any but Maria Holt [1]."])) as (url, _):
        answer = RALM(Remote(url, "m"), bm25, how="prepend").answer("Who built the lighthouse of Brennick?")
    assert not answer.abstained and "Maria Holt" in answer.answer and answer.citations


def test_what_a_server_cannot_do_is_refused_before_it_is_asked(bm25):
    remote = Remote(f"http://127.0.0.1:{free_port()}/v1", "m")
    for settings, line in ((dict(how="ensemble"), "full distributions"), (dict(how="prepend", when="every:4"), "between tokens")):
        with pytest.raises(CapabilityError, match=line):
            RALM(remote, bm25, **settings)
    ralm = RALM(remote, bm25, how="prepend")
    with pytest.raises(CapabilityError, match="scoring needs logits"):
        ralm.score("text")
    with pytest.raises(CapabilityError, match="top_k"):
        ralm.stream("text", top_k=3)
    with pytest.raises(CapabilityError, match="gives text only"):
        remote.forward()


# ---- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://", "http://host:port/v1", "http://user:pw@host/v1", "http://host/v1?k=v"])
def test_addresses_that_are_none(url):
    with pytest.raises(UsageError) as caught:
        Remote(url, "m")
    assert "pw" not in str(caught.value)


def test_specs_and_keys(monkeypatch):
    for spec in ("remote:http://127.0.0.1/v1", "remote:", "remote:#m"):
        with pytest.raises(UsageError, match="needs an address and a model"):
            load(spec)
    with pytest.raises(UsageError, match="cannot be sent"):
        Remote("http://127.0.0.1/v1", "m", api_key="a b")
    monkeypatch.delenv("RALM_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UsageError, match="unencrypted") as caught:
        Remote("http://example.invalid/v1", "m")
    assert KEY not in str(caught.value) and KEY not in repr(Remote("https://example.invalid/v1", "m"))


@given(st.lists(st.text("ab\n", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_stop_texts_cut_at_their_first_place_however_the_text_is_cut_up(pieces, stops):
    whole = "".join(pieces)
    ends = [(n, s) for n in range(len(whole) + 1) for s in sorted(stops, key=len, reverse=True) if whole[:n].endswith(s)]
    cut = ends[0][0] - len(ends[0][1]) if ends else len(whole)  # the stop text that is complete first, the longest of these
    assert "".join(t for t, _ in until(iter([(p, -1.0) for p in pieces]), stops)) == whole[:cut]


@given(st.lists(st.integers(1, 9), min_size=1), st.booleans())
def test_events_survive_any_cutting(sizes, crlf):
    data = 'data: {"a": "x\u2028y"}\n\n: comment\n\ndata: one\ndata: two\n\ndata: [DONE]\n\n'
    data = data.replace("\n", "\r\n") if crlf else data
    raw, parts = data.encode(), []
    while raw:
        n = sizes[len(parts) % len(sizes)]
        parts, raw = [*parts, raw[:n]], raw[n:]
    assert list(sse(parts)) == ['{"a": "x\u2028y"}', "one\ntwo", "[DONE]"]
