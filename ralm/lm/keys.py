"""The state a token store keeps for each token: which one, where it is in a model, and what identifies the model.

    ffn_in   what the last block's feed-forward network reads (after the norm that precedes it): kNN-LM's best key
             (Khandelwal et al. 2020, table 5)
    hidden   what the output layer reads (after the last norm): there in every model"""

from __future__ import annotations

import hashlib
from typing import Any

from ralm.errors import CapabilityError, unknown

KEYS = ("ffn_in", "hidden")
# where the blocks of an architecture of transformers are, and the module in a block whose input is the key
LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3")
FEED_FORWARD = dict.fromkeys(LLAMAS, ("model.layers", "mlp")) | {
    "gpt2": ("transformer.h", "mlp"), "gpt_neox": ("gpt_neox.layers", "mlp"), "opt": ("model.decoder.layers", "fc1")}


def check_key(key: str) -> str:
    """Raise UsageError for a key that is none."""
    if key not in KEYS:
        raise unknown("key", str(key), KEYS)
    return key


def feed_forward(model: Any, kind: str, name: str) -> Any:
    """The module of a transformers model whose input is the key ffn_in. Raises CapabilityError for an unknown architecture."""
    if kind not in FEED_FORWARD:
        raise CapabilityError(f"where the last feed-forward network of '{name}' ({kind}) is, ralm does not know (it knows "
                              f"{', '.join(sorted(FEED_FORWARD))}); use key=hidden, which every model has")
    path, attribute = FEED_FORWARD[kind]
    for part in path.split("."):
        model = getattr(model, part)
    return getattr(model[-1], attribute)


def fingerprint(lm: Any) -> str:
    """32 hex digits of a model's weights (as they are held: float32 and bfloat16 differ) and of its tokenizer.

    Two models with the same one give the same keys: of a RETRO (lm/retro.py) it is the decoder's, since keys are states of the text
    alone. Counted once per model object."""
    if "neighbours" in lm.gives:
        return fingerprint(lm.base)
    if (found := getattr(lm, "_fingerprint", None)) is None:
        digest = hashlib.sha256()
        for name, tensor in sorted(lm.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
        digest.update(tokenizer_bytes(lm.tokenizer))
        found = lm._fingerprint = digest.hexdigest()[:32]
    return found


def _bytes(tensor: Any) -> Any:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def tokenizer_bytes(tokenizer: Any) -> bytes:
    """What decides a tokenizer's ids: the JSON of the tokenizers library, or the vocabulary where it is another kind."""
    inner = tokenizer.inner
    inner = getattr(inner, "backend_tokenizer", inner)
    if hasattr(inner, "to_str"):
        return inner.to_str().encode()
    return repr(sorted(inner.get_vocab().items())).encode()
