"""Answers with citations that resolve: prompts with numbered passages, markers back to characters of a stored document.

A marker [n] counts from 1; anything else the model writes in brackets resolves to nothing and is dropped, never guessed.
Where a model writes no markers, the citation is the sentence of the evidence that shares most with the answer, if any does."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ralm.errors import CapabilityError
from ralm.types import Answer, Citation, Cited, Done, Event, Evidence, Retrieved, Token
from ralm.when import Never, Once

if TYPE_CHECKING:
    from ralm.model import RALM

MARKER = re.compile(r"\[([0-9]{1,6})\]")
DECLINED = ("I do not know", "I don't know")  # what a model is asked to say where the passages hold no answer, and its short form
_SENTENCE = re.compile(r"[^\s].*?(?:[.!?](?=[\s\"')\]]|$)|\n\s*\n|$)", re.S)
_WORD = re.compile(r"\w+")
_COMMON = frozenset(("a an and are as at be by for from has have in is it its of on or that the this to was were which with "
                     "what who when where how why does do did").split())


def passages(store, ids: np.ndarray, scores: np.ndarray) -> list[Citation]:
    """Retrieved chunks as citations of their whole span, in retrieval order."""
    ids = [int(i) for i in ids]
    return [Citation(c.document, c.start, c.end, c.text, float(s), c.title, c.source, c.id)
            for c, s in zip(store.chunks(ids) if ids else (), scores)]


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans of the sentences of a text, without surrounding space. A blank line ends a sentence too."""
    spans = []
    for m in _SENTENCE.finditer(text):
        end = m.start() + len(m.group().rstrip())
        if end > m.start():
            spans.append((m.start(), end))
    return spans


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """The smallest run of whole sentences of `text` that holds [start, end)."""
    spans = [s for s in sentences(text) if s[1] > start and s[0] < end]
    return (min(start, spans[0][0]), max(end, spans[-1][1])) if spans else (start, end)


def narrow(passage: Citation, start: int, end: int, score: float) -> Citation:
    """The citation of characters [start, end) of a passage's text."""
    return Citation(passage.document, passage.start + start, passage.start + end, passage.quote[start:end], score,
                    passage.title, passage.source, passage.chunk)


def words(text: str) -> set[str]:
    """The content words of a text, lower-cased."""
    return {w for w in (m.group().lower() for m in _WORD.finditer(text)) if w not in _COMMON}


def support(statement: str, passage: Citation) -> Citation | None:
    """The sentence of the passage that shares most content words with the statement, None if none shares any; score = the share
    of the statement's words."""
    wanted = words(statement)
    best, found = 0.0, None
    for start, end in sentences(passage.quote):
        share = len(wanted & words(passage.quote[start:end])) / max(1, len(wanted))
        if share > best:
            best, found = share, (start, end)
    return narrow(passage, *found, best) if found else None


def resolve(text: str, evidence: Sequence[Citation]) -> list[tuple[int, Citation]]:
    """Markers [n] of a text as (n, citation), first use first; the quote is the passage's sentence nearest to the statement
    the marker ends. Numbers that name no passage ([0], [7] of 3) resolve to nothing."""
    out: dict[int, Citation] = {}
    begin, statement = 0, ""
    for m in MARKER.finditer(text):
        n = int(m.group(1))
        statement = text[begin:m.start()].strip(" .,;\n") or statement  # [1][2]: both end the same statement
        begin = m.end()
        if 1 <= n <= len(evidence) and n not in out:
            out[n] = support(statement, evidence[n - 1]) or evidence[n - 1]
    return list(out.items())


# ---- answering ------------------------------------------------------------------------------------------------------


def answer_with_reader(ralm: RALM, question: str, k: int, exclude: Sequence[str]) -> Answer:
    """Verbatim spans, marginalised over passages (REALM, section 3.1 and its Open-QA fine-tuning); may abstain.

    p(z|x) is the softmax of the retriever's scores; scores that are no logits (rank fusion) make it almost flat."""
    from ralm.lm.spans import log_softmax

    began = time.perf_counter()
    hits, _ = ralm.search(question, k, exclude)
    evidence = passages(ralm.store, hits.ids[0], hits.scores[0])
    if not evidence:
        return Answer("", True, [], [], time.perf_counter() - began)
    prior_K = log_softmax(hits.scores[0].astype(np.float64))
    reading = ralm.lm.read(question, [p.quote for p in evidence], logp=prior_K, titles=[p.title for p in evidence])
    if reading.abstain or not reading.spans:
        return Answer("", True, [], evidence, time.perf_counter() - began)
    best = reading.spans[0]
    cited = [narrow(p := evidence[span.passage], *sentence_around(p.quote, span.start, span.end), float(np.exp(span.score)))
             for span in reading.support]
    return Answer(best.text, False, cited, evidence, time.perf_counter() - began, best.answer_logp)


def question_prompt(question: str) -> str:
    """How a plain (not instruction-tuned) language model is asked: the form of the open-domain QA papers."""
    return f"Question: {question.strip()}\nAnswer:"


def answer_with_lm(ralm: RALM, question: str, k: int | None, exclude: Sequence[str], max_tokens: int) -> Answer:
    """The text of `stream` after a question, cited by its own markers or by the sentences that support it."""
    from ralm.lm.spans import normalised

    began = time.perf_counter()
    local = "logits" in ralm.lm.gives
    text, logp, evidence = "", 0.0, {}
    events = _reading(ralm, k).stream(question_prompt(question) if local else question, query=question, exclude=exclude,
                                      max_tokens=max_tokens, stop=("\n", "Question:") if local else ())
    for event in events:
        if isinstance(event, Retrieved):
            evidence |= {p.chunk: p for p in event.passages if p.chunk not in evidence}
        elif isinstance(event, Token):
            logp += event.logp
        elif isinstance(event, Done):
            text = event.text.strip()
    read = list(evidence.values())
    cited = [c for _, c in resolve(text, read)] if not local else []  # a local prompt numbers nothing: [1] would mean nothing
    if not cited:
        supported = [c for c in (support(text, p) for p in read) if c is not None]
        cited = sorted(supported, key=lambda c: -c.score)[:1]
    # nothing was found, said, or known: an answer would stand on nothing
    abstained = not text or not read or normalised(MARKER.sub("", text).replace("’", "'")) in map(normalised, DECLINED)
    return Answer("" if abstained else text, abstained, [] if abstained else cited, read, time.perf_counter() - began, logp)


def _reading(ralm: RALM, k: int | None) -> RALM:
    """The system that answers: with how="none" it would not read what its answer has to stand on, so passages are prepended."""
    from ralm.how.input import Prepend

    how = ralm.how
    if how.how == "none":
        k = k or 3
        return replace(ralm, how=Prepend(k=k, tokens=max(k, min(512, getattr(ralm.lm, "window", 1024) // 2))))
    if k is None or not hasattr(how, "k"):
        return ralm
    return replace(ralm, how=replace(how, k=k))


# ---- models that only take and give text ----------------------------------------------------------------------------


def numbered_prompt(question: str, evidence: Sequence[Citation]) -> str:
    """Numbered passages, then the question: what an instruction-tuned model is given."""
    blocks = [f"[{i}] {p.title + ': ' if p.title else ''}{p.quote}" for i, p in enumerate(evidence, 1)]
    return ("Answer the question from the numbered passages only. After each statement put the number of the passage that "
            f"supports it, like [1]. If they do not hold the answer, reply only: {DECLINED[0]}.\n\n"
            + "\n\n".join(blocks) + f"\n\nQuestion: {question}")


def check_text_only(ralm: RALM) -> None:
    """Raise CapabilityError for anything but one retrieval in front of the prompt: a text interface can do no other."""
    from ralm.how.input import Prepend

    how, when = ralm.how, ralm.when
    if how.how != "none" and not isinstance(how, Prepend):
        raise CapabilityError(f"{type(how).__name__} needs full distributions, '{ralm.lm.name}' gives text only; "
                              "use --how prepend, or a local model")
    if how.how != "none" and not isinstance(when, Once | Never):
        raise CapabilityError(f"{when!r} needs to stop the model between tokens, '{ralm.lm.name}' gives text only; "
                              "use --when once, or a local model")


def stream_remote(ralm: RALM, prompt: str, *, max_tokens: int, temperature: float, stop: Sequence[str],
                  exclude: Sequence[str], query: str | None) -> Iterator[Event]:
    """Stream from a server: retrieve once, prepend numbered passages, resolve markers as they close. `Prepend.tokens` is not
    applied: only the server knows its tokens, so passages go as a whole."""
    how = ralm.how
    began = time.perf_counter()
    evidence, used = [], []
    if how.how != "none" and isinstance(ralm.when, Once) and how.k:
        asked = query or prompt
        hits, seconds = ralm.search(asked, how.k, exclude)
        evidence = passages(ralm.store, hits.ids[0], hits.scores[0])
        used.append(Evidence(0, asked, hits.ids[0], hits.scores[0], seconds))
        yield Retrieved(0, asked, evidence, seconds)
    text, count, told = "", 0, 0
    reason: list[str] = []
    message = numbered_prompt(prompt, evidence) if evidence else prompt
    pieces = ralm.lm.generate(message, max_tokens=max_tokens, temperature=temperature, stop=list(stop), reason=reason)
    for piece, logp in pieces:
        text, count = text + piece, count + 1
        yield Token(piece, -1, logp)
        cited = resolve(text, evidence)
        for number, citation in cited[told:]:
            yield Cited(number, citation)
        told = len(cited)
    yield Done(text, count, reason[-1] if reason else "stop", used, time.perf_counter() - began)
