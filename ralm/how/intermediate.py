"""HOW in the middle: a model that can (lm/retro.py) reads the neighbours of each chunk of its text (`CrossAttend`).

A row [BOS, text] is cut into chunks of m tokens, BOS counted: chunk u is row tokens [u m, (u+1) m). Once its last token is read,
the k chunks of the neighbour database that are most like it are looked for, and with their continuations they are what the last
token of chunk u and the m - 1 that follow attend to (lm/chunks.py has the arithmetic):

    m = 4    row      BOS  a  b  c | d  e  f  g | h ..
             asks with     a  b  c   d  e  f  g
             predicts       a  b  c  d  e  f  g  h ..
             under          -  -  -  0  0  0  0  1 ..       d is the first token that neighbours of (a b c) can change

Every chunk of a window is read, also before the part that is scored: earlier neighbours act on later tokens through the model's own
attention. The engine (run.py) asks and remembers; this turns what it found into distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ralm.errors import FingerprintError, UsageError
from ralm.registry import whole
from ralm.types import LanguageModel, Segment
from ralm.when import EveryN, Never, Once

if TYPE_CHECKING:
    from torch import Tensor

    from ralm.how.rows import Beside
    from ralm.model import RALM

    Span = tuple[Segment, Tensor]


@dataclass(frozen=True)
class CrossAttend:
    """RETRO (Borgeaud et al. 2022): the k nearest chunks to each chunk of the text, with their continuations. k=0 is RETRO[OFF].

    fetch.neighbours(k, n) gives what a row of n text tokens is read beside (`rows.Beside`); it is None where there is nothing to
    find, and then the model speaks alone."""

    k: int = 2
    what: ClassVar[str] = "chunks"
    how: ClassVar[str] = "intermediate"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "neighbours"})
    query_tokens: ClassVar[int] = 0  # the query is the chunk

    def __post_init__(self):
        whole(0, k=self.k)

    def reserve(self, lm: LanguageModel) -> int:
        return 0

    def logprobs(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BSV); one forward for all segments, one search for all chunks that are new."""
        from ralm.how.rows import window_rows

        return window_rows(lm, ids_BT, segments, self._beside(fetch, segments[-1].stop))

    def targets(self, lm: LanguageModel, ids_BT: Tensor, segments: Sequence[Segment], fetch: Callable, store) -> Iterator[Span]:
        """Yield (segment, logp_BS): ln p of the tokens that stand in ids_BT."""
        from ralm.how.rows import window_targets

        return window_targets(lm, ids_BT, segments, self._beside(fetch, segments[-1].stop))

    def _beside(self, fetch: Callable, stop: int) -> Beside | None:
        return None if fetch.neighbours is None else fetch.neighbours(self.k, stop - 1)


def check(ralm: RALM) -> None:
    """A RALM that cross-attends has a model that can, and a neighbour database that is cut as the model reads: m tokens of the same
    tokenizer, over the datastore that everything else comes from. Raises CapabilityError, UsageError, FingerprintError.

    Its schedule is every m tokens; `never` is RETRO[OFF]."""
    found, lm = ralm.neighbours, ralm.lm
    if "neighbours" not in lm.gives:
        ralm._refuse("CrossAttend", CrossAttend.needs)
    if found is None:
        raise UsageError("CrossAttend needs a neighbour database, none was given; make one (NeighbourStore.build, ralm neighbours) "
                         "and pass neighbours=…")
    if found.m != lm.m:
        raise UsageError(f"the neighbours are chunks of {found.m} tokens, '{lm.name}' reads chunks of {lm.m}; make a database with "
                         f"m={lm.m}")
    _check_tokenizer(found, lm)
    for name, other in (("passages come", ralm.retriever), ("tokens come", ralm.tokens), ("counts come", ralm.suffix)):
        if other is not None and other.store.id != found.store.id:
            raise UsageError(f"{name} from {other.store.path}, neighbours from {found.store.path}; use one datastore")
    if isinstance(ralm.when, Once):
        ralm.when = EveryN(lm.m)
    if not isinstance(ralm.when, Never) and ralm.when != EveryN(lm.m):
        raise UsageError(f"{ralm.when} is a schedule for passages; CrossAttend looks for neighbours of every chunk of {lm.m} "
                         "tokens: leave it out")


def _check_tokenizer(found, lm: LanguageModel) -> None:
    from ralm.index.suffix_parts import tokenizer_fingerprint

    if (ours := getattr(lm, "_cuts", None)) is None:  # once per model: a tokenizer is megabytes of JSON
        ours = lm._cuts = tokenizer_fingerprint(lm.tokenizer)
    if found.settings["fingerprint"] != ours:
        raise FingerprintError(f"{found!r} was made with another tokenizer than that of '{lm.name}'; make one with its own")
