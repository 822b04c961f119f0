"""HOW at the output: the model's distribution is mixed with one made of what stood behind similar contexts (`Interpolate`).

    s_i = -distance(q, k_i) / temperature          over the k nearest tokens of the store
    p_kNN(y) = sum_{v_i = y} softmax(s)_i          kNN-LM (Khandelwal et al. 2020, eq. 2)
    p(y) = (1 - lam) p_LM(y) + lam p_kNN(y)        eq. 3

Scoring needs p(y) of one y per token: `targets` compares k values and touches no array of the vocabulary's size; `logprobs` adds
the k values to the model's distribution. Both use the same numbers in float32 (a law says that they agree).

`inner` is what speaks below it: the model alone, or the model reading passages (`prepend+knn`). The states that are asked with, and
the confidence that decides whether to ask, are those of the model reading the text alone: what the store was made of.

A row that stands for w tokens (token_merge.py) enters with s_i + ln w_i, as w equal rows would."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ralm.errors import UsageError
from ralm.how.input import Plain
from ralm.registry import real, whole
from ralm.types import Fusion, LanguageModel, Segment

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ralm.how.adaptive import Gate
    from ralm.what.token_store import Neighbours, TokenStore

    Span = tuple[Segment, Tensor]


class AtOutput:
    """What fusions at the output share: below them speaks `inner`, which takes what room and what query it wants."""

    inner: Fusion
    how: ClassVar[str] = "output"

    @property
    def query_tokens(self) -> int:
        return self.inner.query_tokens

    def reserve(self, lm: LanguageModel) -> int:
        return self.inner.reserve(lm)


@dataclass(frozen=True)
class Interpolate(AtOutput):
    """kNN-LM. k: neighbours; temperature: of the softmax over distances (exact squared Euclidean ones are in the hundreds: tune it,
    ralm tune knn); lam: their weight,

        0..1      the same at every token
        rrc       relative retrieval confidence (NEST, Li et al. 2024, eq. 5): a token is left to the model where its nearest
                  neighbour is hardly nearer than the k-th; alpha, tau: its threshold and width
        learned   what a gate says that was fitted on held-out text and is kept with the token store (how/adaptive.py)

    Searching less: skip: not where the model's own most probable token has at least this probability (1: search always); spare: the
    share of tokens, those with the least weight to be expected, that the learnt gate leaves to the model (He et al. 2021);
    automaton: no search while at least so many of the rows that the last token was found in have a successor (RetoMaton: Alon et
    al. 2022, how/automaton.py; 0: search always)."""

    k: int = 1024
    lam: float | str = 0.25
    temperature: float = 10.0
    skip: float = 1.0
    spare: float = 0.0
    automaton: int = 0
    alpha: float = 0.3
    tau: float = 0.1
    inner: Fusion = field(default_factory=Plain)
    gate: Gate | None = field(default=None, repr=False)  # of lam=learned; `bound` reads it
    what: ClassVar[str] = "tokens"

    def __post_init__(self):
        whole(0, k=self.k, automaton=self.automaton)
        if self.lam not in ("rrc", "learned") and not (real(self.lam) and 0 <= self.lam <= 1):
            raise UsageError(f"lam={self.lam} is not a weight; use 0..1, rrc, or learned")
        if not real(self.temperature) or not self.temperature > 0:
            raise UsageError(f"temperature={self.temperature} cannot scale distances; use a finite value above 0")
        if not real(self.skip) or not 0 <= self.skip <= 1:
            raise UsageError(f"skip={self.skip} is not a probability; use 0..1")
        if not real(self.spare) or not 0 <= self.spare <= 1:
            raise UsageError(f"spare={self.spare} is not a share of tokens; use 0..1")
        if self.spare and self.lam not in ("learned", 0):
            raise UsageError(f"spare={self.spare} needs the learnt gate, lam is {self.lam}; use lam=learned, or skip=PROBABILITY")
        if not real(self.alpha) or not real(self.tau) or not self.tau > 0:
            raise UsageError(f"alpha={self.alpha}, tau={self.tau}: finite numbers, tau above 0")
        if not callable(getattr(self.inner, "logprobs", None)) or isinstance(self.gate, str | int | float):
            raise UsageError("inner and gate are no options of a spec; write what speaks below before a plus: prepend:k=1+knn")

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs | {"logits", "hidden"}

    @property
    def idle(self) -> bool:
        """Whether the neighbours can change nothing."""
        return self.k == 0 or self.lam == 0 or self.skip == 0 or self.spare == 1

    @property
    def wary(self) -> bool:
        """Whether the model's confidence is needed."""
        return self.skip < 1 or self.lam == "learned"

    def bound(self, tokens: TokenStore) -> Interpolate:
        """The same for this token store: with its gate. Raises UsageError, StoreError or FingerprintError where they do not go
        together."""
        if self.lam == "rrc" and tokens.settings["metric"] != "l2":
            raise UsageError(f"lam=rrc compares distances, '{tokens.name}' has {tokens.settings['metric']}; use a token store with "
                             "metric=l2, or a number for lam")
        if self.lam != "learned" or self.gate is not None:
            return self
        from ralm.how.adaptive import Gate

        return replace(self, gate=Gate.load(tokens, self))

    # ---- the contract -----------------------------------------------------------------------------------------------

    def logprobs(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BSV)."""
        yield from self._spans(self.inner.logprobs, False, lm, ids_BT, segments, fetch, store)

    def targets(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BS): ln p of the tokens that stand in ids_BT, without a distribution over the vocabulary."""
        from ralm.how.rows import targets_of

        yield from self._spans(targets_of(self.inner), True, lm, ids_BT, segments, fetch, store)

    def _spans(self, below: Callable, targets: bool, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment],
               fetch: Callable, store) -> Iterator[Span]:
        """All neighbours in one search, then segment by segment what speaks below, mixed with them."""
        import torch

        if self.idle or fetch.tokens is None:
            yield from below(lm, ids_BT, segments, fetch, store)
            return
        first, stop = segments[0].start, segments[-1].stop
        begin = first
        if self.automaton:
            from ralm.how import automaton

            begin = automaton.begin(lm, ids_BT[:, :stop - 1].tolist(), first)
        keys_BSD, sure_BS2, alone = self._read(lm, ids_BT, begin, stop, fetch.tokens.key, targets)
        if alone is not None:
            alone = alone[:, first - begin:]
        found, where = self._find(lm, ids_BT[:, :stop - 1], keys_BSD, sure_BS2, fetch.tokens, begin, first)
        spans = below(lm, ids_BT, segments, fetch, store) if alone is None else self._given(alone, segments)
        for s, logp in spans:
            rows = []
            for b, logp_S in enumerate(logp):
                own = where[0] == b
                own &= (where[1] >= s.start) & (where[1] < s.stop)
                some = torch.from_numpy(where[1][own] - s.start)
                if len(some):
                    near, some_logp = found.take(own), logp_S[some]
                    logp_S = logp_S.clone()
                    logp_S[some] = (self.mix_targets(some_logp, ids_BT[b, s.start:s.stop][some], near) if targets
                                    else self.mix(some_logp, near))
                rows.append(logp_S)
            yield s, torch.stack(rows)

    def _read(self, lm: LanguageModel, ids_BT: Tensor, begin: int, stop: int, key: str,
              targets: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the positions [begin, stop): states [B, S, D] of the text alone; the model's confidence [B, S, 2] where it is needed;
        and where nothing but the model speaks below, ln p of the targets [B, S] or of the vocabulary [B, S, V]."""
        import torch

        from ralm.how.rows import PrefixCache, confidence, state_rows, target_rows

        rows, alone = [[lm.bos, *row[:stop - 1]] for row in ids_BT.tolist()], isinstance(self.inner, Plain)
        if not isinstance(lm, PrefixCache) and not alone and not self.wary:  # no distribution is needed: stop at the state
            return torch.cat([lm.keys(torch.tensor([r]), key)[:, begin:] for r in rows]), None, None
        if not isinstance(lm, PrefixCache) and (targets or not alone) and ids_BT.shape[1] >= stop:
            read = target_rows(lm, rows, ids_BT[:, begin:stop], key, told=self.wary)
            logp, sure, keys = zip(*read)
        else:
            logp, keys = zip(*state_rows(lm, rows, [begin + 1] * len(rows), key))
            sure = [confidence(p) for p in logp] if self.wary else None
            if targets:
                logp = [p.gather(1, t[:, None])[:, 0] for p, t in zip(logp, ids_BT[:, begin:stop])]
        return torch.stack(keys), torch.stack(sure) if self.wary else None, torch.stack(logp) if alone else None

    @staticmethod
    def _given(logp: Tensor, segments: Sequence[Segment]) -> Iterator[Span]:
        first = segments[0].start
        for s in segments:
            yield s, logp[:, s.start - first:s.stop - first]

    def _find(self, lm: LanguageModel, ids_BT: Tensor, keys_BSD: Tensor, sure_BS2: Tensor | None, ask: Callable, begin: int,
              first: int) -> tuple[Neighbours, tuple[np.ndarray, np.ndarray]]:
        """Neighbours [n, K] of the positions from `first` that have some, and which those are: rows [n] and positions [n]."""
        import numpy as np

        wanted_BS = self._wanted(keys_BSD, sure_BS2)
        if self.automaton:
            from ralm.how import automaton

            found = automaton.follow(lm, ids_BT.tolist(), keys_BSD.numpy(), wanted_BS, self.k, self.automaton, ask, begin, first)
            wanted_BS[:, :first - begin] = False
        else:
            at = np.nonzero(wanted_BS)
            found = ask(keys_BSD.numpy()[at], self.k, (begin + at[1]).tolist())
        row, place = np.nonzero(wanted_BS)
        there = (found.rows >= 0).any(1) if found.rows.shape[1] else np.zeros(len(row), bool)
        found, row, place = found.take(there), row[there], place[there]
        if self.lam == "learned":
            found = replace(found, lams=self.gate.lams(keys_BSD[row, place], sure_BS2[row, place], found, self.temperature))
        ask.used(found, (begin + place).tolist())
        return found, (row, begin + place)

    def _wanted(self, keys_BSD: Tensor, sure_BS2: Tensor | None) -> np.ndarray:
        """bool [B, S]: which tokens are worth a search."""
        import numpy as np

        wanted_BS = np.ones(keys_BSD.shape[:2], bool)
        if self.skip < 1:
            wanted_BS &= (sure_BS2[..., 0] < math.log(self.skip)).numpy()
        if self.spare:
            wanted_BS &= self.gate.asks(keys_BSD, sure_BS2, self.spare)
        return wanted_BS

    # ---- the arithmetic ---------------------------------------------------------------------------------------------

    def weights(self, found: Neighbours) -> Tensor:
        """softmax(-distance / temperature + ln count) [S, K], float32; padding has weight 0."""
        import torch

        d_SK = torch.from_numpy(found.distances)
        s_SK = (d_SK[:, :1] - d_SK) / self.temperature  # the nearest one first: it is 0, whatever the temperature
        if found.counts is not None:
            s_SK = s_SK + torch.log(torch.from_numpy(found.counts))
        return torch.softmax(s_SK, -1)

    def lams(self, found: Neighbours) -> Tensor:
        """The neighbours' weight at each position, float32 [S, 1]."""
        import torch

        if self.lam == "learned":
            return torch.from_numpy(found.lams)[:, None]
        if self.lam != "rrc":
            return torch.full((len(found.rows), 1), float(self.lam))
        d = torch.from_numpy(found.distances).double()
        far = torch.where(torch.isinf(d), -torch.inf, d).max(-1, keepdim=True).values
        ratio = torch.where(far > 0, d[:, :1] / far.clamp(min=1e-30), torch.ones_like(far))
        return (1 - torch.sigmoid((ratio - self.alpha) / self.tau)).float()  # the sigmoid is the model's weight

    def mix(self, logp_SV: Tensor, found: Neighbours) -> Tensor:
        """ln [(1 - lam) p_LM + lam p_kNN] over the vocabulary; only the neighbours' values are touched beyond a constant."""
        import torch

        values_SK = torch.from_numpy(found.values).clamp(min=0)
        lam_S1, w_SK = self.lams(found), self.weights(found)
        p_SV = torch.zeros_like(logp_SV, dtype=torch.float32).scatter_add_(1, values_SK, w_SK)
        lm_SV = logp_SV + torch.log1p(-lam_S1)
        there = torch.logaddexp(lm_SV.gather(1, values_SK), torch.log(lam_S1) + torch.log(p_SV.gather(1, values_SK)))
        out = lm_SV.scatter(1, values_SK, there)
        return torch.where(lam_S1 == 0, logp_SV, out)

    def mix_targets(self, logp_S: Tensor, targets_S: Tensor, found: Neighbours) -> Tensor:
        """As `mix`, of one token per position: [S]."""
        import torch

        lam_S, w_SK = self.lams(found)[:, 0], self.weights(found)
        p_S = torch.where(torch.from_numpy(found.values) == targets_S[:, None], w_SK, 0).sum(-1)
        out = torch.logaddexp(logp_S + torch.log1p(-lam_S), torch.log(lam_S) + torch.log(p_S))
        return torch.where(lam_S == 0, logp_S, out)


def innermost(how: Any) -> Any:
    """The fusion that reads passages (or none), below those at the output."""
    while getattr(how, "inner", None) is not None:
        how = how.inner
    return how


def asking(how: Any, what: str) -> Any:
    """The uppermost fusion at the output that asks a store of `what` (tokens, suffix), None where none does."""
    while how is not None and not (how.how == "output" and getattr(how, "asks", how.what) == what):
        how = getattr(how, "inner", None)
    return how


def bound(how: Any, tokens: TokenStore) -> Any:
    """A fusion whose parts know the token store they ask (`Interpolate.bound`), wherever they stand."""
    if (inner := getattr(how, "inner", None)) is not None and (other := bound(inner, tokens)) is not inner:
        how = replace(how, inner=other)
    return how.bound(tokens) if hasattr(how, "bound") else how
