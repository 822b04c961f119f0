"""The laws (docs/design.md, section 4), shipped so that your index, fusion, schedule or model can be held to them too.

    from ralm.testing import check_ralm
    check_ralm(RALM(my_lm, my_retriever, how=MyFusion(), when="every:4"), "some text", prompt="a question?")

Every check raises AssertionError with the law's name, the position and the two numbers that disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ralm.errors import CapabilityError
from ralm.types import Document, Hits, Token

if TYPE_CHECKING:
    from ralm.model import RALM

TOLERANCE = 2e-4  # nats; float32 forwards of different shapes differ in the last digits


def check_normalised(ralm: RALM, ids: Sequence[int], tolerance: float = TOLERANCE) -> None:
    """Law 1: the distribution at every position sums to one."""
    gap = ralm.distributions(ids).double().logsumexp(-1).abs()
    worst = int(gap.argmax())  # argmax takes nan for the largest, and nan < tolerance is false: nan fails too
    assert float(gap[worst]) < tolerance, f"normalised: ln sum p is {float(gap[worst])} from 0 at position {worst} ({ralm!r})"


def check_causal(ralm: RALM, ids: Sequence[int], positions: Iterable[int] | None = None, tolerance: float = TOLERANCE,
                 seed: int = 0, prompt: str | Sequence[int] = "") -> None:
    """Law 2: changing x_t and everything after it leaves every distribution up to and including position t unchanged.

    This is the leak detector: a query made from tokens it is used to predict, an off-by-one in a chunk or a mask, or a
    document that gives itself away fails here."""
    rng = np.random.default_rng(seed)
    whole = ralm.distributions(ids, prompt=prompt)
    for t in range(1, len(ids)) if positions is None else positions:
        other = list(ids[:t]) + rng.integers(0, ralm.lm.vocab, len(ids) - t).tolist()
        gap = distance(ralm.distributions(other, prompt=prompt)[:t + 1], whole[:t + 1])
        assert gap < tolerance, f"causal: other tokens from {t} on moved an earlier distribution by {gap} nats ({ralm!r})"


def check_one_truth(ralm: RALM, prompt: str, tokens: int = 8, tolerance: float = TOLERANCE, **settings) -> None:
    """Law 3: greedy `stream` and `score` agree token by token, cached and uncached. settings: window, stride, exclude."""
    drawn = [e for e in ralm.stream(prompt, max_tokens=tokens, **settings) if isinstance(e, Token)]
    ids = [e.id for e in drawn]
    if not ids:
        return
    logp = ralm.distributions(ids, prompt=prompt, **settings)
    for t, event in enumerate(drawn):
        best = float(logp[t].max())
        assert abs(float(logp[t, event.id]) - event.logp) < tolerance, (
            f"one truth: token {t} streams with ln p {event.logp}, scores with {float(logp[t, event.id])} ({ralm!r})")
        assert event.logp > best - tolerance, f"one truth: greedy token {t} has ln p {event.logp}, the best {best} ({ralm!r})"


def check_stepwise(ralm: RALM, ids: Sequence[int], prompt: str | Sequence[int] = "", tolerance: float = TOLERANCE,
                   **settings) -> None:
    """Law 3 over a given text: whole windows planned in advance equal token by token on cached prefixes, in every entry."""
    whole = ralm.distributions(ids, prompt=prompt, **settings)
    steps = ralm.distributions(ids, prompt=prompt, stepwise=True, **settings)
    for t in range(len(ids)):
        gap = distance(steps[t], whole[t])
        assert gap < tolerance, f"one truth: stepping moves the distribution of token {t} by {gap} nats ({ralm!r})"


def check_targets(ralm: RALM, ids: Sequence[int], prompt: str | Sequence[int] = "") -> None:
    """Law 3, the cheaper path: what `score` says of each token is what stands in the whole distribution."""
    whole = ralm.distributions(ids, prompt=prompt).gather(1, _column(ids))[:, 0].double().numpy()
    same(ralm.score(ids, prompt=prompt).logp, whole, "one truth (targets)")


def check_neutral(ralm: RALM, ids: Sequence[int]) -> None:
    """Law 4: without evidence (k = 0, lam = 0, no document allowed, never due, nothing found) the system is exactly the base model;
    a fusion at the output that is told to add nothing is exactly the one below it."""
    base = replace(ralm, how="none", when="once").score(ids)
    if ralm.how.what == "tokens":
        below = base if ralm.how.inner.how == "none" else replace(ralm, how=ralm.how.inner).score(ids)
        for nothing in (dict(k=0), dict(lam=0.0)):
            same(replace(ralm, how=replace(ralm.how, **nothing)).score(ids).logp, below.logp, f"neutral ({nothing})", 0)
    elif hasattr(ralm.how, "k"):
        same(replace(ralm, how=replace(ralm.how, k=0)).score(ids).logp, base.logp, "neutral (k = 0)")
    everything = [d.id for d in ralm.store.documents()]
    same(ralm.score(ids, exclude=everything).logp, base.logp, "neutral (every document excluded)")
    same(replace(ralm, when="never").score(ids).logp, base.logp, "neutral (never due)")
    if ralm.how.how == "intermediate":
        blind = replace(ralm, neighbours=Otherwise(ralm.neighbours, lambda hits: Hits.empty(*hits.ids.shape))).score(ids)
        same(blind.logp, base.logp, "neutral (nothing found)", 0)
    if ralm.how.how != "input":
        return
    blind = replace(ralm, retriever=Fixed(ralm.store, [])).score(ids)
    room = blind.convention["window"] - blind.convention["evidence_tokens"]  # evidence was expected: its room was kept free
    narrow = replace(ralm, how="none").score(ids, window=room, stride=blind.convention["stride"])
    same(blind.logp, narrow.logp, "neutral (nothing found)")


def check_degenerate(ralm: RALM, ids: Sequence[int]) -> None:
    """Law 5: with one passage every way of mixing passages is Prepend."""
    from ralm.how.input import Ensemble, Prepend

    shape = dict(k=1, query=getattr(ralm.how, "query", 32), tokens=getattr(ralm.how, "tokens", 256))
    one = replace(ralm, how=Prepend(**shape)).score(ids)
    for weights in ("prior", "posterior"):
        how = Ensemble(weights=weights, **shape)
        same(replace(ralm, how=how).score(ids).logp, one.logp, f"degenerate (ensemble {weights})")
    if hasattr(ralm.how, "k"):
        same(replace(ralm, how=replace(ralm.how, k=1)).score(ids).logp, one.logp, f"degenerate ({ralm.how!r} with k=1)")


def check_chunks(ralm: RALM, ids: Sequence[int], tolerance: float = TOLERANCE) -> None:
    """Law 5 for neighbours of chunks (RETRO): their order means nothing; and law 2: what is found for a chunk moves nothing that
    stands before its end, whoever finds it and whatever it is."""
    whole = ralm.distributions(ids)
    turned = replace(ralm, neighbours=Otherwise(ralm.neighbours, lambda h: Hits(h.ids[:, ::-1].copy(), h.scores[:, ::-1].copy())))
    gap = distance(turned.distributions(ids), whole)
    assert gap < tolerance, f"chunks: the order of neighbours moves a distribution by {gap} nats ({ralm!r})"
    for e in ralm.score(ids).evidence[::3]:
        if len(e.ids):
            lost = replace(ralm, neighbours=Otherwise(ralm.neighbours, lambda h: Hits.empty(*h.ids.shape), e.query))
            gap = distance(lost.distributions(ids)[:e.at], whole[:e.at])
            assert gap < tolerance, f"chunks: neighbours of the chunk that ends at {e.at} moved one before it by {gap} ({ralm!r})"


def check_marginal(ralm: RALM, prompt: str, ids: Sequence[int]) -> None:
    """Law 6: under RAG-Sequence, -score is the marginal objective -ln sum_z p(z|x) p(y|x,z) made of single-passage scores.

    Raises CapabilityError where the prompt finds nothing, or where prompt and text exceed one window (each retrieves anew)."""
    import torch

    from ralm.how.input import Ensemble, Prepend
    from ralm.how.mixing import log_mix_sequences, log_weights

    how = ralm.how if isinstance(ralm.how, Ensemble) else Ensemble(k=3)
    system = replace(ralm, how=replace(how, weights="posterior"), when="once").score(ids, prompt=prompt)
    hits, _ = ralm.search(prompt, how.k)
    if not hits.ids.size:
        raise CapabilityError(f"'{prompt}' finds nothing: there is no marginal to check; ask for what the store holds")
    if len(set(system.at.tolist())) > 1:
        raise CapabilityError("prompt and text take more than one window, and each window retrieves anew; check a shorter text")
    each = []
    for chunk in hits.ids[0]:
        one = replace(ralm, how=Prepend(k=1, tokens=how.tokens), when="once",
                      where=None, retriever=Fixed(ralm.store, [int(chunk)]))
        each.append(one.score(ids, prompt=prompt).logp)
    logp_1KT = torch.tensor(np.stack(each))[None]
    w = log_weights(torch.from_numpy(hits.scores.copy()), how.temperature)
    same(np.array([log_mix_sequences(logp_1KT, w.double()).item()]), np.array([system.logp.sum()]), "training equals inference",
         TOLERANCE * len(ids))


def check_forgetting(ralm: RALM, never: RALM, ids: Sequence[int], removed: Iterable[str] = ()) -> None:
    """Law 7: `ralm`, whose store had documents removed, scores as `never`, whose store never held them, and reads none of them."""
    ours, theirs = ralm.score(ids), never.score(ids)
    exact = ralm.how.what == "tokens" and ralm.tokens.recall == 1 and not ours.evidence
    same(ours.logp, theirs.logp, "forgetting", 1e-6 if exact else TOLERANCE)
    gone = set(removed)
    if ralm.how.what == "tokens":
        near = ralm.explain(ralm.lm.tokenizer.decode(ids)).neighbours
        assert not gone & {n.document for token in near for n in token}, "forgetting: tokens of removed documents were neighbours"
    for e in ours.evidence:
        read = {c.document for c in ralm.source(e).chunks(e.ids.tolist())} if len(e.ids) else set()
        assert not read & gone, f"forgetting: removed documents {sorted(read & gone)} were read at {e.at}"


def check_ralm(ralm: RALM, text: str, prompt: str = "", positions: Iterable[int] | None = None) -> None:
    """Laws 1 to 5 for one system. `positions`: where to test causality (default: everywhere)."""
    ids = ralm.lm.tokenizer.encode(text)
    check_normalised(ralm, ids)
    check_causal(ralm, ids, positions)
    check_stepwise(ralm, ids)
    check_targets(ralm, ids)
    if prompt:
        check_causal(ralm, ids, (0, 1), prompt=prompt)  # the retrieval that is due where the prompt ends
        check_stepwise(ralm, ids, prompt)
        check_one_truth(ralm, prompt)
    if ralm.how.how != "none":
        check_neutral(ralm, ids)
    if ralm.how.how == "input":
        check_degenerate(ralm, ids)
    if ralm.how.how == "intermediate":
        check_chunks(ralm, ids)


def check_retriever(retriever, queries: Sequence[str], k: int = 5, where: str | None = None) -> None:
    """What every retriever promises about its Hits: shapes, order, ties by id, padding, and only allowed chunks."""
    allowed = retriever.store.allow(where=where)
    hits = retriever.search(queries, k=k, where=where)
    assert hits.ids.shape == hits.scores.shape == (len(queries), k), f"shape {hits.ids.shape} for {len(queries)} queries, k={k}"
    for ids, scores in zip(hits.ids, hits.scores):
        found = ids >= 0
        assert not found[np.argmin(found):].any() or found.all(), "padding stands before a hit"
        assert np.isneginf(scores[~found]).all(), "a padded place has a score"
        assert allowed[ids[found]].all(), f"found chunks that are not allowed: {ids[found][~allowed[ids[found]]]}"
        assert len(set(ids[found].tolist())) == found.sum(), "a chunk was found twice"
        for a, b in zip(range(found.sum() - 1), range(1, found.sum())):
            assert scores[a] > scores[b] or (scores[a] == scores[b] and ids[a] < ids[b]), "scores descend, ties by ascending id"
    some = retriever.store.n_chunks + 3
    assert retriever.search(queries[:1], k=some, where=where).ids.shape == (1, some), "k above the store must pad"


def check_lm(lm, ids: Sequence[int], tolerance: float = 1e-3) -> None:
    """What every language model promises: cached equals full, left padding changes nothing, hidden states where it gives them."""
    import torch

    if "logits" not in lm.gives:
        raise CapabilityError(f"'{lm.name}' gives no logits, there is nothing to check")
    row = torch.tensor([[lm.bos, *ids]])
    with torch.inference_mode():
        full = lm.forward(row).logits
        half = row.shape[1] // 2
        first = lm.forward(row[:, :half])
        rest = lm.forward(row[:, half:], past=first.past).logits
        gap = distance(torch.cat([first.logits, rest], 1), full)
        assert gap < tolerance, f"cached logits differ from full ones by {gap}"
        padded = torch.cat([torch.full((1, 3), lm.bos), row], 1)
        mask = torch.tensor([[0] * 3 + [1] * row.shape[1]])
        gap = distance(lm.forward(padded, mask=mask).logits[:, 3:], full)
        assert gap < tolerance, f"left padding moves logits by {gap}"
        gap = distance(lm.forward(row, keep=2).logits, full[:, -2:])
        assert gap < tolerance, f"keep=2 gives logits that differ by {gap}"


class Fixed:
    """A retriever that finds the same chunks whatever is asked, with the scores given (0 each). For laws and for oracles."""

    def __init__(self, store, ids: Sequence[int], scores: Sequence[float] | None = None):
        scores = [0.0] * len(ids) if scores is None else scores
        self.store = store
        self.found = sorted(zip(map(int, ids), map(float, scores), strict=True), key=lambda pair: (-pair[1], pair[0]))

    def __repr__(self) -> str:
        return f"Fixed({[i for i, _ in self.found]})"

    def search(self, queries: Sequence[str], k: int = 10, where: str | None = None, exclude: Sequence[str] = ()) -> Hits:
        allowed = self.store.allow(where=where, exclude=exclude)
        out = Hits.empty(len(queries), k)
        kept = [(i, s) for i, s in self.found if allowed[i]][:k]
        if kept:
            out.ids[:, :len(kept)], out.scores[:, :len(kept)] = zip(*kept)
        return out


class Otherwise:
    """A neighbour database that finds something else than it would: `change` of its Hits, for all queries or for one. For laws."""

    def __init__(self, inner, change: Callable[[Hits], Hits], query: str | None = None):
        self.inner, self.change, self.query = inner, change, query

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def search(self, chunks: Sequence[str], k: int, where: str | None = None, exclude: Sequence[str] = ()) -> Hits:
        hits = self.inner.search(chunks, k, where=where, exclude=exclude)
        other, there = self.change(hits), np.array([self.query in (None, text) for text in chunks])[:, None]
        return Hits(np.where(there, other.ids, hits.ids), np.where(there, other.scores, hits.scores))


def distance(a, b) -> float:
    """The largest difference of two tensors of log-probabilities; equal infinities are equal, nan is infinitely far."""
    gap = (a - b).abs().masked_fill(a == b, 0.0)
    return float(gap.nan_to_num(nan=np.inf).max()) if gap.numel() else 0.0


def _column(ids: Sequence[int]):
    import torch

    return torch.tensor(list(ids), dtype=torch.long)[:, None]


def same(ours: np.ndarray, theirs: np.ndarray, law: str, tolerance: float = TOLERANCE) -> None:
    """Assert equality within the tolerance, saying where it fails."""
    assert ours.shape == theirs.shape, f"{law}: {ours.shape} numbers against {theirs.shape}"
    gap = np.nan_to_num(np.abs(ours - theirs), nan=np.inf)
    assert not len(gap) or gap.max() <= tolerance, (
        f"{law}: position {gap.argmax()} gives {ours[gap.argmax()]} against {theirs[gap.argmax()]}")


def documents(texts: Sequence[str], prefix: str = "d", **fields: Callable | str) -> list[Document]:
    """Small documents for tests: ids d0, d1, ..."""
    return [Document(f"{prefix}{i}", t, **fields) for i, t in enumerate(texts)]
