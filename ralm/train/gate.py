"""Fitting the gate of kNN-LM (how/adaptive.py) on held-out text (He et al. 2021, section 4.1).

Every text is searched once; what the gate reads and both probabilities of each token are kept, and the network is fitted on

    mean over tokens of  -ln [(1 - w) p_LM(y) + w p_kNN(y)]  +  l1 * w        w = gate(features)

as they do it: 5 layers of 128, dropout 0.2, Adam with 5e-4, batches of 64; l1 makes it say no where neighbours change little. The
text is cut in pieces of SPLIT tokens and every tenth is kept apart; of all epochs the one that is best there is kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ralm import progress
from ralm.errors import UsageError
from ralm.eval.tune import mixed, probabilities, searched
from ralm.how.adaptive import MOST, Gate, Net, about_model, about_neighbours, fitted_for
from ralm.how.output import Interpolate
from ralm.registry import real, whole
from ralm.types import Document

if TYPE_CHECKING:
    from ralm.model import RALM

SPLIT, APART = 256, 10  # tokens of a piece; every APART-th piece is not fitted on
LEAST = 1e-12  # probability that neighbours are taken to give to a token none of them holds


@dataclass(frozen=True)
class Examples:
    """What tokens of held-out text are fitted with: features [N, F], ln p of the model and of the neighbours [N]."""

    model: Tensor
    neighbours: Tensor | None
    logp_lm: Tensor
    logp_knn: Tensor

    def __len__(self) -> int:
        return len(self.logp_lm)

    def take(self, index: Tensor) -> Examples:
        return Examples(*(None if x is None else x[index] for x in vars(self).values()))

    def features(self, late: bool) -> Tensor:
        return torch.cat([self.model, self.neighbours], 1) if late else self.model


def fit_gate(ralm: RALM, texts: Sequence[Document | str | tuple[str, str]], neighbours: bool = True, *, layers: int = 5,
             width: int = 128, dropout: float = 0.2, rate: float = 5e-4, batch: int = 64, epochs: int = 10, l1: float = 0.05,
             seed: int = 0, window: int | None = None, stride: int | None = None, exclude_self: bool = True,
             keep: bool = True) -> dict[str, Any]:
    """Fit the gate for `ralm.how` (its k and temperature) and keep it with the token store, for lam=learned.

    texts: held-out ones; what is measured with the gate must be another text still. neighbours: the weight may look at what was
    found (whether to search never does), where that is better on the text kept apart. l1: of the gate that decides about searches.
    keep: False only measures.

    Returns nats per token on the tenth that was kept apart: {"model", "fixed" (the best single weight, chosen there: what the gate
    must beat), "lam", "early", "late" (None without neighbours), "weight": which of the two gives the weight, "spare": {share: nats
    per token}, "tokens", "apart", "seconds", "gate"}. Raises UsageError for less than APART pieces of text, or a system without
    neighbours."""
    began, how = time.perf_counter(), ralm.how
    if not isinstance(how, Interpolate) or how.k < 1:
        raise UsageError(f"{how!r} has no neighbours to weigh; use how=knn:k=…,temperature=…")
    whole(1, layers=layers, width=width, batch=batch, epochs=epochs)
    if not real(l1) or l1 < 0 or not real(dropout) or not 0 <= dropout < 1:
        raise UsageError(f"l1={l1}, dropout={dropout}: l1 is at least 0, dropout from 0 to below 1")
    found = examples(ralm, texts, neighbours, window, stride, exclude_self)
    piece = torch.arange(len(found)) // SPLIT
    if len(found) < APART * SPLIT:
        raise UsageError(f"a gate is fitted on at least {APART * SPLIT:,} tokens, the texts have {len(found):,}; give more text")
    fit, apart = found.take(piece % APART != APART - 1), found.take(piece % APART == APART - 1)
    settings = dict(layers=layers, width=width, dropout=dropout, rate=rate, batch=batch, epochs=epochs, seed=seed)
    early = train(fit, apart, False, l1=l1, **settings)
    late = train(fit, apart, True, l1=0.0, **settings) if neighbours else None
    told = {name: None if net is None else _nats(net, apart, name == "late") for name, net in (("early", early), ("late", late))}
    late = late if late and told["late"] < told["early"] else None
    with torch.inference_mode():
        levels = torch.quantile(early(fit.model), torch.linspace(0, 1, 101))
    gate = Gate(early, late, levels, fitted_for(ralm.tokens, how) | {"tokens": len(found), "inner": repr(how.inner)})
    if keep:
        gate.save(ralm.tokens)
    told["weight"] = "late" if late else "early"
    sizes = {"tokens": len(found), "apart": len(apart)}
    return _measured(gate, apart) | told | sizes | {"seconds": time.perf_counter() - began, "gate": gate}


def examples(ralm: RALM, texts: Sequence[Document | str | tuple[str, str]], neighbours: bool, window: int | None,
             stride: int | None, exclude_self: bool) -> Examples:
    """Every token of the texts that has neighbours."""
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    k, temperature = ralm.how.k, ralm.how.temperature
    for found in searched(ralm, texts, k, window, stride, exclude_self, states=True):
        if len(found.at):
            logp = np.log(np.maximum(probabilities(found, [k], temperature)[:, 0], LEAST))
            parts.append((about_model(torch.from_numpy(found.keys), torch.from_numpy(found.sure)),
                          about_neighbours(found.near, temperature, k) if neighbours else torch.empty(0),
                          torch.from_numpy(found.logp[found.at]).float(), torch.from_numpy(logp).float()))
    if not parts:
        raise UsageError("the texts have no token with neighbours; give longer ones, or a token store that is not empty")
    model, near, logp_lm, logp_knn = (torch.cat(x) for x in zip(*parts))
    return Examples(model, near if neighbours else None, logp_lm, logp_knn)


def loss(weight_N: Tensor, some: Examples, l1: float = 0.0) -> Tensor:
    """Mean nats per token, and l1 times the mean weight."""
    both = torch.logaddexp(torch.log1p(-weight_N) + some.logp_lm, torch.log(weight_N) + some.logp_knn)
    return -both.mean() + l1 * weight_N.mean()


def train(fit: Examples, apart: Examples, late: bool, *, layers: int, width: int, dropout: float, rate: float, batch: int,
          epochs: int, l1: float, seed: int) -> Net:
    """The network of the epoch that is best on what is kept apart."""
    torch.manual_seed(seed)
    x_NF = fit.features(late)
    mean, scale = x_NF.mean(0), x_NF.std(0).clamp(min=1e-6)
    sizes = [x_NF.shape[1], *[width] * (layers - 1), 1]
    linear = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    torch.nn.init.zeros_(linear[-1].weight)
    torch.nn.init.constant_(linear[-1].bias, -1.0)  # weight 0.27 before it has learnt anything
    optimiser = torch.optim.Adam([p for one in linear for p in one.parameters()], lr=rate)
    order, best = np.random.default_rng(seed), (np.inf, None)
    with progress.task("fit gate", total=epochs * len(fit), unit="tokens") as advance:
        for _ in range(epochs):
            for at in torch.from_numpy(order.permutation(len(fit))).split(batch):
                some = fit.take(at)
                x = (some.features(late) - mean) / scale
                for one in linear[:-1]:
                    x = torch.nn.functional.dropout(torch.relu(one(x)), dropout)
                loss(torch.sigmoid(linear[-1](x)[:, 0]) * MOST, some, l1).backward()
                optimiser.step()
                optimiser.zero_grad()
                advance(len(at))
            with torch.inference_mode():
                net = Net(mean, scale, tuple((one.weight.detach().clone(), one.bias.detach().clone()) for one in linear))
                now = float(loss(net(apart.features(late)), apart, l1))
            best = min(best, (now, net), key=lambda pair: pair[0])
    return best[1]


def _nats(net: Net, apart: Examples, late: bool) -> float:
    with torch.inference_mode():
        return float(loss(net(apart.features(late)), apart))


def _measured(gate: Gate, apart: Examples) -> dict[str, Any]:
    """Nats per token of the tokens kept apart: the model, one weight for all, and the gate with a share of searches spared."""
    lm, knn = apart.logp_lm.double().numpy(), apart.logp_knn.double().numpy()
    fixed = {lam: -mixed(lm, np.exp(knn), lam).mean() for lam in np.linspace(0.02, 0.98, 49)}
    lam = min(fixed, key=fixed.get)
    with torch.inference_mode():
        early = gate.early(apart.model).double().numpy()
        used = early if gate.late is None else gate.late(apart.features(True)).double().numpy()
    levels = gate.levels.double().numpy()
    spare = {share: -np.where(early > levels[round(100 * share)], mixed(lm, np.exp(knn), used), lm).mean()
             for share in (0.0, 0.25, 0.5, 0.75, 0.9)}
    return {"model": float(-lm.mean()), "fixed": float(fixed[lam]), "lam": float(lam),
            "spare": {share: float(nats) for share, nats in spare.items()}}
