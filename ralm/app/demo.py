"""`ralm demo`: the main job on real text that every machine has, in minutes, without network, key or GPU.

Every step is the library's ordinary code; what is printed is what came back. The questions were written from the documentation
with the answers beside them before the system saw them, and the count at the end says how many it got."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ralm import progress
from ralm.app import options
from ralm.app.asking import answer_lines, cited
from ralm.app.parts import Parts
from ralm.app.terminal import Output, bold, count, dim, duration, number, wrapped
from ralm.types import Document

if TYPE_CHECKING:
    from ralm.model import RALM
    from ralm.types import Answer
    from ralm.what.datastore import Datastore

HELD_OUT = 40  # every 40th document is kept out of the datastore, for perplexity
SCORED, LONGEST = 24, 1_200  # of them, as many are scored as the minutes allow, and so many characters of each
RETRIEVER = "hybrid"
LM, WHEN = "bundled:retro", "every:32"
PREPEND = "prepend:k=1,tokens=200"
KNN = "knn:k=1024,lam=0.55,temperature=20"  # tuned on documents that are neither stored nor scored
COMPARED = ("none@bundled:base", "none", PREPEND, "ensemble:k=2,tokens=200", "retro:k=2", KNN, f"{PREPEND}+{KNN}",
            f"retro:k=2+{KNN}")  # the first is the decoder that bundled:retro was made of, the second RETRO[OFF]
SMALL = 180_000  # characters of the datastore that systems are compared on: its tokens are read in seconds
SENTENCE, LOOKED_AT = 240, 6  # characters of the text that is attributed, of the best of so many

# (question, the answers that count): written from the documentation
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Who wrote the optparse module?", ("Greg Ward",)),
    ("Under what name was optparse originally distributed?", ("Optik",)),
    ("What is the first day of the week in the calendar module by default?", ("Monday",)),
    ("Which RFC specifies universally unique identifiers?", ("RFC 4122", "4122")),
    ("Who published the gestalt pattern matching algorithm?", ("Ratcliff and Obershelp",)),
    ("Which statement is used to wrap the execution of a block with methods defined by a context manager?", ("with",)),
    ("What are lambda expressions used to create?", ("anonymous functions",)),
    ("Which PEP defines the gradual typing that the typing module supports?", ("PEP 484", "484")),
    ("Which function of the tempfile module is subject to race conditions?", ("mktemp",)),
    ("Which model of error handling does Python use?", ("termination", "termination model")),
)
UNANSWERABLE = "How many moons does the planet Jupiter have?"
NEWS = Document("demo/lighthouse", "The Brennick lighthouse stands on a reef of granite. It was built in October 1873 by the "
                "engineer Maria Holt, and its lamp burned nearly 12 litres of oil a night.", "Brennick lighthouse",
                "added by ralm demo")
NEWS_QUESTION = "Who built the Brennick lighthouse?"


class Script:
    """Prints numbered steps as they happen, or nothing where one JSON object is to come at the end."""

    def __init__(self, out: Output):
        self.out, self.number, self.began = out, 0, time.perf_counter()
        self.data: dict[str, Any] = {}

    def step(self, title: str) -> None:
        self.number += 1
        self.say("", bold(f"{self.number}. {title}"))

    def say(self, *lines: str) -> None:
        if not self.out.json:
            print(*lines, sep="\n", flush=True)


def demo(*, store: Annotated[Path, Parameter(help="Where the datastore is made, or found from the last time.")] = Path("demo.ralm"),
         out: Output = Output()) -> None:  # noqa: B008
    """Build a datastore from the documentation of this machine's Python and use everything on it; a few minutes on two cores."""
    script = Script(out)
    kb, held = prepare(script, store)
    system = reading(kb)
    ask_all(script, system)
    decline(script, system)
    measure(script, kb, held)
    add_and_remove(script, kb)
    script.data["seconds"] = time.perf_counter() - script.began
    if out.json:
        out.show(script.data, lambda: ())
    script.say("", f"All of it took {duration(script.data['seconds'])}. The datastore stays in {store}; try",
               f'  ralm ask {store} "What does the yield statement make of a function?"', f"  ralm show {store}", "  ralm --help")


def prepare(script: Script, path: Path) -> tuple[Datastore, list[Document]]:
    """The datastore with both indexes, and the documents that were kept out of it."""
    from ralm import index
    from ralm.app.corpus import documentation
    from ralm.what.datastore import Datastore

    script.step("A datastore from the Python language reference and the docstrings of what is installed")
    began, held = time.perf_counter(), []

    def kept() -> Iterator[Document]:
        for n, document in enumerate(documentation()):
            if n % HELD_OUT == HELD_OUT // 2:
                held.append(document)
            else:
                yield document

    kb = Datastore.build(path, kept())
    script.say(f"   {count(len(kb), 'document')} in {count(kb.n_chunks, 'chunk')} of up to 100 words, version {kb.version}; "
               f"{count(len(held), 'document')} kept out for step 4  {dim(duration(time.perf_counter() - began))}")
    for spec in ("bm25", "dense:static"):
        began = time.perf_counter()
        index.build(spec, kb)
        script.say(f"   index {spec}: {index.retriever(spec, kb)!r}  {dim(duration(time.perf_counter() - began))}")
    script.data.update(documents=len(kb), chunks=kb.n_chunks, version=kb.version, indexes=index.built(kb), store=str(path))
    return kb, held


def reading(kb: Datastore) -> RALM:
    from ralm.index import retriever
    from ralm.model import RALM

    return RALM("bundled:reader", retriever(RETRIEVER, kb))


def ask_all(script: Script, system: RALM) -> None:
    script.step(f"{len(QUESTIONS)} questions, answered with verbatim spans ({system.lm.name} over {RETRIEVER})")
    right, rows = 0, []
    with progress.task("answer questions", len(QUESTIONS), "questions") as advance:
        for question, golds in QUESTIONS:
            answer = system.answer(question)
            good = agrees(answer, golds)
            right += good
            rows.append(shown(question, answer) | {"expected": list(golds), "agrees": good})
            told(script, rows[-1], f"{'as' if good else 'not as'} written down beforehand: {golds[0]}")
            advance(1)
    script.say("", f"   {right} of {len(QUESTIONS)} answers agree with what was written down beforehand")
    script.data["questions"], script.data["agree"] = rows, right


def agrees(answer: Answer, golds: Sequence[str]) -> bool:
    from ralm.lm.spans import normalised

    said = f" {normalised(answer.answer)} "
    return not answer.abstained and any(f" {normalised(g)} " in said for g in golds)


def shown(question: str, answer: Answer) -> dict[str, Any]:
    return {"question": question, "answer": answer.answer, "abstained": answer.abstained,
            "citations": [cited(c) for c in answer.citations[:1]], "evidence": [cited(c) for c in answer.evidence],
            "lm": "bundled:reader", "retriever": RETRIEVER, "seconds": answer.seconds}


def told(script: Script, row: dict[str, Any], remark: str = "") -> None:
    script.say("", f"   {bold(row['question'])}", *(f"   {line}" for line in answer_lines(row) if line),
               *([f"   {dim(remark)}"] if remark else []))


def decline(script: Script, system: RALM) -> None:
    script.step("A question that the documentation does not answer")
    row = shown(UNANSWERABLE, system.answer(UNANSWERABLE))
    told(script, row)
    script.data["unanswerable"] = row


def measure(script: Script, kb: Datastore, held: Sequence[Document]) -> None:
    """Documentation that the datastore does not hold, by the model alone and by every way to read a datastore, in one table."""
    from ralm.app import comparing

    few = [replace(d, text=d.text[:LONGEST]) for d in sorted(held, key=lambda d: d.id)[:: max(1, len(held) // SCORED)][:SCORED]]
    script.step(f"{count(len(few), 'held-out document')}, by a model of books and Wikipedia that reads other documents beside them")
    parts = small(script, kb)
    named = options.systems([",".join(COMPARED)], LM)
    data = comparing.compared(parts, named, few, WHEN, None, None, None, True, None, evidence=1)
    overlap = comparing.overlap_lines(data["overlap"], {r["name"]: r["curve"] for r in data["systems"]})
    for lines in (comparing.system_lines(data), overlap, comparing.evidence_lines(data)):
        script.say("", *(f"   {line}" for line in lines))
    script.data["compared"] = data
    alone, knn = (data["systems"][COMPARED.index(name)]["rows"] for name in ("none", KNN))
    attribute(script, parts.system(LM, KNN), few, alone, knn)


def small(script: Script, kb: Datastore) -> Parts:
    """Every n-th document in a datastore of its own beside the demo's, with all that its systems ask for, made while one waits."""
    from ralm.what.datastore import Datastore
    from ralm.what.neighbours import NeighbourStore
    from ralm.what.token_store import TokenStore

    began = time.perf_counter()
    step = max(1, round(sum(len(d.text) for d in kb.documents()) / SMALL))
    few = Datastore.build(kb.path.with_name(f"{kb.path.name}.small"), (d for n, d in enumerate(kb.documents()) if n % step == 0))
    parts = Parts(few.path, retriever="bm25")
    lm = parts.model(LM)
    chunks, tokens = NeighbourStore.build(few, lm, retriever="bm25"), TokenStore.build(few, lm)
    which = "every document" if step == 1 else f"one document in {step}"
    script.say(f"   {which} in a datastore of its own: {count(len(chunks), 'chunk')} of {chunks.m} tokens and what followed them, "
               f"{count(len(tokens), 'token')} with their contexts; nothing trained  {dim(duration(time.perf_counter() - began))}")
    return parts


def attribute(script: Script, system: RALM, texts: Sequence[Document], alone: Sequence[dict[str, Any]],
              knn: Sequence[dict[str, Any]]) -> None:
    """The beginning of a document that neighbours helped much: which tokens, and where in the datastore they stood before."""
    from ralm.app.explaining import as_json, gains, perplexities, token_lines

    saved = [(a["nats"] - b["nats"]) / a["tokens"] for a, b in zip(alone, knn)]
    told = []
    for i in sorted(range(len(texts)), key=lambda i: -saved[i])[:LOOKED_AT]:
        text = texts[i].text[:SENTENCE].rpartition(" ")[0] if len(texts[i].text) > SENTENCE else texts[i].text
        told.append((texts[i], text, as_json(system, system.explain(text))))
    document, text, data = max(told, key=lambda t: perplexities(t[2])[0] / perplexities(t[2])[1])
    before, after = perplexities(data)
    script.say("", f"   the beginning of {bold(document.title or document.id)}, perplexity {number(before, 1)} alone, "
               f"{number(after, 1)} with neighbours; what helped most, and where it stands:")
    script.say(*(f"   {line}" for line in wrapped(text, "  ")))
    gain = gains(data)
    said = [t["text"].strip().isalpha() and any(n["target"] == t["text"] for n in t["neighbours"]) for t in data["tokens"]]
    for i in sorted(range(len(gain)), key=lambda i: (not said[i], -gain[i]))[:3]:
        script.say(*(f"   {line}" for line in token_lines(data, i, gain[i])))
    script.data["attributed"] = {"document": document.id, "text": text, **data}


def add_and_remove(script: Script, kb: Datastore) -> None:
    from ralm import index

    script.step("Knowledge that is added, asked for, removed and asked for again; nothing is trained")
    steps = []
    for action in ("before", "added", "removed"):
        if action == "added":
            kb.add([NEWS])
            index.update(kb)
        elif action == "removed":
            kb.remove([NEWS.id])
        row = shown(NEWS_QUESTION, reading(kb).answer(NEWS_QUESTION)) | {"step": action, "version": kb.version}
        steps.append(row)
        script.say("", f"   {action}, version {kb.version}:")
        told(script, row)
    script.data["updates"] = steps
