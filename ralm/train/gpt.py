"""Train the bundled language model: python -m ralm.train.gpt recipes/base.toml

Next-token loss on books and Wikipedia articles; Muon for matrices, AdamW for embeddings and norms; the learning rate goes
to zero by the clock (or by steps, where the recipe counts them). A killed run goes on where its last save stood, and every
evaluation leaves a checkpoint that can be loaded."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ralm import progress
from ralm.errors import UsageError
from ralm.lm.gpt import BPE, GPT, Decoder, GPTConfig, save
from ralm.train.gpt_card import card, machine
from ralm.train.gpt_data import Rows, Stream, documents, spaced
from ralm.train.gpt_eval import bits_per_byte
from ralm.train.kernels import causal_attention, head_loss
from ralm.train.muon import Muon
from ralm.train.tokenizer import train_bpe


def rate(done: float, warmup: float, hold: float) -> float:
    """Share of the peak learning rate when `done` in [0, 1] of the run has passed: up, level until `hold`, down to zero."""
    if done < warmup:
        return done / warmup
    return max(0.0, min(1.0, (1 - done) / (1 - hold)))


@dataclass
class State:
    """Where a run stands; saved beside the tensors so that a killed run goes on."""

    steps: int = 0
    seconds: float = 0.0  # on the clock, evaluations included, time between runs not
    tokens: int = 0
    dealt: list[int] = field(default_factory=list)  # rows by source
    log: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """One training run: model, optimisers, data, state on disk. `folder` holds the tokenizer and encoded text too."""

    def __init__(self, recipe: dict[str, Any], root: Path, folder: Path):
        t = self.train = recipe["train"]
        self.recipe, self.root, self.folder = recipe, root, folder
        # Threads each take whole rows and meet once a step; inside an operation they would meet thousands of times, and on a
        # machine that is shared wait for each other at every one.
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(t["threads"])
        torch.manual_seed(t["seed"])
        folder.mkdir(parents=True, exist_ok=True)
        self.config = GPTConfig(**recipe["model"])
        self.bpe, self.rows = self._data(recipe["data"])
        self.model = Decoder(self.config).train()
        for block in self.model.blocks:
            block.attention.attend = causal_attention
        self.dtype = getattr(torch, t["dtype"])
        named = dict(self.model.named_parameters())
        matrices = {n: p for n, p in named.items() if p.ndim == 2 and n != "embed.weight"}
        self.muon = Muon(matrices.values(), t["lr"], t["momentum"], t["weight_decay"], self.pool)
        self.adam = torch.optim.AdamW([{"params": [p for n, p in named.items() if n not in matrices]}], t["adam_lr"],
                                      betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
        self.stop = False  # set from outside: save after this step and return
        self.state = State(dealt=[0] * len(self.rows.streams))
        if (folder / "state.safetensors").is_file():
            self._resume()

    # ---- data

    def _data(self, d: dict[str, Any]) -> tuple[BPE, Rows]:
        """Tokenizer and rows. The first run trains the one and encodes the other; later ones read them from `folder`."""
        from tokenizers import Tokenizer

        sources = [s["name"] for s in d["source"]]
        kept = self.folder / "tokenizer.json"
        if not kept.is_file():
            progress.note("reading text and training the tokenizer")
            texts = self._texts(d)
            bpe = train_bpe((x[:d["tokenizer_most"]] for name in sources for _, x in texts[name]), self.config.vocab)
            for name in sources:
                progress.note(f"encoding {name}")
                s = Stream.make(name, texts[name], bpe, self.config.end)
                np.savez(self.folder / f"{name}.npz", ids=s.ids, starts=s.starts, titles=np.concatenate(s.titles),
                         ends=np.cumsum([len(t) for t in s.titles]), allow_pickle=False)
            bpe.inner.save(str(kept))  # last: it says that the rest is there
        bpe = BPE(Tokenizer.from_file(str(kept)))
        streams = []
        for name in sources:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as z:
                streams.append(Stream(name, z["ids"], z["starts"], np.split(z["titles"], z["ends"][:-1])))
        return bpe, Rows(streams, [s["share"] for s in d["source"]], self.config.window, self.config.end, bpe.encode("\n"),
                         self.config.vocab, d["evidence"], d["evidence_most"], self.train["seed"], d["copies"])

    def _texts(self, d: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
        found = {}
        for s in d["source"]:
            pairs = list(documents(self.root / s["file"]))
            found[s["name"]] = [(title, spaced(title, text)) for title, text in pairs] if s.get("spaced") else pairs
        return found

    # ---- state on disk

    def _moments(self) -> dict[str, Tensor]:
        """Every tensor of both optimisers under a name."""
        out = {}
        for name, p in self.model.named_parameters():
            for kind, optimiser in (("muon", self.muon), ("adam", self.adam)):
                out |= {f"{kind}.{key}.{name}": v for key, v in optimiser.state.get(p, {}).items()}
        return out

    def save(self) -> None:
        """Tensors and state in one file, replaced atomically: they cannot disagree."""
        from safetensors.torch import save_file

        tensors = {f"model.{n}": p.detach().contiguous() for n, p in self.model.named_parameters()} | self._moments()
        save_file(tensors, self.folder / "state.part", metadata={"state": json.dumps(asdict(self.state))})
        (self.folder / "state.part").replace(self.folder / "state.safetensors")

    def _resume(self) -> None:
        from safetensors import safe_open

        with safe_open(self.folder / "state.safetensors", "pt") as f:
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118 - not a mapping
            self.state = State(**json.loads(f.metadata()["state"]))
        self.model.load_state_dict({n[6:]: v for n, v in tensors.items() if n.startswith("model.")})
        named = dict(self.model.named_parameters())
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            key, _, parameter = rest.partition(".")
            if kind != "model":
                {"muon": self.muon, "adam": self.adam}[kind].state[named[parameter]][key] = value

    # ---- the loop

    def done(self) -> float:
        """How much of the run has passed, in [0, 1]."""
        t = self.train
        return self.state.steps / t["steps"] if "steps" in t else self.state.seconds / (60 * t["minutes"])

    def fit(self, until: int | None = None) -> None:
        """Train to the end (or to step `until`), evaluating, exporting and saving on the way."""
        t, losses = self.train, []
        began = time.monotonic() - self.state.seconds
        said = saved = self.state.seconds
        evaluated = self.state.log[-1]["seconds"] if self.state.log else t["first_minutes"] * 60 - t["evaluate_minutes"] * 60
        while self.done() < 1 and not self.stop and (until is None or self.state.steps < until):
            losses.append(self.step())
            now = self.state.seconds = time.monotonic() - began
            if now - said > 30:
                tokens = len(losses) * t["batch"] * self.config.window
                progress.note(f"{now / 60:.1f} min step {self.state.steps} loss {sum(losses) / len(losses):.3f} "
                              f"{self.state.tokens / 1e6:.2f}M tokens, {tokens / (now - said):.0f} a second")
                said, losses = now, []
            if now - evaluated > t["evaluate_minutes"] * 60:
                evaluated = now
                self.check(t["sample"])
            if now - saved > t["save_minutes"] * 60:
                saved = now
                self.save()
        self.save()
        if self.done() >= 1:
            self.check(t["sample"])  # the finished weights are there before the long count begins
            torch.set_num_threads(t["threads"])
            self.check(None)

    def step(self) -> float:
        """One batch; returns its loss in nats per token."""
        t, share = self.train, rate(self.done(), self.train["warmup"], self.train["hold"])
        for optimiser, peak in ((self.muon, t["lr"]), (self.adam, t["adam_lr"])):
            for group in optimiser.param_groups:
                group["lr"] = peak * share
        rows_BT = torch.from_numpy(self.rows.batch(self.state.steps, t["batch"], self.state.dealt))
        losses, gradients = zip(*self.pool.map(self._gradient, rows_BT.split(t["micro"])))
        for p, *parts in zip(self.model.parameters(), *gradients):
            p.grad = sum(parts[1:], parts[0]) / len(parts)  # in order: the same sum on every run
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.state.steps += 1
        self.state.tokens += rows_BT.shape[0] * self.config.window
        return sum(losses) / len(losses)

    def _gradient(self, rows_BT: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        """Loss and gradients of some rows [B, T + 1]; several threads do this on the same weights."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            hidden_BTD, _ = self.model(rows_BT[:, :-1])
        loss = head_loss(hidden_BTD.float().flatten(0, 1), self.model.embed.weight, rows_BT[:, 1:].flatten(), self.dtype)
        return float(loss.detach()), torch.autograd.grad(loss, list(self.model.parameters()))

    def check(self, sample: int | None) -> None:
        """Bits per byte on held-out text (its first `sample` characters, None: all of it), export, save."""
        with torch.no_grad():
            frozen = Decoder(self.config)
            frozen.load_state_dict(self.model.state_dict())
        lm = GPT(frozen.requires_grad_(False), self.bpe, "bundled:base")
        scored = bits_per_byte(lm, self.root / self.recipe["data"]["held_out"], sample)
        progress.note(f"{self.state.seconds / 60:.1f} min: {scored['bits_per_byte']:.4f} bits per byte "
                      f"({scored['bytes']} bytes of held-out text, {scored['seconds']:.0f} s)")
        self.state.log.append({"steps": self.state.steps, "tokens": self.state.tokens, "seconds": round(self.state.seconds),
                               "bits_per_byte": round(scored["bits_per_byte"], 4), "bytes": scored["bytes"]})
        self.export(lm, scored)
        self.save()

    def export(self, lm: GPT, scored: dict[str, Any]) -> None:
        """Write checkpoint and model card."""
        out = Path(self.train["out"])
        minutes = round(self.state.seconds / 60, 1)
        trained = {"steps": self.state.steps, "tokens": self.state.tokens, "minutes": minutes, "parameters": lm.parameters,
                   "finished": self.done() >= 1, "machine": machine(),
                   "rows": dict(zip([s.name for s in self.rows.streams], self.state.dealt)),
                   "scored": scored, "recipe": {k: self.recipe[k] for k in ("data", "train")}, "log": self.state.log}
        save(out, lm.model, self.bpe, replace(self.config, trained=trained))
        (out / "README.md").write_text(card(self.config, trained))


class _Lines(progress.Silent):
    def note(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        raise UsageError("usage: python -m ralm.train.gpt recipes/base.toml")
    recipe = tomllib.loads(Path(arguments[0]).read_text())
    progress.use(_Lines())
    root = Path(os.environ.get("RALM_DATA", "../shared/data"))
    run = Run(recipe, root, Path(os.environ.get("RALM_RUNS", recipe["train"]["state"])))
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))
    progress.note(f"start at step {run.state.steps}, {run.state.seconds / 60:.1f} min; "
                  + ", ".join(f"{s.name} {len(s.ids) / 1e6:.2f}M tokens" for s in run.rows.streams))
    run.fit()


if __name__ == "__main__":
    main()
