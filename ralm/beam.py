"""Beam search over the system's distribution: the continuations of largest ln p / tokens ^ length_penalty.

The rules are those of transformers (5.x, early_stopping=False), so that with how="none" the two agree: of the 2 B best
continuations of all beams those among the first B that end are finished, the best B that do not end go on, and it is over when B
are finished and the best beam, divided by its present length, is no better than the worst of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ralm.errors import UsageError
from ralm.registry import real, whole
from ralm.types import Evidence

if TYPE_CHECKING:
    from ralm.model import RALM


@dataclass(frozen=True)
class Hypothesis:
    """A continuation. logp: its ln p under the whole system (the end token's included, where it ended so)."""

    text: str  # as streams tell it: without a character that the last token leaves unfinished
    tokens: tuple[int, ...]  # without the end token
    logp: float
    score: float  # logp / (tokens drawn) ^ length_penalty
    reason: str  # "eos" | "length"
    evidence: Sequence[Evidence]


def beam(ralm: RALM, prompt: str, *, beams: int, max_tokens: int, length_penalty: float, window: int | None, stride: int | None,
         exclude: tuple[str, ...], query: str | None) -> list[Hypothesis]:
    """As `RALM.beam`."""
    import torch

    from ralm.generate import Lockstep, check_length

    whole(1, beams=beams)
    check_length(max_tokens)
    if not real(length_penalty):
        raise UsageError(f"length_penalty={length_penalty} is no number")
    run = ralm._run("", prompt, window, stride, exclude, query or prompt)
    together, prompted = Lockstep(ralm), len(run.ids)
    live, finished = [(torch.zeros(()), run, together.enter(run))], []
    for n in range(1, max_tokens + 1):
        logp_BV = torch.stack(together.step([desk for *_, desk in live])) + torch.stack([score for score, *_ in live])[:, None]
        V = logp_BV.shape[1]
        best, at = logp_BV.flatten().topk(min(2 * beams, logp_BV.numel()))
        going = []
        for rank, (logp, i) in enumerate(zip(best, at.tolist())):
            parent, token = live[i // V][1], i % V
            ends = token == ralm.lm.eos
            if ends or n == max_tokens:
                if rank < beams:
                    finished.append((float(logp / n ** length_penalty), float(logp), parent, token, "eos" if ends else "length"))
            elif len(going) < beams:
                going.append((logp, parent, token))
        finished = sorted(finished, key=lambda f: -f[0])[:beams]  # stable: of equal ones the first found stays
        if not going or (len(finished) == beams and float(going[0][0] / n ** length_penalty) <= finished[-1][0]):
            break
        live = [(logp, *_goes_on(together, parent, token)) for logp, parent, token in going]
    return [_told(ralm, prompted, *f) for f in finished]


def _goes_on(together: Any, parent: Any, token: int) -> tuple[Any, Any]:
    """A run that is `parent` with one more token, and its desk."""
    run = parent.fork()
    run.ids.append(token)
    return run, together.enter(run)


def _told(ralm: RALM, prompted: int, score: float, logp: float, run: Any, token: int, reason: str) -> Hypothesis:
    tokens = (*run.ids[prompted:], *(() if reason == "eos" else (token,)))
    return Hypothesis(ralm.lm.tokenizer.decode(tokens).rstrip("\ufffd"), tokens, logp, score, reason, run.evidence)
