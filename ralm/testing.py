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
    total = ralm.distributions(ids).double().logsumexp(-1)
    assert float(total.abs().max()) < tolerance, f"normalised: ln sum p = {float(total.abs().max())} at position {int(total.abs().argmax())}"


def check_causal(ralm: RALM, ids: Sequence[int], positions: Iterable[int] | None = None, tolerance: float = TOLERANCE,
                 seed: int = 0) -> None:
    """Law 2: changing x_t and everything after it leaves every distribution up to and including position t unchanged.

    This is the leak detector: a query made from tokens it is used to predict, an off-by-one in a chunk or a mask, or a
    document that gives itself away fails here."""
    rng = np.random.default_rng(seed)
    whole = ralm.distributions(ids)
    for t in range(1, len(ids)) if positions is None else positions:
        other = list(ids[:t]) + rng.integers(0, ralm.lm.vocab, len(ids) - t).tolist()
        gap = float((ralm.distributions(other)[:t + 1] - whole[:t + 1]).abs().max())
        assert gap < tolerance, f"causal: changing tokens from {t} on moved an earlier distribution by {gap} nats ({ralm!r})"


def check_one_truth(ralm: RALM, prompt: str, tokens: int = 8, tolerance: float = TOLERANCE) -> None:
    """Law 3: greedy `stream` and `score` agree token by token, cached and uncached."""
    drawn = [e for e in ralm.stream(prompt, max_tokens=tokens) if isinstance(e, Token)]
    ids = [e.id for e in drawn]
    if not ids:
        return
    logp = ralm.distributions(ids, prompt=prompt)
    for t, event in enumerate(drawn):
        best = float(logp[t].max())
        assert abs(float(logp[t, event.id]) - event.logp) < tolerance, (
            f"one truth: token {t} streams with ln p {event.logp}, scores with {float(logp[t, event.id])} ({ralm!r})")
        assert event.logp > best - tolerance, f"one truth: greedy token {t} has ln p {event.logp}, the best {best} ({ralm!r})"


def check_neutral(ralm: RALM, ids: Sequence[int]) -> None:
    """Law 4: without evidence (k = 0, nothing allowed by the filter, an empty store) the system is exactly the base model."""
    base = replace(ralm, how="none").score(ids)
    if hasattr(ralm.how, "k"):
        same(replace(ralm, how=replace(ralm.how, k=0)).score(ids).logp, base.logp, "neutral (k = 0)")


def check_degenerate(ralm: RALM, ids: Sequence[int]) -> None:
    """Law 5: with one passage every way of mixing passages is Prepend."""
    from ralm.how.input import Ensemble, Prepend

    one = replace(ralm, how=Prepend(k=1)).score(ids)
    for weights in ("prior", "posterior"):
        same(replace(ralm, how=Ensemble(k=1, weights=weights)).score(ids).logp, one.logp, f"degenerate (ensemble {weights})")


def check_marginal(ralm: RALM, prompt: str, ids: Sequence[int]) -> None:
    """Law 6: under RAG-Sequence, -score is the marginal objective -ln sum_z p(z|x) p(y|x,z) made of single-passage scores."""
    import torch

    from ralm.how.input import Ensemble, Prepend
    from ralm.how.mixing import log_mix_sequences, log_weights

    how = ralm.how if isinstance(ralm.how, Ensemble) else Ensemble(k=3)
    system = replace(ralm, how=replace(how, weights="posterior"), when="once").score(ids, prompt=prompt)
    hits, _ = ralm.search(prompt, how.k)
    each = []
    for chunk in hits.ids[0]:
        one = replace(ralm, how=Prepend(k=1, tokens=how.tokens), when="once",
                      retriever=Fixed(ralm.store, [int(chunk)]))
        each.append(one.score(ids, prompt=prompt).logp)
    logp_1KT = torch.tensor(np.stack(each))[None]
    w = log_weights(torch.from_numpy(hits.scores.copy()), how.temperature)
    same(np.array([log_mix_sequences(logp_1KT, w.double()).item()]), np.array([system.logp.sum()]), "training equals inference",
         TOLERANCE * len(ids))


def check_forgetting(ralm: RALM, never: RALM, ids: Sequence[int], removed: Iterable[str] = ()) -> None:
    """Law 7: `ralm`, whose store had documents removed, scores as `never`, whose store never held them; no removed document is read."""
    ours, theirs = ralm.score(ids), never.score(ids)
    same(ours.logp, theirs.logp, "forgetting")
    gone = set(removed)
    for e in ours.evidence:
        read = {c.document for c in ralm.store.chunks(e.ids.tolist())} if len(e.ids) else set()
        assert not read & gone, f"forgetting: removed documents {sorted(read & gone)} were read at {e.at}"


def check_ralm(ralm: RALM, text: str, prompt: str = "", positions: Iterable[int] | None = None) -> None:
    """Laws 1 to 5 for one system. `positions`: where to test causality (default: everywhere)."""
    ids = ralm.lm.tokenizer.encode(text)
    check_normalised(ralm, ids)
    check_causal(ralm, ids, positions)
    if prompt:
        check_one_truth(ralm, prompt)
    if ralm.how.how != "none":
        check_neutral(ralm, ids)


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
        gap = float((torch.cat([first.logits, rest], 1) - full).abs().max())
        assert gap < tolerance, f"cached logits differ from full ones by {gap}"
        padded = torch.cat([torch.full((1, 3), lm.bos), row], 1)
        mask = torch.tensor([[0] * 3 + [1] * row.shape[1]])
        gap = float((lm.forward(padded, mask=mask).logits[:, 3:] - full).abs().max())
        assert gap < tolerance, f"left padding moves logits by {gap}"
        gap = float((lm.forward(row, keep=2).logits - full[:, -2:]).abs().max())
        assert gap < tolerance, f"keep=2 gives logits that differ by {gap}"


class Fixed:
    """A retriever that always finds the same chunks (score 0 each), whatever is asked. For laws and for oracles."""

    def __init__(self, store, ids: Sequence[int]):
        self.store, self.ids = store, list(ids)

    def search(self, queries: Sequence[str], k: int = 10, where: str | None = None, exclude: Sequence[str] = ()) -> Hits:
        allowed = self.store.allow(where=where, exclude=exclude)
        out = Hits.empty(len(queries), k)
        kept = [i for i in self.ids if allowed[i]][:k]
        out.ids[:, :len(kept)], out.scores[:, :len(kept)] = kept, 0.0
        return out


def same(ours: np.ndarray, theirs: np.ndarray, law: str, tolerance: float = TOLERANCE) -> None:
    """Assert equality within the tolerance, saying where it fails."""
    assert ours.shape == theirs.shape, f"{law}: {ours.shape} numbers against {theirs.shape}"
    gap = np.abs(ours - theirs)
    assert not len(gap) or gap.max() < tolerance, f"{law}: position {gap.argmax()} gives {ours[gap.argmax()]} against {theirs[gap.argmax()]}"


def documents(texts: Sequence[str], prefix: str = "d", **fields: Callable | str) -> list[Document]:
    """Small documents for tests: ids d0, d1, ..."""
    return [Document(f"{prefix}{i}", t, **fields) for i, t in enumerate(texts)]
