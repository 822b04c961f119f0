"""`ralm search ask generate`: what is read out of a datastore."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ralm import progress
from ralm.app import options
from ralm.app.options import LM, AskHow, At, Finder, HowArg, StoreArg, TokensArg, WhenArg, Where, Words, positive, said, writable
from ralm.app.parts import Parts, fitted, opened
from ralm.app.terminal import Output, bold, count, dim, duration, number, wrapped
from ralm.errors import UsageError

if TYPE_CHECKING:
    from ralm.model import RALM
    from ralm.types import Citation
    from ralm.what.datastore import Datastore

READER_PASSAGES, LM_PASSAGES = 10, 3


# ---- search ---------------------------------------------------------------------------------------------------------


def search(store: StoreArg, /, *query: Words,
           k: Annotated[int, Parameter(name=["-k", "--k"], help="How many passages.")] = 10,
           retriever: Finder = "auto", where: Where = None, at: At = None,
           queries: Annotated[Path | None, Parameter(help="Lines of id<TAB>query, searched as one batch instead of QUERY.")] = None,
           run: Annotated[Path | None, Parameter(help="With --queries: write document ids as a TREC run to this file.")] = None,
           out: Output = Output()) -> None:  # noqa: B008
    """Passages for a query, best first.

    JSON: hits [{rank, chunk, document, title, source, start, end, score, text}]; query, retriever, version, seconds. start and end
    are characters of the stored document's text. With --queries: queries [{id, query, hits}]; with --run too: run (the file),
    lines, queries (how many); a document ranks in a run where its best chunk does."""
    positive("-k", k)
    writable("--run", run)
    if queries is None:
        if run is not None:
            raise UsageError("--run needs --queries FILE.tsv: a run is of a whole batch")
        text = said("query", " ".join(query))
        kb, finder = opened(store, at, retriever)
        began = time.perf_counter()
        hits = finder.search([text], k=k, where=where)
        data = {"query": text, "hits": rows(kb, hits, 0), "retriever": repr(finder), "version": kb.version,
                "seconds": time.perf_counter() - began}
        out.show(data, lambda: hit_lines(data))
    elif query:
        raise UsageError("give a QUERY or --queries FILE.tsv, not both")
    else:
        _batch(store, at, retriever, queries, run, k, where, out)


def _batch(store: Path, at: int | None, retriever: str, queries: Path, run: Path | None, k: int, where: str | None,
           out: Output) -> None:
    from ralm.eval import retrieval, trec

    wanted = trec.read_queries(queries)
    kb, finder = opened(store, at, retriever)
    began = time.perf_counter()
    facts = {"retriever": repr(finder), "version": kb.version}
    if run is not None:
        lines = trec.write_run(run, retrieval.search(finder, wanted, k, where=where))
        data = {"queries": len(wanted), "lines": lines, "run": str(run), **facts, "seconds": time.perf_counter() - began}
        line = f"{run}: {lines:,} lines for {len(wanted):,} queries in {duration(data['seconds'])}"
        if not run.is_file() and not out.json:  # /dev/stdout, a pipe: the run itself is the result
            progress.note(line)
            return
        out.show(data, lambda: [line])
        return
    hits = finder.search(list(wanted.values()), k=k, where=where)
    found = [{"id": name, "query": text, "hits": rows(kb, hits, q)} for q, (name, text) in enumerate(wanted.items())]
    data = {"queries": found, **facts, "seconds": time.perf_counter() - began}
    out.show(data, lambda: (line for q in found for line in (bold(f"{q['id']}  {q['query']}"), *hit_lines(q))))


def rows(kb: Datastore, hits: Any, q: int) -> list[dict[str, Any]]:
    """The hits of query q as JSON rows, padding removed."""
    from ralm.how.cite import passages

    row = hits.row(q)
    return [{"rank": rank, "chunk": c.chunk, "document": c.document, "title": c.title, "source": c.source, "start": c.start,
             "end": c.end, "score": c.score, "text": c.quote} for rank, c in enumerate(passages(kb, row.ids[0], row.scores[0]), 1)]


def hit_lines(data: dict[str, Any]) -> Iterator[str]:
    if not data["hits"]:
        yield "nothing found"
    for h in data["hits"]:
        yield f"{h['rank']:>3}  {bold(h['title'] or h['document'])}  {dim(place(h))}  {number(h['score'], 3)}"
        yield from wrapped(h["text"], "     ", most=None if not sys.stdout.isatty() else 6)
    if "seconds" in data and data["hits"]:
        progress.note(f"{data['retriever']}, version {data['version']}, {duration(data['seconds'])}")


# ---- ask ------------------------------------------------------------------------------------------------------------


def ask(store: StoreArg, /, *question: Words, lm: LM = "bundled:reader", retriever: Finder = "auto",
        k: Annotated[int | None, Parameter(name=["-k", "--k"], help=f"How many passages are read (default: {READER_PASSAGES} by a "
                                                                    f"reader, {LM_PASSAGES} by a language model).")] = None,
        how: AskHow = None, when: WhenArg = "once", where: Where = None, at: At = None,
        max_tokens: Annotated[int, Parameter(help="Longest answer of a language model, in tokens.")] = 64,
        out: Output = Output()) -> None:  # noqa: B008
    """Answer a question from the datastore with verbatim quotes; a reader declines where the passages hold no answer.

    JSON: answer, abstained, citations and evidence [{document, start, end, quote, score, title, source, chunk}], seconds;
    question, score (ln p), lm, retriever, version. quote is characters start to end of the stored document's text."""
    text = said("question", " ".join(question))
    positive("-k", k)
    positive("--max-tokens", max_tokens)
    system, k = answering(store, at, lm, how, when, retriever, where, k)
    answer = system.answer(text, k=k, max_tokens=max_tokens)
    data = {"question": text, "answer": answer.answer, "abstained": answer.abstained,
            "citations": [cited(c) for c in answer.citations], "evidence": [cited(c) for c in answer.evidence],
            "score": answer.score, "lm": lm, "retriever": repr(system.retriever), "version": system.store.version,
            "seconds": answer.seconds}
    out.show(data, lambda: answer_lines(data))


def answer_lines(data: dict[str, Any]) -> Iterator[str]:
    """The answer, its quotes and where they are; where it declined, the nearest passages."""
    if data["abstained"]:
        read = len(data["evidence"])
        yield bold("no answer") + (f": none was found in {count(read, 'passage')} read; nearest:" if read else
                                   ": no passage matches the question")
        shown = data["evidence"][:3]
    else:
        yield bold(data["answer"])
        yield ""
        shown = data["citations"]
    for i, c in enumerate(shown, 1):
        yield f"[{i}] {c['title'] or c['document']}  {dim(place(c))}"
        yield from wrapped(c["quote"], "    ", most=3 if data["abstained"] else None)
    progress.note(f"{data['lm']} over {count(len(data['evidence']), 'passage')} from {data['retriever']}, "
                  f"{duration(data['seconds'])}")


# ---- generate -------------------------------------------------------------------------------------------------------


def generate(store: StoreArg, /, *prompt: Words, lm: LM = "bundled:base", how: HowArg = "prepend", when: WhenArg = "once",
             retriever: Finder = "auto", tokens: TokensArg = "default", database: options.DatabaseArg = "default",
             where: Where = None, at: At = None,
             max_tokens: Annotated[int, Parameter(help="Most tokens to draw.")] = 64,
             temperature: Annotated[float, Parameter(help="0 is greedy; 1 draws from the distribution as it is.")] = 0.0,
             top_k: Annotated[int | None, Parameter(help="Draw among the k most probable tokens.")] = None,
             top_p: Annotated[float | None, Parameter(help="Draw among the most probable tokens that hold this mass.")] = None,
             seed: Annotated[int, Parameter(help="Of the random numbers; the same seed gives the same text.")] = 0,
             stop: Annotated[list[str] | None, Parameter(help="Text that ends the stream; may be given several times.")] = None,
             window: Annotated[int | None, Parameter(help="Most tokens the model sees at once.")] = None,
             stride: Annotated[int | None, Parameter(help="Tokens a full window moves on by.")] = None,
             speculate: Annotated[str, Parameter(help="With --how knn: draw so many tokens on guessed neighbours, then check them "
                                                      "by one search; a number or auto. The text is the same.")] = "0",
             out: Output = Output()) -> None:  # noqa: B008
    """Continue a prompt; the text streams to stdout as it is drawn, what was retrieved is told on stderr.

    JSON, one object at the end: text, tokens, reason (eos, length, stop), logp (sum of ln p), evidence [{at, query, kind,
    passages}], citations [{number, document, start, end, quote, score, title, source, chunk}], seconds; prompt, lm, how, when,
    retriever, token_store, neighbours, version."""
    text = said("prompt", " ".join(prompt))
    positive("--max-tokens", max_tokens)
    guesses = _guesses(speculate)
    parts = Parts(store, at, retriever, tokens, database)
    system, kb = parts.system(lm, how, when, where, window), parts.kb
    events = system.stream(text, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                           stop=tuple(stop or ()), window=window, stride=stride, speculate=guesses)
    data = {"prompt": text} | _drain(events, echo=not out.json)
    data |= {"lm": lm, "how": how, "when": when, "retriever": repr(system.retriever) if system.retriever else None,
             "token_store": system.tokens.name if system.tokens else None,
             "neighbours": repr(system.neighbours) if system.neighbours else None, "version": kb.version}
    if out.json:
        out.show(data, lambda: ())
        return
    print()
    _sources(data)


def _guesses(speculate: str) -> int | str:
    if speculate != "auto" and not speculate.isdecimal():
        raise UsageError(f"--speculate {speculate} is neither a number of tokens nor auto")
    return "auto" if speculate == "auto" else int(speculate)


def _drain(events: Iterator[Any], echo: bool) -> dict[str, Any]:
    """Read a stream to its end; `echo` prints each piece as it comes. The whole as JSON fields."""
    evidence, citations, logp = [], [], 0.0
    done = None
    for event in events:
        if event.kind == "retrieved":
            evidence.append({"at": event.at, "query": event.query, "kind": event.what,
                             "passages": [cited(c) for c in event.passages]})
        elif event.kind == "token":
            logp += event.logp
            if echo:
                print(event.text, end="", flush=True)
        elif event.kind == "cited":
            citations.append({"number": event.number, **cited(event.citation)})
        else:
            done = event
    return {"text": done.text, "tokens": done.tokens, "reason": done.reason, "logp": logp, "evidence": evidence,
            "citations": citations, "seconds": done.seconds}


def _sources(data: dict[str, Any]) -> None:
    rate = data["tokens"] / data["seconds"] if data["seconds"] else 0.0
    progress.note(f"{count(data['tokens'], 'token')} in {duration(data['seconds'])} ({rate:.1f} a second), "
                  f"{count(len(data['evidence']), 'retrieval')}; {data['how']}, {data['when']}, "
                  f"{data['retriever'] or data['neighbours'] or 'no retriever'}")
    seen = {}
    for passage in (p for e in data["evidence"] for p in e["passages"]):
        seen.setdefault(passage["chunk"], passage)
    for i, p in enumerate(list(seen.values())[:10], 1):
        progress.note(f"  [{i}] {p['title'] or p['document']}  {place(p)}")
    if len(seen) > 10:
        progress.note(f"  … and {len(seen) - 10} more (--json lists all)")


# ---- shared ---------------------------------------------------------------------------------------------------------


def answering(store: Path, at: int | None, lm: str, how: str | None, when: str, retriever: str, where: str | None,
              k: int | None) -> tuple[RALM, int | None]:
    """A RALM that answers questions, and how many passages it is to read (None: as its `how` says)."""
    from ralm.how import fusion
    from ralm.lm import load
    from ralm.model import RALM
    from ralm.when import schedule

    way, times = fusion(how or "prepend"), schedule(when)
    if way.how in ("output", "intermediate"):
        does = "mixes at the output" if way.how == "output" else "reads neighbours of its text"
        raise UsageError(f"questions are answered from passages, --how {how} {does}; use prepend or ensemble, or ralm generate "
                         f"--how {how}")
    _, finder = opened(store, at, retriever)
    model = load(lm)
    if "spans" in model.gives:
        if how is not None:
            raise UsageError(f"--how {how} is for language models, '{lm}' reads spans out of passages; leave --how away")
        return RALM(model, finder, where=where), k or READER_PASSAGES
    if k is None and how is None:
        k = LM_PASSAGES
    system = RALM(model, finder, how=way, when=times, where=where)
    system.how = fitted(system, how or "prepend")
    return system, k


def cited(c: Citation) -> dict[str, Any]:
    return asdict(c)


def place(c: dict[str, Any]) -> str:
    """Where a passage is: document, the file it was read from where that says more, characters."""
    document, source = c["document"], c["source"]
    if source.endswith(document):
        document = source or document
    elif source and not document.startswith(Path(source).name):
        document += f" ({source})"
    return f"{document} {c['start']}–{c['end']}"
