"""A learnt weight for the neighbours of each token, and whether they are worth a search (He et al. 2021, section 4.1).

A gate is a small network that reads what the model knows before any search: its state, how sure it is and its entropy. A second
one, where it was asked for, reads the neighbours too: their distances and how many distinct tokens they hold at growing ranks
(adaptive kNN-MT: Zheng et al. 2021, section 3.2), and how peaked their distribution is. The weight is the second one's where there
is one; whether to search is decided by the first.

A gate is fitted (ralm/train/gate.py) for one model, token store, k and temperature, kept as a part of the token store, and refused
for others. It is a parameter, as the model's weights are: a removed document is not found again, but what the gate learnt while it
was there stays until it is fitted anew.

Shapes: N tokens, K neighbours, D width of a key, F features."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ralm.errors import FingerprintError, StoreError
from ralm.index import manifest
from ralm.index.compiled import compiled

if TYPE_CHECKING:
    from ralm.how.output import Interpolate
    from ralm.what.token_store import Neighbours, TokenStore

MOST = 0.99  # largest weight: a token that no neighbour holds keeps a hundredth of the model's probability
FILES = ("gate.safetensors", "gate.json")


@dataclass(frozen=True)
class Net:
    """sigmoid of a multilayer perceptron with ReLU, over standardised features."""

    mean: Tensor  # [F]
    scale: Tensor  # [F]
    layers: tuple[tuple[Tensor, Tensor], ...]  # weight [out, in], bias [out]

    def __call__(self, x_NF: Tensor) -> Tensor:
        """float32 [N]."""
        x = (x_NF - self.mean) / self.scale
        for i, (weight, bias) in enumerate(self.layers):
            x = x @ weight.T + bias
            x = torch.relu(x) if i < len(self.layers) - 1 else x
        return torch.sigmoid(x[:, 0]) * MOST

    def tensors(self, name: str) -> dict[str, Tensor]:
        out = {f"{name}.mean": self.mean, f"{name}.scale": self.scale}
        for i, (weight, bias) in enumerate(self.layers):
            out |= {f"{name}.{i}.weight": weight, f"{name}.{i}.bias": bias}
        return {k: v.detach().float().contiguous() for k, v in out.items()}

    @staticmethod
    def of(tensors: dict[str, Tensor], name: str) -> Net | None:
        if f"{name}.mean" not in tensors:
            return None
        depth = sum(k.startswith(f"{name}.") and k.endswith(".weight") for k in tensors)
        return Net(tensors[f"{name}.mean"], tensors[f"{name}.scale"],
                   tuple((tensors[f"{name}.{i}.weight"], tensors[f"{name}.{i}.bias"]) for i in range(depth)))


@dataclass(frozen=True)
class Gate:
    """early reads the model, late the neighbours too (None: early gives the weight); levels: the 0, 1, .. 100 % quantiles of
    early's weight on the text it was fitted on; made_for: what it was fitted for and on."""

    early: Net
    late: Net | None
    levels: Tensor  # float32 [101]
    made_for: dict[str, Any] = field(default_factory=dict)

    def lams(self, keys_ND: Tensor, sure_N2: Tensor, found: Neighbours, temperature: float) -> np.ndarray:
        """float32 [N]: the neighbours' weight."""
        x_NF = about_model(keys_ND, sure_N2)
        if self.late is None:
            return self.early(x_NF).numpy()
        return self.late(torch.cat([x_NF, about_neighbours(found, temperature, self.made_for["k"])], 1)).numpy()

    def asks(self, keys_BSD: Tensor, sure_BS2: Tensor, spare: float) -> np.ndarray:
        """bool [B, S]: whether a token's expected weight is above that of the share `spare` of the tokens it was fitted on."""
        weight_N = self.early(about_model(keys_BSD.flatten(0, 1), sure_BS2.flatten(0, 1)))
        at = spare * (len(self.levels) - 1)
        low, high = self.levels[int(at)], self.levels[min(int(at) + 1, len(self.levels) - 1)]
        return (weight_N > low + (high - low) * (at - int(at))).view(keys_BSD.shape[:2]).numpy()

    # ---- kept with the token store ----------------------------------------------------------------------------------

    def save(self, tokens: TokenStore) -> None:
        """Keep the gate as a part of the token store; an earlier one gives way."""
        from safetensors.torch import save_file

        from ralm.what import token_build

        store = tokens.store.parts[0][0]
        folder = token_build.folder_of(store, tokens.name)
        with store.lock():
            now = manifest.load(folder)
            path = manifest.new_part(folder)
            nets = self.early.tensors("early") | (self.late.tensors("late") if self.late else {}) | {"levels": self.levels}
            save_file(nets, path / FILES[0])
            (path / FILES[1]).write_text(json.dumps(self.made_for, indent=1, sort_keys=True), encoding="utf-8")
            kept = tuple(p for p in now.parts if FILES[0] not in p.files)
            manifest.commit(folder, replace(now, parts=(*kept, manifest.seal(path, 0, 0, 0))))

    @staticmethod
    def load(tokens: TokenStore, how: Interpolate) -> Gate:
        """The gate of a token store. Raises StoreError where it has none, FingerprintError where it was fitted otherwise."""
        from safetensors.torch import load_file

        from ralm.what import token_build

        store = tokens.store.parts[0][0]
        folder = token_build.folder_of(store, tokens.name)
        now = manifest.load(folder)
        part = next((p for p in now.parts if FILES[0] in p.files), None)
        if part is None:
            raise StoreError(f"{folder} has no gate, which lam=learned needs; fit one on text that is not in {store.path} "
                             "(ralm tune knn --gate), or give lam a number")
        manifest.sizes(folder, part)
        nets = load_file(folder / part.name / FILES[0])
        made_for = json.loads((folder / part.name / FILES[1]).read_text(encoding="utf-8"))
        ours = fitted_for(tokens, how)
        for key, value in ours.items():
            if value != made_for.get(key):
                raise FingerprintError(f"the gate of {folder} was fitted with {key} = {made_for.get(key)!r}, {value!r} is asked "
                                       f"for: use {made_for.get(key)!r}, or fit the gate anew (ralm tune knn --gate)")
        early = Net.of(nets, "early")
        return Gate(early, Net.of(nets, "late"), nets["levels"], made_for)


def fitted_for(tokens: TokenStore, how: Interpolate) -> dict[str, Any]:
    """What a gate depends on: the model, which datastores, how their keys were made, k and temperature."""
    own = ("fingerprint", "key", "window", "stride", "project", "dtype", "metric", "merged")
    settings = tokens.settings
    return {"datastores": [s.id for s, _ in tokens.store.parts]} | {k: settings[k] for k in own if k in settings} | {
        "k": how.k, "temperature": float(how.temperature)}


# ---- features -------------------------------------------------------------------------------------------------------


def about_model(keys_ND: Tensor, sure_N2: Tensor) -> Tensor:
    """float32 [N, D + 2]: the state, ln of the largest probability, entropy."""
    return torch.cat([keys_ND.float(), sure_N2.float()], 1)


def ranks(k: int) -> list[int]:
    """1, 2, 4, .. up to k."""
    return [2 ** i for i in range(max(1, k.bit_length()))]


def about_neighbours(found: Neighbours, temperature: float, k: int) -> Tensor:
    """float32 [N, F]: at ranks 1, 2, 4, .. the distance in temperatures and the share of distinct tokens; the largest probability
    of the neighbours' distribution and its entropy. Ranks that were not found repeat the last that was."""
    counts = found.counts if found.counts is not None else np.ones((1, 1), np.float32)
    counts = np.ascontiguousarray(np.broadcast_to(counts, found.rows.shape))
    at = np.array(ranks(k), np.int64)
    out = np.zeros((len(found.rows), 2 * len(at) + 2), np.float32)
    _features(found.distances, found.values, counts, np.float32(temperature), at, int(found.values.max(initial=0)) + 1, out)
    return torch.from_numpy(out)


@compiled
def _features(d_NK, value_NK, count_NK, temperature, at, vocab, out):
    seen, mass = np.full(vocab, -1, np.int64), np.zeros(vocab, np.float32)
    for n in range(d_NK.shape[0]):
        total, distinct, r, kept = np.float32(0), 0, 0, 0
        for j in range(d_NK.shape[1]):
            v = value_NK[n, j]
            if v < 0:
                break
            kept = j + 1
            w = np.exp((d_NK[n, 0] - d_NK[n, j]) / temperature) * count_NK[n, j]
            if seen[v] != n:
                seen[v], mass[v] = n, np.float32(0)
                distinct += 1
            mass[v] += w
            total += w
            while r < len(at) and at[r] == j + 1:
                out[n, r], out[n, len(at) + r] = d_NK[n, j] / temperature, distinct / at[r]
                r += 1
        while r < len(at) and kept > 0:
            out[n, r], out[n, len(at) + r] = d_NK[n, kept - 1] / temperature, distinct / at[r]
            r += 1
        best, entropy = np.float32(0), np.float32(0)
        for j in range(kept):
            v = value_NK[n, j]
            p = mass[v] / total
            if p > 0:  # each value once: its mass is taken when it is counted
                best = max(best, p)
                entropy -= p * np.log(p)
                mass[v] = np.float32(0)
        out[n, 2 * len(at)], out[n, 2 * len(at) + 1] = best, entropy
