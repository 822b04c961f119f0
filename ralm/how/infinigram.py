"""HOW at the output, without a neural retriever: the model's distribution is mixed with n-grams of unbounded n (`InfiniGram`).

    n = the longest suffix of x_<t that occurs in the store with a successor
    p_inf(y) = count(suffix y) / count(suffix)                Infini-gram (Liu et al. 2024, section 2)
    p(y) = (1 - lam) p_LM(y) + lam p_inf(y)                   section 5; lam = `sparse` where p_inf gives one token all its mass

That is levels=0. The longest suffix is often seen once or twice and says little; so the suffixes of 1 .. `levels` tokens are mixed
in before it, each over what came of the shorter ones (interpolated n-grams, Jelinek and Mercer 1980, with the model at the bottom).

The estimates are exact counts (`ralm.index.suffix`), so a removed document changes p at once to what it would have been without it,
and `Matches.occurrences` names the documents behind every count. Scoring needs the count of one token per position: `targets`
enumerates nothing; `logprobs` adds the successors to the model's distribution in place (a law says that they agree)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ralm.errors import UsageError
from ralm.how.input import Plain
from ralm.how.output import AtOutput
from ralm.registry import real, whole
from ralm.types import Fusion, LanguageModel, Segment

if TYPE_CHECKING:
    from torch import Tensor

    from ralm.index.suffix import Matches

    Span = tuple[Segment, Tensor]


@dataclass(frozen=True)
class InfiniGram(AtOutput):
    """lam: weight of an estimate, 0 to 1; sparse: its weight where all occurrences have the same successor; levels: suffixes of
    1 .. levels tokens are mixed in below the longest (0: the published form); least: occurrences the longest must have; most:
    tokens of it that are looked at (None: all).

    fetch.suffix(ids, start, stop, least=, most=, levels=) gives the `Matches` of the positions [start, stop) of a text's ids; it is
    None where there is nothing to count, and then `inner` speaks alone (the model, or what stands before: `prepend+infgram`)."""

    lam: float = 0.05
    sparse: float = 0.2
    levels: int = 4
    least: int = 1
    most: int | None = None
    inner: Fusion = field(default_factory=Plain)
    asks: ClassVar[str] = "suffix"

    def __post_init__(self):
        for name in ("lam", "sparse"):
            value = getattr(self, name)
            if not real(value) or not 0 <= value <= 1:
                raise UsageError(f"{name}={value} is not a weight; use 0..1")
        whole(0, levels=self.levels)
        whole(1, least=self.least)
        if self.most is not None:
            whole(0, most=self.most)

    @property
    def what(self) -> str:
        """What is retrieved: counts of token sequences, and states with tokens where a fusion below asks for those."""
        return "tokens" if self.inner.what == "tokens" else "suffix"

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs | {"logits"}

    @property
    def idle(self) -> bool:
        """Whether the counts can change nothing."""
        return self.lam == 0 and self.sparse == 0

    # ---- the contract -----------------------------------------------------------------------------------------------

    def logprobs(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BSV)."""
        import torch

        for s, logp_BSV in self.inner.logprobs(lm, ids_BT, segments, fetch, store):
            found = self._find(ids_BT, s, fetch)
            yield s, logp_BSV if found is None else torch.stack([self.mix(p, f) for p, f in zip(logp_BSV, found)])

    def targets(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BS): ln p of the tokens that stand in ids_BT."""
        import torch

        from ralm.how.rows import targets_of

        for s, logp_BS in targets_of(self.inner)(lm, ids_BT, segments, fetch, store):
            found = self._find(ids_BT, s, fetch)
            yield s, logp_BS if found is None else torch.stack([self.mix_targets(p, f) for p, f in zip(logp_BS, found)])

    def _find(self, ids_BT: Tensor, s: Segment, fetch: Callable) -> list[Matches] | None:
        """The matches of a segment's positions for every row of the batch."""
        if self.idle or getattr(fetch, "suffix", None) is None:
            return None
        options = {"least": self.least, "most": self.most, "levels": self.levels}
        return [fetch.suffix(row, s.start, s.stop, **options) for row in ids_BT.tolist()]

    # ---- the arithmetic ---------------------------------------------------------------------------------------------

    def lams(self, found: Matches) -> Tensor:
        """The estimate's weight at each position, float32 [S]; 0 where there is no estimate."""
        import torch

        sparse_S = torch.from_numpy(found.sparse)
        lam_S = torch.where(sparse_S, torch.tensor(float(self.sparse)), torch.tensor(float(self.lam)))
        return torch.where(torch.from_numpy(found.count > 0), lam_S, 0.0)

    def mix(self, logp_SV: Tensor, found: Matches) -> Tensor:
        """ln [(1 - lam) p_LM + lam p_inf] over the vocabulary, level by level, float32; only successors are touched beyond a
        constant. Raises UsageError where the index holds tokens that the model does not have."""
        import torch

        for shorter in found.shorter:
            logp_SV = self.mix(logp_SV, shorter)
        lam_S, (pointers, tokens, counts) = self.lams(found), found.rows()
        if len(tokens) and tokens.max() >= logp_SV.shape[1]:
            raise UsageError(f"the index holds token {tokens.max()}, the model has {logp_SV.shape[1]} tokens; use an index made "
                             "with the model's own tokenizer")
        pointers, tokens, counts = map(torch.from_numpy, (pointers, tokens, counts))
        rows = torch.repeat_interleave(torch.arange(len(lam_S)), pointers.diff())
        ratio = counts.double() / torch.from_numpy(found.count)[rows]
        lm_SV = logp_SV.float() + torch.log1p(-lam_S)[:, None]
        there = torch.logaddexp(lm_SV[rows, tokens], torch.log(lam_S)[rows] + torch.log(ratio).float())
        out = lm_SV.index_put((rows, tokens), there)
        return torch.where(lam_S[:, None] == 0, logp_SV, out)

    def mix_targets(self, logp_S: Tensor, found: Matches) -> Tensor:
        """As `mix`, of the text's own token at each position: [S]."""
        import torch

        for shorter in found.shorter:
            logp_S = self.mix_targets(logp_S, shorter)
        lam_S = self.lams(found)
        ratio = torch.from_numpy(found.target).double() / torch.from_numpy(found.count).clamp(min=1)
        out = torch.logaddexp(logp_S.float() + torch.log1p(-lam_S), torch.log(lam_S) + torch.log(ratio).float())
        return torch.where(lam_S == 0, logp_S, out)


def check(ralm) -> None:
    """A RALM with a fusion that counts has a suffix index: over the datastore that everything else comes from, in the model's own
    tokens. Raises UsageError where not; a schedule other than every token makes no sense without passages."""
    from ralm.how.output import innermost
    from ralm.index.suffix_parts import tokenizer_fingerprint
    from ralm.when import EveryN, Never, Once

    if ralm.suffix is None:
        raise UsageError(f"{type(ralm.how).__name__} needs a suffix index, none was given; make one (SuffixIndex(store, "
                         "lm.tokenizer)) and pass suffix=…")
    for name, other in (("passages come", ralm.retriever), ("neighbours come", ralm.tokens)):
        if other is not None and other.store.id != ralm.suffix.store.id:
            raise UsageError(f"{name} from {other.store.path}, counts from {ralm.suffix.store.path}; use one datastore")
    if "logits" in ralm.lm.gives and tokenizer_fingerprint(ralm.lm.tokenizer) != ralm.suffix.fingerprint:
        raise UsageError(f"{ralm.suffix!r} was made with another tokenizer than that of '{ralm.lm.name}'; make one with its own")
    if innermost(ralm.how).how == "none":
        if isinstance(ralm.when, Once):
            ralm.when = EveryN(1)
        if not isinstance(ralm.when, Never) and ralm.when != EveryN(1):
            raise UsageError(f"{ralm.when} is a schedule for passages; {type(ralm.how).__name__} counts at every token: leave it "
                             "out")
