"""HOW at the output: the model's distribution is mixed with one made of what stood behind similar contexts (`Interpolate`).

    s_i = -distance(q, k_i) / temperature          over the k nearest tokens of the store
    p_kNN(y) = sum_{v_i = y} softmax(s)_i          kNN-LM (Khandelwal et al. 2020, eq. 2)
    p(y) = (1 - lam) p_LM(y) + lam p_kNN(y)        eq. 3

Scoring needs p(y) of one y per token: `targets` compares k values and touches no array of the vocabulary's size; `logprobs` adds
the k values to the model's distribution. Both use the same numbers in float32 (a law says that they agree).

`inner` is what speaks below it: the model alone, or the model reading passages (`prepend+knn`). The states that are asked with are
those of the text alone, which is what the store was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ralm.errors import UsageError
from ralm.how.input import Plain
from ralm.registry import real, whole
from ralm.types import Fusion, LanguageModel, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from ralm.what.token_store import Neighbours

    Span = tuple[Segment, Tensor]


@dataclass(frozen=True)
class Interpolate:
    """kNN-LM. k: neighbours; lam: their weight, 0 to 1, or "rrc": relative retrieval confidence (NEST, Li et al. 2024, eq. 5), by
    which a token is left to the model where its nearest neighbour is hardly nearer than the k-th; temperature: of the softmax over
    distances (exact squared Euclidean ones are in the hundreds: tune it, ralm tune knn).

    skip: no search where the model's own most probable token has at least this probability (1: never; He et al. 2021 learn what to
    skip, a threshold needs no training). alpha, tau: of rrc."""

    k: int = 1024
    lam: float | str = 0.25
    temperature: float = 10.0
    skip: float = 1.0
    alpha: float = 0.3
    tau: float = 0.1
    inner: Fusion = field(default_factory=Plain)
    what: ClassVar[str] = "tokens"
    how: ClassVar[str] = "output"

    def __post_init__(self):
        whole(0, k=self.k)
        if self.lam != "rrc" and not (real(self.lam) and 0 <= self.lam <= 1):
            raise UsageError(f"lam={self.lam} is not a weight; use 0..1, or rrc")
        if not real(self.temperature) or not self.temperature > 0:
            raise UsageError(f"temperature={self.temperature} cannot scale distances; use a finite value above 0")
        if not real(self.skip) or not 0 <= self.skip <= 1:
            raise UsageError(f"skip={self.skip} is not a probability; use 0..1")
        if not real(self.alpha) or not real(self.tau) or not self.tau > 0:
            raise UsageError(f"alpha={self.alpha}, tau={self.tau}: finite numbers, tau above 0")

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs | {"logits", "hidden"}

    @property
    def query_tokens(self) -> int:
        return self.inner.query_tokens

    def reserve(self, lm: LanguageModel) -> int:
        return self.inner.reserve(lm)

    @property
    def idle(self) -> bool:
        """Whether the neighbours can change nothing."""
        return self.k == 0 or self.lam == 0

    # ---- the contract -----------------------------------------------------------------------------------------------

    def logprobs(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BSV)."""
        import torch

        if self.idle or fetch.tokens is None:
            yield from self.inner.logprobs(lm, ids_BT, segments, fetch, store)
            return
        first, stop = segments[0].start, segments[-1].stop
        keys_BSD, whole_BSV = self._read(lm, ids_BT, first, stop, fetch.tokens.key)
        inner = (self._given(whole_BSV, segments) if whole_BSV is not None
                 else self.inner.logprobs(lm, ids_BT, segments, fetch, store))
        for s, logp_BSV in inner:
            part, at = slice(s.start - first, s.stop - first), range(s.start, s.stop)
            yield s, torch.stack([self._mixed(logp_BSV[b], keys_BSD[b, part], fetch, at) for b in range(len(ids_BT))])

    def targets(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BS): ln p of the tokens that stand in ids_BT, without a distribution over the vocabulary."""
        import torch

        if self.idle or fetch.tokens is None or not isinstance(self.inner, Plain):
            from ralm.how.rows import of_targets

            speaks = self.inner if self.idle or fetch.tokens is None else self
            yield from of_targets(speaks, lm, ids_BT, segments, fetch, store)
            return
        from ralm.how.rows import target_rows

        first, stop = segments[0].start, segments[-1].stop
        rows = [[lm.bos, *row[:stop - 1]] for row in ids_BT.tolist()]
        read = target_rows(lm, rows, ids_BT[:, first:stop], fetch.tokens.key, best=self.skip < 1)
        for s in segments:
            out = []
            for b, (logp_S, best_S, keys_SD) in enumerate(read):
                part = slice(s.start - first, s.stop - first)
                found, some = self._find(keys_SD[part], best_S[part] if best_S is not None else None, fetch, range(s.start, s.stop))
                logp_S = logp_S[part].clone()
                if len(some):
                    logp_S[some] = self.mix_targets(logp_S[some], ids_BT[b, s.start:s.stop][some], found)
                out.append(logp_S)
            yield s, torch.stack(out)

    def _read(self, lm: LanguageModel, ids_BT: Tensor, first: int, stop: int, key: str) -> tuple[Tensor, Tensor | None]:
        """States [B, S, D] of the text alone, and the model's distributions [B, S, V] where it is the model alone that speaks."""
        import torch

        from ralm.how.rows import state_rows

        rows = [[lm.bos, *row[:stop - 1]] for row in ids_BT.tolist()]
        read = state_rows(lm, rows, [first + 1] * len(rows), key)
        keys_BSD = torch.stack([k for _, k in read])
        return keys_BSD, torch.stack([p for p, _ in read]) if isinstance(self.inner, Plain) else None

    @staticmethod
    def _given(logp_BSV: Tensor, segments: Sequence[Segment]) -> Iterator[Span]:
        first = segments[0].start
        for s in segments:
            yield s, logp_BSV[:, s.start - first:s.stop - first]

    def _mixed(self, logp_SV: Tensor, keys_SD: Tensor, fetch: Callable, at: range) -> Tensor:
        best_S = logp_SV.max(-1).values if self.skip < 1 else None
        found, some = self._find(keys_SD, best_S, fetch, at)
        if not len(some):
            return logp_SV
        out = logp_SV.clone()
        out[some] = self.mix(logp_SV[some], found)
        return out

    def _find(self, keys_SD: Tensor, best_S: Tensor | None, fetch: Callable, at: range) -> tuple[Neighbours, Tensor]:
        """Neighbours of the positions that are searched, and which those are (indices among these S)."""
        import torch

        some = torch.arange(len(keys_SD))
        if best_S is not None:
            some = some[best_S < math.log(self.skip)] if self.skip else some[:0]
        found = fetch.tokens(keys_SD[some].numpy(), self.k, [at[i] for i in some.tolist()])
        keep = torch.from_numpy(found.rows[:, :1] >= 0)[:, 0] if found.rows.shape[1] else torch.zeros(len(some), dtype=torch.bool)
        if not bool(keep.all()):
            import numpy as np

            index = np.flatnonzero(keep.numpy())
            found = type(found)(found.rows[index], found.distances[index], found.values[index])
        return found, some[keep]

    # ---- the arithmetic ---------------------------------------------------------------------------------------------

    def weights(self, found: Neighbours) -> Tensor:
        """softmax(-distance / temperature) [S, K], float32; padding has weight 0."""
        import torch

        s_SK = -torch.from_numpy(found.distances) / self.temperature
        return torch.softmax(s_SK, -1)

    def lams(self, found: Neighbours) -> Tensor:
        """The neighbours' weight at each position, float32 [S, 1]."""
        import torch

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
