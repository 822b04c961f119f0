"""What a language model is asked to predict while it judges passages: a query, the tokens before the target, the target.

    questions(pairs, lm)                 the answer, after "Question: ...\\nAnswer:"
    continuations(docs, lm, 32, 16)      the next 16 tokens of a document, after 32 of its own; the query is those 32 as text

A document's own passages are never among the candidates of its continuations (`exclude`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ralm.errors import UsageError
from ralm.how.rows import left_pad
from ralm.train.pairs import Pairs
from ralm.types import Document, LanguageModel

TEMPLATE = "Question: {}\nAnswer:"
BATCH_TOKENS = 2048  # rows times length of one forward


class Example(NamedTuple):
    query: str
    prefix: list[int]
    target: list[int]
    exclude: tuple[str, ...] = ()  # documents
    answers: tuple[str, ...] = ()


def questions(pairs: Pairs, lm: LanguageModel, most: int = 0) -> list[Example]:
    """Questions with an answer; the first reference is the target. most: evenly spread, 0: all."""
    rows = [n for n, answers in enumerate(pairs.answers) if answers]
    rows = rows[::max(1, len(rows) // most)][:most] if most else rows
    encode = lm.tokenizer.encode
    return [Example(q, encode(TEMPLATE.format(q)), encode(f" {answers[0]}"), (), answers)
            for q, answers in ((pairs.queries[n], pairs.answers[n]) for n in rows)]


def continuations(documents: Iterable[Document], lm: LanguageModel, query: int, target: int, most: int = 0) -> list[Example]:
    """Pieces of query + target tokens of every document, in order. most: evenly spread, 0: all."""
    out = []
    for document in documents:
        ids = lm.tokenizer.encode(document.text)
        for at in range(0, len(ids) - query - target + 1, query + target):
            prefix = ids[at:at + query]
            out.append(Example(lm.tokenizer.decode(prefix), prefix, ids[at + query:at + query + target], (document.id,)))
    return out[::max(1, len(out) // most)][:most] if most else out


def target_logp(lm: LanguageModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """ln p of each row's target after [BOS, its context]: (float32 [N, S], mask [N, S]), aligned at the end.

    With gradients where they are enabled; the same numbers as scoring gives. Raises UsageError for rows longer than the window."""
    S = max(len(target) for _, target in rows)
    where = next((p.device for p in lm.model.parameters()), torch.device("cpu")) if hasattr(lm, "model") else torch.device("cpu")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    found: list[Tensor | None] = [None] * len(rows)
    at = 0
    while at < len(order):
        batch = order[at:at + 1]
        while at + len(batch) < len(order) and (len(batch) + 1) * _length(rows[order[at + len(batch)]]) <= BATCH_TOKENS:
            batch.append(order[at + len(batch)])
        at += len(batch)
        longest = _length(rows[batch[-1]])
        if longest > lm.window:
            raise UsageError(f"passage, prefix and target take {longest} tokens, the window of '{lm.name}' is {lm.window}; use "
                             "fewer of each")
        ids, mask = left_pad([[lm.bos, *rows[i][0], *rows[i][1][:-1]] for i in batch], lm.bos)
        keep = min(S, ids.shape[1])
        logits = lm.forward(ids.to(where), mask=None if mask is None else mask.to(where), keep=keep).logits
        for i, logits_SV in zip(batch, logits):
            target = torch.tensor(rows[i][1], device=logits.device)
            logp_S = torch.log_softmax(logits_SV[-len(target):].float(), -1).gather(1, target[:, None])[:, 0]
            found[i] = torch.nn.functional.pad(logp_S, (S - len(target), 0))
    mask_NS = torch.tensor([[0] * (S - len(t)) + [1] * len(t) for _, t in rows], device=found[0].device)
    return torch.stack(found), mask_NS


def _length(row: tuple[Sequence[int], Sequence[int]]) -> int:
    return len(row[0]) + len(row[1])
