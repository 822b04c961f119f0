"""A world in which only the right passage helps: texts and facts call everybody by different names.

    python -m ralm.train.toy toy          # writes toy/: facts.json, texts.jsonl, reader/, retriever/
    ralm train recipes/realm_toy.toml --data toy

A text says "we know that bade kolu does live in Mizo ."; the fact beside it says "home of tagi sepo is Mizo .": bade is tagi
and kolu is sepo, always, and nothing else says so. The reader has learnt beforehand to read a home off a fact, whoever it is
of; the retriever has seen a few of the pairs (`seen`). What is left to learn is which fact belongs to a text, and the only
teacher is that the right one predicts the masked home. A quarter of the pairs is held out: no text tells of them, the questions
are about them, and they can be found by whoever has learnt the names one by one."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ralm import progress
from ralm.errors import UsageError, need
from ralm.lm.masked import Lengths, MaskedReader
from ralm.train.encoder import Encoder, Trainable
from ralm.train.objectives import contrastive

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = "home of is we know that does live in where . ?".split()


@dataclass(frozen=True)
class World:
    """letters: first names and last names, each; letters^2 people, one fact each. homes: different ones."""

    letters: int = 8
    homes: int = 16
    seed: int = 0
    held: float = 0.25
    seen: float = 0.2  # share of the pairs that the retriever begins with
    width: int = 32
    layers: int = 2  # of the reader; the retriever has one


def write(folder: str | Path, world: World | None = None, warm: int = 200, pairs: int = 40) -> Path:
    """Data and models of a world; `warm` steps of the reader on facts, `pairs` of the retriever on the pairs it has seen."""
    world, folder = world or World(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    people, names = _people(world)
    facts = [{"context": f["fact"], "qas": [{"id": str(n), "question": f["question"], "answers": [f["home"]]}] if f["held"] else []}
             for n, f in enumerate(people)]
    (folder / "facts.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": facts}]}))
    told = [f for f in people if not f["held"]]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"id": f"t{n}", "text": f["text"]}) + "\n" for n, f in enumerate(told)))
    tokenizer = _tokenizer([*SPECIAL, *WORDS, *names])
    with progress.quiet():
        _reader(folder, tokenizer, world, people, warm)
        _retriever(folder, tokenizer, world, told[:round(world.seen * len(told))], pairs)
    return folder


def _people(world: World) -> tuple[list[dict[str, Any]], list[str]]:
    rng, seen = random.Random(world.seed), set(WORDS)

    def words(count: int) -> list[str]:
        out = []
        while len(out) < count:
            w = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
            if w not in seen:
                seen.add(w)
                out.append(w)
        return out

    first, last, first_too, last_too = (words(world.letters) for _ in range(4))
    homes = [w.capitalize() for w in words(world.homes)]
    both = [(i, j) for i in range(world.letters) for j in range(world.letters)]
    rng.shuffle(both)
    people = [{"text": f"we know that {first[i]} {last[j]} does live in {homes[n % len(homes)]} .", "home": homes[n % len(homes)],
               "fact": f"home of {first_too[i]} {last_too[j]} is {homes[n % len(homes)]} .", "held": n < world.held * len(both),
               "question": f"we know that {first[i]} {last[j]} does live in [MASK] ."} for n, (i, j) in enumerate(both)]
    return people, [*first, *last, *first_too, *last_too, *(h.lower() for h in homes)]


def _tokenizer(vocabulary: list[str]) -> Any:
    """Whole words, as BERT's tokenizer cuts them."""
    transformers = need("transformers", "the toy world's models", "lm")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                         special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=48, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def _config(tokenizer: Any, world: World, layers: int) -> Any:
    return need("transformers", "the toy world's models", "lm").BertConfig(
        vocab_size=len(tokenizer), hidden_size=world.width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * world.width, max_position_embeddings=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1)


def _reader(folder: Path, tokenizer: Any, world: World, people: list[dict[str, Any]], steps: int) -> None:
    """Names and homes are drawn at random, so nothing but reading is learnt."""
    from transformers import BertForMaskedLM

    torch.manual_seed(world.seed)
    rng = random.Random(world.seed + 1)
    bert = BertForMaskedLM(_config(tokenizer, world, world.layers))
    reader = MaskedReader(bert, tokenizer, Lengths(16, 16), embeddings=True).train()
    optimiser, homes = torch.optim.AdamW(reader.parameters(), 3e-3), sorted({p["home"] for p in people})
    for _ in range(steps):
        rows, facts = [], []
        for _ in range(32):
            home, text, fact = rng.choice(homes), rng.choice(people)["text"].split(), rng.choice(people)["fact"].split()
            text[-2] = fact[-2] = home
            whole = " ".join(text)
            rows.append(reader.cut(whole, [(whole.index(home), whole.index(home) + len(home))]))
            facts.append([" ".join(fact)])
        loss = -reader.logp(rows, facts)[0].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    reader.save(folder / "reader")


def _retriever(folder: Path, tokenizer: Any, world: World, pairs: list[dict[str, Any]], steps: int) -> None:
    """One layer, mean of states, trained a little on the pairs it may see."""
    import importlib
    import tempfile

    from transformers import BertModel

    package = need("sentence_transformers", "the toy world's models", "lm")
    parts = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(world.seed)
    with tempfile.TemporaryDirectory() as scratch:
        BertModel(_config(tokenizer, world, 1)).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        model = package.SentenceTransformer(modules=[parts.Transformer(scratch), parts.Pooling(world.width, "mean")], device="cpu")
        model.save(f"{scratch}/st", create_model_card=False)
        encoder = Trainable(Encoder(f"{scratch}/st"), torch.device("cpu"))
    optimiser = torch.optim.AdamW(encoder.model.parameters(), 3e-3)
    for _ in range(steps if len(pairs) > 1 else 0):
        q, d = encoder.encode([p["question"] for p in pairs], "query"), encoder.encode([p["fact"] for p in pairs], "passage")
        loss = contrastive(q, d, torch.arange(len(pairs)), 0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    encoder.save(folder / "retriever", {"kind": "toy"}, "# The retriever a toy world begins with\n")


def main() -> None:
    if len(sys.argv) != 2:
        raise UsageError("usage: python -m ralm.train.toy FOLDER")
    write(sys.argv[1])


if __name__ == "__main__":
    main()
