"""Train a decoder to read neighbours (RETRO): RETRO-fit of any decoder, from scratch, or the same decoder without, for comparison.

    ralm train recipes/retro_fit.toml

Tables of a recipe beside [train] (task.py):

    [model]   base = "bundled:base" | "hf:NAME"     RETRO-fit; "retro:FOLDER" trains one on; or from scratch:
              [model.decoder] (GPTConfig) and tokenizer = "bundled:base", whose tokenizer it takes
              [model.retro] (RetroConfig); begin: rows that new weights are fitted to before the first step (Retro.begin; 0: none);
              checkpointing = true runs blocks again in backward
    [rates]   trainable = "new" | "all"; after = N: the decoder's weights move from step N on
              matrices = "muon" | "adamw"; new, new_rest, base, base_rest: peak rates of matrices and of the rest; weight_decay
    [data]    [[data.source]] name, file, share (, spaced): documents of the data folder; or store = PATH: a datastore that is
              there, whose ids begin with the sources' names. window, retriever, k, held, rows (most different ones), examples
              kinds.document, kinds.row, kinds.copy, leak: see retro_data.py; drop: share of parts that see no neighbours
              neighbours = false: the decoder alone, on the same rows in the same order

The loss is that of the next token. Every part has as many neighbours per chunk, 1 to k at random: any number works later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ralm import progress
from ralm.errors import UsageError, unknown
from ralm.lm import load as load_lm
from ralm.lm import retro_files
from ralm.lm.gpt import GPT, Decoder, GPTConfig
from ralm.lm.gpt import save as save_gpt
from ralm.lm.retro import Neighbours, Retro, RetroConfig
from ralm.train import ranks
from ralm.train.kernels import causal_attention, head_loss
from ralm.train.retro_data import KINDS, Rows, read
from ralm.train.task import Group, Settings, Task

MODEL = {"base": "", "tokenizer": "", "decoder": {}, "retro": {}, "begin": 16, "checkpointing": False}
RATES = {"trainable": "all", "after": 0, "matrices": "adamw", "new": 2e-4, "new_rest": 2e-4, "base": 2e-5, "base_rest": 2e-5,
         "weight_decay": 0.0}
DATA = {"source": (), "store": "", "window": 0, "retriever": "bm25", "k": 2, "held": 50, "rows": 0, "examples": 32,
        "kinds": {"document": 1.0}, "drop": 0.1, "leak": 0, "neighbours": True}
SAMPLE = 48  # tokens of a sample


class Training(Task):
    """One run. `lm` is a Retro, or its decoder where the recipe wants no neighbours."""

    kind = "retro"

    def __init__(self, recipe: Mapping[str, Any], root: Path, folder: Path):
        self.settings = Settings.of(recipe["train"])
        self.model, self.rates, self.data = (_table(recipe, *t) for t in (("model", MODEL), ("rates", RATES), ("data", DATA)))
        self.device = ranks.device(self.settings.device)
        self.folder, self.root, self.before = folder, root, {}
        self.lm, self.base = self._model()
        self.bare = self.lm.base if isinstance(self.lm, Retro) else self.lm  # the decoder
        self.rows, self.neighbours = self._rows()
        if self.base and (n := self.model["begin"]):
            self.lm.begin(torch.from_numpy(self.rows.tokens(self.rows.order[:n], self.rows.train)[:, :-1]))

    # ---- what is trained -----------------------------------------------------------------------------------------------

    def _model(self) -> tuple[Any, retro_files.Base | None]:
        """The model, and for a RETRO-fit which decoder it begins with."""
        m = self.model
        if bool(m["base"]) == bool(m["decoder"]):
            raise UsageError("[model] wants one of base (a decoder to fit) and decoder (a shape, from scratch)")
        if m["base"]:
            bare = load_lm(m["base"])
        else:
            if not m["tokenizer"]:
                raise UsageError('[model] decoder needs a tokenizer: tokenizer = "bundled:base"')
            tokenizer = load_lm(m["tokenizer"]).tokenizer
            bare = GPT(Decoder(GPTConfig(**({"vocab": len(tokenizer)} | m["decoder"]))), tokenizer, "gpt:new")
        if isinstance(bare, Retro):
            return self._on(bare)
        bare.model.to(self.device)
        bare.model.requires_grad_(True)
        alone = not self.data["neighbours"]
        lm = bare if alone else Retro(bare, self._config())
        if isinstance(bare, GPT) and self.device.type == "cpu":
            for block in bare.model.blocks:
                block.attention.attend = _attend
        if m["checkpointing"]:
            _checkpointing(bare, lm)
        fits = not alone and bool(m["base"])
        return lm, retro_files.Base.of(bare, m["base"], self.rates["trainable"] == "all") if fits else None

    def _on(self, lm: Retro) -> tuple[Retro, retro_files.Base]:
        """A RETRO that was trained before, with the decoder it began with."""
        if self.model["retro"] or not self.data["neighbours"]:
            raise UsageError(f"'{lm.name}' is a RETRO already: leave [model.retro] out, and neighbours = true")
        values = retro_files.described(Path(str(self.model["base"]).removeprefix("retro:")))
        made, self.before = values["base"], values["trained"]
        self.model["begin"], self.model["retro"] = 0, vars(lm.config)
        lm.model.to(self.device).requires_grad_(True)
        if isinstance(lm.base, GPT) and self.device.type == "cpu":
            for block in lm.base.model.blocks:
                block.attention.attend = _attend
        if self.model["checkpointing"]:
            _checkpointing(lm.base, lm)
        return lm, retro_files.Base(**(made | {"trained": made["trained"] or self.rates["trainable"] == "all"}))

    def _config(self) -> RetroConfig:
        return RetroConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in self.model["retro"].items()})

    def groups(self) -> list[Group]:
        """New weights and the decoder's, each as matrices and the rest (embeddings, norms, gates)."""
        r, lm = self.rates, self.lm
        if r["trainable"] not in ("new", "all") or r["matrices"] not in ("muon", "adamw"):
            raise unknown("[rates] trainable or matrices", f"{r['trainable']}, {r['matrices']}", ("new", "all", "muon", "adamw"))
        parts = {"base": self.bare.model}
        if isinstance(lm, Retro):
            lm.trainable(r["trainable"])
            parts = {"new": lm.adapter} | (parts if r["trainable"] == "all" else {})
        tied = {id(p) for x in (self.bare.model, *parts.values()) for m in x.modules() if isinstance(m, nn.Embedding)
                for p in m.parameters()}
        out = []
        for name, module in parts.items():
            named = {f"{name}.{n}": p for n, p in module.named_parameters()}
            flat = {n: p for n, p in named.items() if p.ndim == 2 and id(p) not in tied}
            after = r["after"] if name == "base" else 0
            options = dict(weight_decay=r["weight_decay"], after=after)
            if r["matrices"] == "adamw":
                options |= dict(betas=(0.9, 0.95))
            out += [Group(f"{name}_matrices", flat, r[name], r["matrices"], **options),
                    Group(f"{name}_rest", {n: p for n, p in named.items() if n not in flat}, r[f"{name}_rest"], betas=(0.9, 0.95),
                          after=after)]
        return [g for g in out if g.parameters]

    # ---- rows and neighbours -------------------------------------------------------------------------------------------

    def _rows(self) -> tuple[Rows, Any]:
        from ralm.what.neighbours import NeighbourStore

        d, m = self.data, self._config().m
        window = d["window"] or self.bare.window
        if not 0 < window <= self.bare.window:
            raise UsageError(f"[data] window = {window}, '{self.bare.name}' reads {self.bare.window} tokens at once")
        neighbours = NeighbourStore.build(self._store(), self.lm, m=m, retriever=d["retriever"])
        progress.note(f"{neighbours}")
        sources = {s["name"]: s.get("share", 1.0) for s in d["source"]}
        rows = Rows(read(neighbours), sources, window, m, self.bare.eos, self.settings.seed, d["held"], d["rows"], d["kinds"],
                    d["leak"], _words(self.bare.tokenizer) if d["leak"] else None)
        kinds = ", ".join(f"{n} {(rows.kind == i).sum()}" for i, n in enumerate(KINDS))
        progress.note(f"{len(rows)} rows of {window} tokens; neighbours by kind: {kinds}")
        if d["neighbours"]:
            rows.find(neighbours, d["k"], self.folder / "neighbours", d["examples"])
        return rows, neighbours

    def _store(self) -> Any:
        """The datastore, made from the sources where it is not there yet."""
        from ralm.train.gpt_data import documents, spaced
        from ralm.types import Document
        from ralm.what.datastore import Datastore

        d = self.data
        if not d["source"]:
            raise UsageError("[data] has no source: give [[data.source]] name, share (and file, unless store has the documents)")
        path = Path(d["store"] or self.folder / "store")
        if not all(s.get("file") for s in d["source"]):
            return Datastore.open(path)

        def texts():
            for s in d["source"]:
                for title, text in documents(self.root / s["file"]):
                    yield Document(f"{s['name']}/{title}", spaced(title, text) if s.get("spaced") else text, title)

        return Datastore.build(path, texts())

    def batch(self, step: int) -> list[tuple[Tensor, Neighbours | None]]:
        """Parts of `micro` rows [n, window + 1] and the neighbours of their chunks."""
        s, rows = self.settings, self.rows
        rng = np.random.default_rng([s.seed, 1, step])
        at = np.arange(step * s.batch, (step + 1) * s.batch) % len(rows)
        ids, out = rows.tokens(rows.order[at], rows.train), []
        for here in np.split(np.arange(s.batch), range(s.micro or s.batch, s.batch, s.micro or s.batch)):
            k, off = int(rng.integers(1, self.data["k"] + 1)), rng.random() < self.data["drop"]
            off, n = off and self.rates["trainable"] == "all", None  # else what nobody reads teaches nothing
            if self.data["neighbours"] and not off:
                n = self._given(rows.found[at[here]], ids[here], k, rows.kind[at[here]] == KINDS.index("copy"), rng)
            out.append((torch.from_numpy(ids[here]), n))
        return out

    def _given(self, found: np.ndarray, ids: np.ndarray, k: int, copies: np.ndarray, rng: np.random.Generator) -> Neighbours:
        tokens, mask = self.rows.given(found, ids, k, self.neighbours, copies, rng)
        return Neighbours(torch.from_numpy(tokens), torch.from_numpy(mask))

    # ---- loss -------------------------------------------------------------------------------------------------------------

    def loss(self, part: tuple[Tensor, Neighbours | None]) -> tuple[Tensor, dict[str, float]]:
        """Nats per token of a part."""
        ids, n = part
        read = (self.rows.chunks + 1) * self.rows.m - 1  # the last chunk stays incomplete: its neighbours would serve one token
        ids = ids.to(self.device)
        x, y = ids[:, :read], ids[:, 1:read + 1]
        if isinstance(self.bare, GPT) and self.device.type == "cpu":
            dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
            loss = head_loss(self._hidden(x, n).flatten(0, 1), self.bare.model.embed.weight, y.flatten(), dtype)
        else:
            loss = F.cross_entropy(self._logits(x, n).flatten(0, 1).float(), y.flatten())
        if not loss.requires_grad:  # new weights alone are trained, and there was nothing to read
            loss = loss + 0.0 * sum(p.sum() for p in self.lm.adapter.parameters())
        return loss, {"tokens": x.numel()}

    def _hidden(self, x: Tensor, n: Neighbours | None) -> Tensor:
        return self.lm.keys(x, "hidden") if n is None else self.lm.keys(x, "hidden", n)

    def _logits(self, x: Tensor, n: Neighbours | None) -> Tensor:
        return (self.lm.forward(x) if n is None else self.lm.forward(x, neighbours=n)).logits

    # ---- figures, samples, files ---------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Nats per token of rows held out, where neighbours can be read: with none, with those of other documents, with those of
        the same document, with copies of the row; and how a text goes on."""
        rows, size = self.rows, self.settings.micro or 4
        order = rows.held_order[:self.data["examples"]]
        if not len(order):
            return {}
        ids, sums = rows.tokens(order, rows.held), {}
        for a in range(0, len(ids), size):
            some = ids[a:a + size]
            for name in ("off", *(KINDS if self.data["neighbours"] else ())):
                n = None
                if name != "off":
                    copies = np.full(len(some), name == "copy")
                    found = rows.found_held["row" if name == "copy" else name][a:a + size]
                    n = self._given(found, some, self.data["k"], copies, np.random.default_rng([7, a]))
                sums[name] = sums.get(name, 0.0) + self._nats(some, n)
        out: dict[str, Any] = {name: total / len(ids) for name, total in sums.items()}
        out |= {f"gain_{name}": out["off"] - out[name] for name in KINDS if name in out}
        return out | {"sample": self._sample(ids[0])}

    def _nats(self, ids: np.ndarray, n: Neighbours | None) -> float:
        """Of the tokens that may read neighbours; a row's mean, summed over rows."""
        m, x = self.rows.m, torch.from_numpy(ids).to(self.device)
        read = (self.rows.chunks + 1) * m - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            logits = self._logits(x[:, :read], n)[:, m - 1:].float()
        y = x[:, m:read + 1]
        return float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")) / y.shape[1]

    def _sample(self, row: np.ndarray) -> str:
        """The likeliest continuation of a row's first two chunks, which reads what was found for the second."""
        m, past, out = self.rows.m, None, []
        x = torch.from_numpy(row[None, :2 * m]).to(self.device)
        n = None
        if self.data["neighbours"] and self.rows.chunks > 1:
            found = self.rows.found_held["document"][:1, :2]
            n = self._given(found, row[None], self.data["k"], np.zeros(1, bool), np.random.default_rng(0))
        for _ in range(min(SAMPLE, m - 1)):
            options = {"neighbours": n} if n is not None and past is None else {}
            given = self.lm.forward(x, past=past, **options)
            past, x = given.past, given.logits[:, -1:].argmax(-1)
            out.append(int(x))
        return self.bare.tokenizer.decode(row[1:2 * m].tolist())[-200:] + " >>> " + self.bare.tokenizer.decode(out)

    def export(self, folder: Path, trained: Mapping[str, Any]) -> None:
        """The model as `retro:FOLDER`; a decoder alone as `gpt:` or transformers write it."""
        from ralm.train.gpt_card import machine
        from ralm.train.retro_card import card

        if isinstance(self.lm, Retro):
            trained = dict(trained) | {"machine": machine(), "new": sum(p.numel() for p in self.lm.adapter.parameters())}
            trained |= {"before": self.before} if self.before else {}
            retro_files.save(self.lm, folder, self.base or retro_files.Base(""), trained)
            (folder / "README.md").write_text(card(retro_files.described(folder)))
        elif isinstance(self.lm, GPT):
            save_gpt(folder, self.lm.model, self.lm.tokenizer, GPTConfig(**(vars(self.lm.config) | {"trained": dict(trained)})))
        else:
            self.lm.model.save_pretrained(folder)
            self.lm.tokenizer.inner.save_pretrained(folder)


def _table(recipe: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's table over its defaults. Raises UsageError for keys nobody reads."""
    given = dict(recipe.get(name) or {})
    for key in given:
        if key not in defaults:
            raise unknown(f"setting in [{name}]", key, defaults)
    return dict(defaults) | given


def _words(tokenizer: Any) -> np.ndarray:
    """bool [V]: tokens with a letter or a digit."""
    return np.array([any(c.isalnum() for c in tokenizer.decode([i])) for i in range(len(tokenizer))])


def _attend(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """The faster kernel where it can be used: rows from their first token on."""
    if attn_mask is None and is_causal:
        return causal_attention(q_BHTE, k_BHTE, v_BHTE)
    return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=attn_mask, is_causal=is_causal)


def _checkpointing(bare: Any, lm: Any) -> None:
    """Blocks keep their input only and are run again in backward, reading the neighbours they read."""
    again = lm.again if isinstance(lm, Retro) else None
    if isinstance(bare, GPT):
        from torch.utils.checkpoint import noop_context_fn

        bare.model.again = again or noop_context_fn
        return
    options = {"use_reentrant": False} | ({"context_fn": again} if again else {})
    bare.model.gradient_checkpointing_enable(options)
    bare.model.train()  # transformers looks at this; dropout stays off
    for module in bare.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
