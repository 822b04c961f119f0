"""HOW at the output: one softmax over the vocabulary and a memory of tokens together (`Joint`). TRIME (Zhong et al. 2022, eq. 2).

    p(w | c)  ~  exp(E_w . f(c))  +  sum over (c_j, x_j) in the memory with x_j = w of exp(g(c) . g(c_j) / (sqrt(D) temperature))

f is what the output layer reads, g the state a token store keeps (`ffn_in`), D its width. There is no weight to choose: how much
the memory counts at a token is what its scores sum to beside the logits. That is the distribution which train/joint_in_batch.py
trains, and what sets this apart from kNN-LM (output.py), whose weight is given. A model that was not trained so had no reason to
bring scores and logits to one scale: measure it (bundled:base does well with its own window as memory: docs/log.md).

The memory is the text's own earlier tokens in the window (local: the local and, in windows longer than a training segment, the
long memory of the paper) and the k nearest tokens of a token store with metric=ip (the external memory). The paper reads the
external memory by kNN-LM's rule above the local one: write `trime:k=0+knn:lam=0.3,temperature=T`, T counted in inner products, so
sqrt(D) times what the paper calls its temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from ralm.errors import UsageError
from ralm.how.input import Plain
from ralm.how.output import AtOutput
from ralm.lm.keys import check_key
from ralm.registry import real, whole
from ralm.types import Fusion, LanguageModel, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from ralm.what.token_store import Neighbours, TokenStore

    Span = tuple[Segment, Tensor]

KEPT = 64  # rows whose states are remembered while streaming


@dataclass(frozen=True)
class Joint(AtOutput):
    """k: tokens of the store (0: none, and then no store is needed); temperature: of the memory's scores, 1 as trained (the paper
    tunes it to 1.17 to 1.25); local: whether the text's own earlier tokens are memory; key: the state that is compared."""

    k: int = 1024
    temperature: float = 1.0
    local: bool = True
    key: str = "ffn_in"
    inner: Fusion = field(default_factory=Plain)
    width: int = field(default=0, repr=False)  # of the store's states; `bound` reads it
    what: ClassVar[str] = "tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "hidden"})

    def __post_init__(self):
        whole(0, k=self.k)
        check_key(self.key)
        if not real(self.temperature) or not self.temperature > 0:
            raise UsageError(f"temperature={self.temperature} cannot scale scores; use a finite value above 0")
        if not isinstance(self.local, bool):
            raise UsageError(f"local={self.local} is neither true nor false")
        if not isinstance(self.inner, Plain):
            raise UsageError("trime shares one softmax with the model's own logits, so nothing can stand below it; write it alone, "
                             "or first (trime:k=0+knn)")

    @property
    def asks(self) -> str:
        """What store is needed."""
        return "tokens" if self.k else "nothing"

    def bound(self, tokens: TokenStore) -> Joint:
        """The same; raises UsageError for a token store of another key, or of distances."""
        made = tokens.settings
        if self.k and (made["key"] != self.key or made["metric"] != "ip"):
            raise UsageError(f"trime compares {self.key} by inner product, token store '{tokens.name}' has {made['key']} and "
                             f"metric {made['metric']}; make one with ralm tokens … --metric ip, key={made['key']})")
        return replace(self, width=made["width"]) if self.k else self

    # ---- the contract -----------------------------------------------------------------------------------------------

    def logprobs(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BSV)."""
        yield from self._spans(False, lm, ids_BT, segments, fetch, store)

    def targets(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BS): ln p of the tokens that stand in ids_BT."""
        yield from self._spans(True, lm, ids_BT, segments, fetch, store)

    def _spans(self, targets: bool, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable,
               store) -> Iterator[Span]:
        import torch

        from ralm.how.rows import state_rows, targets_of

        ask = getattr(fetch, "tokens", None) if self.k else None
        if ask is None and not self.local:
            yield from (targets_of(self.inner) if targets else self.inner.logprobs)(lm, ids_BT, segments, fetch, store)
            return
        first, stop = segments[0].start, segments[-1].stop
        rows = [[lm.bos, *row[:stop - 1]] for row in ids_BT.tolist()]
        out = []
        for row, (logp_SV, state) in zip(rows, state_rows(lm, rows, [first + 1] * len(rows), f"{self.key}+z")):
            q_SD, z_S = state[:, :-1], state[:, -1]
            s_SM, values_SM = self._memory(lm, row, first, q_SD, z_S, ask)
            y_S = ids_BT[len(out), first:stop] if targets else None
            out.append(self.mix(logp_SV, z_S, s_SM, values_SM) if y_S is None
                       else self.mix_targets(logp_SV.gather(1, y_S[:, None])[:, 0], z_S, y_S, s_SM, values_SM))
        logp = torch.stack(out)
        for s in segments:
            yield s, logp[:, s.start - first:s.stop - first]

    # ---- the memory -------------------------------------------------------------------------------------------------

    def _memory(self, lm: LanguageModel, row: list[int], first: int, q_SD: Tensor, z_S: Tensor,
                ask: Callable | None) -> tuple[Tensor, Tensor]:
        """Scores [S, M] (-inf where there is nothing) and tokens [S, M] of the memory of the positions from `first` on."""
        import torch

        scores, values = [], []
        if self.local and len(row) > 1:
            keys_LD = torch.cat([self._before(lm, row, first), q_SD]) if first else q_SD
            self._keep(lm, row, keys_LD)
            s_SL = q_SD @ keys_LD[:-1].T / (math.sqrt(q_SD.shape[1]) * self.temperature)
            own = torch.arange(first, len(row))[:, None] > torch.arange(len(row) - 1)  # a token's own state is no memory of it
            scores.append(s_SL.masked_fill(~own, -math.inf))
            values.append(torch.tensor(row[1:]).expand(len(q_SD), -1))
        if ask is not None:
            at = list(range(first, len(row)))
            found = ask(q_SD.numpy(), self.k, at)
            scores.append(self.scores(found))
            values.append(torch.from_numpy(found.values).clamp(min=0))
            self._tell(ask, found, scores, z_S, at)
        if not scores:
            return q_SD.new_full((len(q_SD), 1), -math.inf), torch.zeros(len(q_SD), 1, dtype=torch.long)
        return torch.cat(scores, 1), torch.cat(values, 1)

    def scores(self, found: Neighbours) -> Tensor:
        """g . g_j / (sqrt(D) temperature), with ln w of a row that stands for w tokens, float32 [S, K]; padding -inf."""
        import torch

        s_SK = -torch.from_numpy(found.distances) / (math.sqrt(self.width) * self.temperature)
        return s_SK if found.counts is None else s_SK + torch.log(torch.from_numpy(found.counts))

    def _before(self, lm: LanguageModel, row: list[int], first: int) -> Tensor:
        """The states [first, D] of the row before the positions that are computed now."""
        import torch

        kept = getattr(lm, "local", {})
        if (known := kept.get(tuple(row[:first]))) is not None:
            return known
        with torch.no_grad():
            return getattr(lm, "lm", lm).keys(torch.tensor([row[:first]]), self.key)[0]

    @staticmethod
    def _keep(lm: LanguageModel, row: list[int], keys_LD: Tensor) -> None:
        """Where the model has a memory of rows, remember this one's states: the next token's row goes on from it."""
        kept = getattr(lm, "local", None)
        if kept is not None:
            kept[tuple(row)] = keys_LD
            kept.move_to_end(tuple(row))
            while len(kept) > KEPT:
                kept.popitem(last=False)

    def _tell(self, ask: Callable, found: Neighbours, scores: list[Tensor], z_S: Tensor, at: list[int]) -> None:
        """Report the store's tokens with the share of the probability they hold, for explanations."""
        import numpy as np
        import torch

        there = np.flatnonzero((found.rows >= 0).any(1)) if found.rows.shape[1] else np.zeros(0, np.int64)
        all_S = torch.logsumexp(torch.cat([*scores, z_S[:, None]], 1), 1)
        share_S = torch.exp(torch.logsumexp(scores[-1], 1) - all_S) if scores[-1].shape[1] else torch.zeros_like(z_S)
        ask.used(replace(found, lams=share_S.numpy()).take(there), [at[i] for i in there.tolist()])

    # ---- the arithmetic ---------------------------------------------------------------------------------------------

    def weights(self, found: Neighbours) -> Tensor:
        """The store's tokens among each other, softmax of their scores [S, K], float32."""
        import torch

        return torch.softmax(self.scores(found), -1)

    def lams(self, found: Neighbours) -> Tensor:
        """The share of the probability that the store's tokens hold, float32 [S, 1]."""
        import torch

        return torch.from_numpy(found.lams)[:, None]

    @staticmethod
    def mix(logp_SV: Tensor, z_S: Tensor, s_SM: Tensor, values_SM: Tensor) -> Tensor:
        """ln p over the vocabulary [S, V], from the model's ln p, the ln of its normaliser z, and the memory's scores."""
        import torch

        share_S, rest_S, w_SM = _shares(z_S, s_SM)
        p_SV = torch.zeros_like(logp_SV, dtype=torch.float32).scatter_add_(1, values_SM, w_SM)
        lm_SV = logp_SV + rest_S[:, None]
        there = torch.logaddexp(lm_SV.gather(1, values_SM), share_S[:, None] + torch.log(p_SV.gather(1, values_SM)))
        return lm_SV.scatter(1, values_SM, there)

    @staticmethod
    def mix_targets(logp_S: Tensor, z_S: Tensor, targets_S: Tensor, s_SM: Tensor, values_SM: Tensor) -> Tensor:
        """As `mix`, of one token per position: [S]."""
        import torch

        share_S, rest_S, w_SM = _shares(z_S, s_SM)
        p_S = torch.where(values_SM == targets_S[:, None], w_SM, 0).sum(-1)
        return torch.logaddexp(logp_S + rest_S, share_S + torch.log(p_S))


def _shares(z_S: Tensor, s_SM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ln of the memory's share [S], ln of the vocabulary's [S], and what of its share each entry of the memory holds [S, M]."""
    import torch

    m_S = torch.logsumexp(s_SM, 1)
    all_S = torch.logaddexp(z_S, m_S)
    w_SM = torch.exp(s_SM - torch.where(torch.isneginf(m_S), 0.0, m_S)[:, None])
    return m_S - all_S, z_S - all_S, w_SM
