"""Train the bundled span reader: python -m ralm.train.reader recipes/reader.toml

Loss of a question on a passage: -ln sum over correct spans of P(span | x, z), the null span being correct where there
is no answer (ORQA's marginal over occurrences), plus logistic loss on the relevance logit. Stages end by the clock."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ralm import progress
from ralm.errors import UsageError
from ralm.lm.reader import Cutter, Reader, ReaderConfig, ReaderModel, _sha256, base_folder, collate
from ralm.train.reader_data import Clozes, Example, Squad, bm25_top, read_squad
from ralm.train.reader_eval import evaluate, fit_retrieved_threshold, fit_retriever_weight, fit_threshold


def span_loss(spans_BTT: torch.Tensor, null_B: torch.Tensor,
              correct: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
    """-ln P(correct | x, z) [B]: the sum over correct (i, j) of P(span), or P(null) where the list is empty."""
    rows = []
    for spans_TT, null, pairs in zip(spans_BTT, null_B, correct):
        if pairs:
            i, j = zip(*pairs)
            rows.append(torch.logsumexp(spans_TT[list(i), list(j)], 0))
        else:
            rows.append(null)
    total_B = torch.logsumexp(torch.cat([spans_BTT.flatten(1), null_B[:, None]], 1), 1)
    return total_B - torch.stack(rows)


def loss_of(model: ReaderModel, cutter: Cutter, examples: Sequence[Example], relevance_weight: float) -> torch.Tensor:
    """Mean loss of a batch: spans plus weighted relevance."""
    rows = [cutter.ids(e.question, e.title, e.passage) for e in examples]
    spans_BTT, null_B, relevance_B = model(*collate(rows))
    correct = [[(i + begin, j + begin) for i, j in e.spans] for e, (_, _, begin) in zip(examples, rows)]
    loss = span_loss(spans_BTT, null_B, correct).mean()
    said_B = torch.tensor([e.relevant for e in examples])
    if (said_B >= 0).any():
        known = said_B >= 0
        loss = loss + relevance_weight * torch.nn.functional.binary_cross_entropy_with_logits(
            relevance_B[known], said_B[known].float())
    return loss


def batches(examples: list[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Shuffled batches of similar length: little padding, no order by length."""
    rng.shuffle(examples)
    groups = []
    for at in range(0, len(examples), size * 40):
        part = sorted(examples[at : at + size * 40], key=lambda e: len(e.passage) + len(e.question))
        groups += [part[n : n + size] for n in range(0, len(part), size)]
    rng.shuffle(groups)
    yield from groups


def rate(done: float, warmup: float, floor: float) -> float:
    """Share of the peak learning rate when `done` in [0, 1] of a stage has passed: linear up, then down to `floor`."""
    if done < warmup:
        return done / warmup
    return max(0.0, floor + (1 - floor) * (1 - done) / (1 - warmup))


@dataclass
class State:
    """Where a run stands; saved beside the tensors so that a killed run goes on."""

    stage: int = 0
    seconds: float = 0.0  # in this stage
    steps: int = 0  # in this stage
    seen: int = 0  # examples in this stage
    log: list = None


class Run:
    """One training run: model, its exponential moving average, optimiser, state on disk."""

    def __init__(self, recipe: dict[str, Any], root: Path, folder: Path):
        t = self.train = recipe["train"]
        self.recipe, self.root, self.folder = recipe, root, folder
        torch.set_num_threads(t["threads"])
        torch.manual_seed(t["seed"])
        self.rng = random.Random(t["seed"])
        config = ReaderConfig(**recipe["reader"])
        self.config = replace(config, base_sha256=_sha256(base_folder(config) / "model.safetensors"))
        self.cutter = Cutter(self.config)
        self.model = ReaderModel(self.config)
        self.model.bert.set_attn_implementation("eager")  # 1.5 times as fast as fused on a CPU in bfloat16
        self.ema = {n: p.detach().clone() for n, p in self.model.shipped().items()}
        self.state = State(log=[])
        self.held = self._data()
        if (folder / "state.json").is_file():
            self._resume()

    def _data(self):
        d = self.recipe["data"]
        held = d["held_out"]
        yes, no = self.root / d["answerable"], self.root / d["unanswerable"]
        self.squad = Squad(read_squad(yes, drop=held), read_squad(no, drop=held), self.cutter,
                           d["negatives"], d["titles"], d["crop"])
        asked = {t for name in d["never"] for t in read_squad(self.root / "qa" / name).titles}
        self.clozes = Clozes(self.root / d["articles"], self.cutter, asked, 0.2, d["titles"], d["crop"])
        return read_squad(yes, keep=held), read_squad(no, keep=held)

    # ---- state on disk

    def save(self) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        moments = {f"{k}.{n}": v for n, p in self.model.named_parameters() if p in self.optimiser.state
                   for k, v in self.optimiser.state[p].items()}
        save_file({f"model.{n}": p.contiguous() for n, p in self.model.shipped().items()}
                  | {f"ema.{n}": p for n, p in self.ema.items()} | {f"adam.{n}": v for n, v in moments.items()},
                  self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.safetensors")
        (self.folder / "state.json").write_text(json.dumps(asdict(self.state)))

    def _resume(self) -> None:
        from safetensors.torch import load_file

        tensors = load_file(self.folder / "state.safetensors")
        self.state = State(**json.loads((self.folder / "state.json").read_text()))
        self.model.load_state_dict({n[6:]: v for n, v in tensors.items() if n.startswith("model.")}, strict=False)
        self.ema = {n[4:]: v for n, v in tensors.items() if n.startswith("ema.")}
        self.moments = {n[5:]: v for n, v in tensors.items() if n.startswith("adam.")}

    def _optimiser(self, stage: dict[str, Any]) -> None:
        plain = [p for n, p in self.model.bert.encoder.named_parameters() if p.ndim > 1]
        rest = [p for n, p in self.model.bert.encoder.named_parameters() if p.ndim <= 1]
        decay = self.train["weight_decay"]
        self.optimiser = torch.optim.AdamW([
            {"params": plain, "peak": stage["lr"], "weight_decay": decay},
            {"params": rest, "peak": stage["lr"], "weight_decay": 0.0},
            {"params": list(self.model.head.parameters()), "peak": stage["head_lr"], "weight_decay": 0.0}],
            foreach=True)
        names = dict(self.model.named_parameters())
        for key, value in getattr(self, "moments", {}).items():
            kind, _, name = key.partition(".")
            self.optimiser.state[names[name]][kind] = value
        self.moments = {}

    # ---- the loop

    def fit(self) -> None:
        stages = self.recipe["stage"]
        while self.state.stage < len(stages):
            self._stage(stages[self.state.stage])
            log = self.state.log
            self.state = State(stage=self.state.stage + 1, log=log)
            self.save()

    def _stage(self, stage: dict[str, Any]) -> None:
        source = {"cloze": self.clozes, "squad": self.squad}[stage["name"]]
        self._optimiser(stage)
        total, last, losses = stage["minutes"] * 60, self.state.seconds, []
        evaluated = self.state.seconds
        while self.state.seconds < total:
            self.rng.seed(f"{self.train['seed']}.{stage['name']}.{self.state.steps}")
            for batch in batches(source.epoch(self.rng), self.train["batch"], self.rng):
                began = time.monotonic()
                losses.append(self._step(batch, rate(self.state.seconds / total, stage["warmup"], stage["floor"])))
                self.state.seconds += time.monotonic() - began
                self.state.steps += 1
                self.state.seen += len(batch)
                if self.state.seconds - last > 30:
                    last = self.state.seconds
                    progress.note(f"{stage['name']} {self.state.seconds / 60:.1f} min step {self.state.steps} "
                                  f"seen {self.state.seen} loss {sum(losses) / len(losses):.3f}")
                    losses = []
                if self.state.seconds >= total:
                    break
                if self.state.seconds - evaluated > self.train["evaluate_minutes"] * 60:
                    evaluated = self.state.seconds
                    self.check(stage["name"])
        reader = self.check(stage["name"])
        if self.state.stage == len(self.recipe["stage"]) - 1:
            self.export(reader)  # only the end: fitting its thresholds takes minutes

    def _step(self, batch: list[Example], share: float) -> float:
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * share
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.model, self.cutter, batch, self.train["relevance_loss"])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.train["clip"])
        self.optimiser.step()
        decay = min(self.train["ema"], (1 + self.state.steps) / (10 + self.state.steps))
        with torch.no_grad():
            names = list(self.ema)
            now = self.model.shipped()
            torch._foreach_lerp_([self.ema[n] for n in names], [now[n] for n in names], 1 - decay)
        return float(loss.detach())

    def averaged(self) -> Reader:
        """A reader with the averaged weights."""
        model = ReaderModel(self.config)
        model.load_state_dict(self.ema, strict=False)
        return Reader(model, self.config)

    def check(self, name: str, sample: int = 240) -> Reader:
        """Held-out F1 of the averaged weights with the gold paragraph; saves the state."""
        reader = self.averaged()
        figures = evaluate(reader, self.held[0], sample=sample)
        f1, em = round(figures["f1"], 2), round(figures["em"], 2)
        progress.note(f"{name} held-out F1 {f1} EM {em} on {figures['questions']} questions")
        self.state.log.append({"stage": name, "steps": self.state.steps, "seen": self.state.seen,
                               "seconds": round(self.state.seconds), "f1": f1, "em": em})
        self.save()
        return reader

    def export(self, reader: Reader) -> None:
        """Write float16 weights and config.json; threshold and retriever weight are fitted on the held-out articles."""
        from safetensors.torch import save_file

        yes, no = self.held
        every = read_squad(self.root / self.recipe["data"]["answerable"])
        reader.config = replace(self.config, retriever_weight=fit_retriever_weight(reader, yes, every, bm25_top, sample=100))
        fitted = replace(reader.config, abstain_above=fit_threshold(reader, no, sample=360),
                         abstain_above_retrieved=fit_retrieved_threshold(reader, yes, every, bm25_top),
                         trained={"held_out": self.recipe["data"]["held_out"], "log": self.state.log})
        out = Path(self.train["out"])
        out.mkdir(parents=True, exist_ok=True)
        save_file({n: p.half().contiguous() for n, p in self.ema.items()}, out / "reader.safetensors")
        (out / "config.json").write_text(json.dumps(asdict(fitted), indent=1) + "\n")
        progress.note(f"exported {out}: abstain above {fitted.abstain_above:.2f} (passage given), "
                      f"{fitted.abstain_above_retrieved:.2f} (retrieved), retriever weight {fitted.retriever_weight:g}")


class _Lines(progress.Silent):
    def note(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        raise UsageError("usage: python -m ralm.train.reader recipes/reader.toml")
    recipe = tomllib.loads(Path(arguments[0]).read_text())
    progress.use(_Lines())
    root = Path(os.environ.get("RALM_DATA", "../shared/data"))
    run = Run(recipe, root, Path(os.environ.get("RALM_RUNS", recipe["train"]["state"])))
    progress.note(f"start at stage {run.state.stage}, {run.state.seconds / 60:.1f} min, step {run.state.steps}")
    run.fit()


if __name__ == "__main__":
    main()
