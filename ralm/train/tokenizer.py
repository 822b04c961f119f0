"""Train the byte-level BPE of the bundled LM.

Pieces a merge may not cross: a word with the space before it, up to four digits, a run of punctuation, a run of line ends.
Four digits, because the texts are full of years and a language model of this size does no arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

from ralm.lm.gpt import BPE, END

PIECES = (r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}{1,4}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+")


def train_bpe(texts: Iterable[str], vocab: int) -> BPE:
    """A tokenizer of `vocab` tokens, END being the first; all 256 bytes are tokens, so nothing is ever unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    return BPE(inner)
