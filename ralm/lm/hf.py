"""Any causal model of transformers as a LanguageModel: `HF("gpt2")`, `HF("folder")`, `HF(model, tokenizer)`.

What architectures differ in and callers must not see: positions under padding, what a cache may be cut to, the hidden
state the head reads (after the last norm, before soft-capping), how many rows the head has. Weights are read from
safetensors only and code from a hub is never run."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralm.errors import CapabilityError, RalmError, UsageError, need, unknown
from ralm.lm.keys import check_key, feed_forward
from ralm.types import LMOut

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "float32": "float32", "bfloat16": "bfloat16",
          "float16": "float16"}
ALIBI = ("bloom", "mpt")  # no position ids, but a bias on distances: unmoved by padding on the left
SANE = 10_000_000  # tokenizers without a limit of their own claim 1e30


class HF:
    """A decoder of transformers (>= 5). gives text, logits and hidden.

    model: a hub name, a folder made by save_pretrained, or a model object (then `tokenizer` too, and it is put in eval
    mode). dtype: fp32, bf16 or fp16 (default fp32; a model object keeps its own). window: most tokens at once (default
    and maximum: the model's).
    bos: id that stands before the first token, where neither tokenizer nor config names one.

    Raises UsageError for a model that cannot be found or read, CapabilityError for one that is not causal."""

    gives = frozenset({"text", "logits", "hidden"})

    def __init__(self, model: Any, tokenizer: Any = None, *, dtype: str | None = None, device: str = "cpu",
                 revision: str | None = None, window: int | None = None, bos: int | None = None):
        torch = need("torch", "a local language model", "lm")
        need("transformers", "a model of transformers", "lm")
        kind = _dtype(dtype)
        if isinstance(model, str | Path):
            from ralm.lm.hf_load import load

            self.name = f"hf:{model}"
            model, tokenizer = load(str(model), kind or torch.float32, revision, tokenizer)
        else:
            if tokenizer is None:
                raise UsageError(f"{type(model).__name__} came without its tokenizer; pass HF(model, tokenizer)")
            self.name = f"hf:{model.config.name_or_path or model.config.model_type}"
            check_causal(model.config, self.name)
            model = model.to(kind) if kind else model
        self.model = model.to(_device(device)).eval()  # dropout would make every score a different one
        self.config = model.config.get_text_config(decoder=True)
        self.tokenizer = HFTokenizer(tokenizer)
        self._head = model.get_output_embeddings()
        self._takes = set(inspect.signature(model.forward).parameters)
        # transformers 5.24 calls it `cache`, earlier ones `past_key_values`
        self._cache_name = next((n for n in ("cache", "past_key_values") if n in self._takes), None)
        if self._head is None or self._cache_name is None:
            raise CapabilityError(f"'{self.name}' ({type(model).__name__}) has no output layer or no key-value cache "
                                  "that ralm can use; use a decoder such as GPT-2, Llama, Qwen, Mistral, Gemma or OPT")
        self.vocab = int(self._head.weight.shape[0])
        self.rows = int(model.get_input_embeddings().weight.shape[0])  # ids the model can read
        self.window = self._window(window)
        self.bos, self.eos = self._bos(bos), self._special("eos_token_id")
        self.sliding = sliding_window(self.config)
        self._seen, self._ffn = threading.local(), None
        # The head's input *is* the hidden state, whatever the architecture does around it; forward returns it.
        self._head.register_forward_pre_hook(self._see)

    def __repr__(self) -> str:
        return (f"HF({self.name!r}, {self.config.model_type}, window={self.window}, vocab={self.vocab}, "
                f"{self.model.dtype})")

    # ---- facts ------------------------------------------------------------------------------------------------------

    def _window(self, asked: int | None) -> int:
        named = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
        limits = [v for n in named if isinstance(v := getattr(self.config, n, None), int) and v > 0]
        own = getattr(self.tokenizer.inner, "model_max_length", None)
        limit = limits[0] if limits else int(own) if own is not None and 0 < own < SANE else None
        if asked is None and limit is None:
            raise UsageError(f"neither config nor tokenizer of '{self.name}' tells its window; pass window=N")
        if asked is not None and (asked < 2 or (limit is not None and asked > limit)):
            raise UsageError(f"window={asked} does not fit '{self.name}', whose own is {limit}; use 2 to {limit}")
        return asked if asked is not None else limit

    def _special(self, name: str) -> int | None:
        """An id of tokenizer or config that the model can read (a default may belong to another vocabulary)."""
        for source in (self.tokenizer.inner, self.config):
            value = getattr(source, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and 0 <= value < self.rows:
                return value
        return None

    def _bos(self, asked: int | None) -> int:
        if asked is not None:
            if not 0 <= asked < self.rows:
                raise UsageError(f"bos={asked} is not a token of '{self.name}', which reads ids 0 to {self.rows - 1}")
            return asked
        for name in ("bos_token_id", "eos_token_id"):
            if (value := self._special(name)) is not None:
                return value
        raise UsageError(f"neither tokenizer nor config of '{self.name}' names a token to begin with; pass bos=ID")

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, ids_BT: torch.Tensor, *, past: Past | None = None, mask: torch.Tensor | None = None,
                keep: int | torch.Tensor | None = None, neighbours: Any = None, key: str | None = None) -> LMOut:
        """Logits [B, T', V] after each of ids_BT, the hidden state [B, T', D] they were made from, and the past; with `key` also
        that state (lm/keys.py).

        As LanguageModel.forward; float32, on the device of ids_BT. `past` is not changed: it may be continued again, or
        cropped and continued. Without a mask, new tokens are real and old ones what they were. Raises UsageError for
        ids, masks or lengths that do not fit, CapabilityError for `neighbours` and for padding that the architecture
        cannot see through."""
        if neighbours is not None:
            raise CapabilityError(f"'{self.name}' cannot read neighbours; use a model that attends to them (RETRO)")
        self._check_ids(ids_BT)
        length = past.length if past is not None else 0
        home, there = ids_BT.device, self.model.device
        mask_BL = self._mask(ids_BT, past, mask)
        positions_BT = self._positions(ids_BT, length, mask_BL)
        cache = past.fork() if past is not None else new_cache(self.config)
        extra: dict[str, Any] = {self._cache_name: cache}
        if "position_ids" in self._takes:
            extra["position_ids"] = positions_BT.to(there)
        if keep is not None and "logits_to_keep" in self._takes:
            extra["logits_to_keep"] = _keep(keep, there)
        if key is not None:
            self._watch(key)
        with self._watching():
            out = self.model(input_ids=ids_BT.to(there), use_cache=True, return_dict=True,
                             attention_mask=None if mask_BL is None else mask_BL.to(there), **extra)
            logits, hidden, state = out.logits, self._seen.hidden, self._seen.ffn_in
        state = state.reshape(*ids_BT.shape, -1) if key == "ffn_in" else None
        if keep is not None:
            index = _keep(keep, there)
            index = slice(-index, None) if isinstance(index, int) else index
            state = state if state is None else state[:, index]
            if "logits_to_keep" not in self._takes:
                logits, hidden = logits[:, index], hidden[:, index]
        state = hidden if key == "hidden" else state
        return LMOut(logits.float().to(home), hidden.float().to(home), Past(cache, length + ids_BT.shape[1], mask_BL, self.name),
                     None if state is None else state.float().to(home))

    def keys(self, ids_BT: torch.Tensor, key: str = "ffn_in") -> torch.Tensor:
        """The state `key` [B, T, D] at each of ids_BT, float32, nothing after it computed: what a token store is made of.

        Without padding's mask: pad on the right, a decoder does not look there. Raises CapabilityError for an architecture
        whose feed-forward network ralm cannot find."""
        self._check_ids(ids_BT)
        self._watch(key)
        with self._watching(stop=key):
            try:
                self.model(input_ids=ids_BT.to(self.model.device), use_cache=False, return_dict=True)
            except _Reached as reached:
                return reached.state.reshape(*ids_BT.shape, -1).float()
        raise RalmError(f"'{self.name}' did not reach its {key}; use key=hidden")

    def key_width(self, key: str = "ffn_in") -> int:
        """Numbers of a key. Raises as `keys` does."""
        self._watch(key)
        return int(self._head.weight.shape[1] if key == "hidden" else self.config.hidden_size)

    def _watch(self, key: str) -> None:
        """See to it that the state `key` is seen: the output layer always is, the feed-forward network once it is asked for."""
        if check_key(key) == "ffn_in" and self._ffn is None:
            self._ffn = feed_forward(self.model, self.config.model_type, self.name)
            self._ffn.register_forward_pre_hook(partial(self._see, name="ffn_in"))

    @contextmanager
    def _watching(self, stop: str | None = None) -> Iterator[None]:
        """Remember the states that this thread's forwards come by; `stop`: leave the forward at that one."""
        seen = self._seen
        seen.hidden, seen.ffn_in, seen.stop, seen.active = None, None, stop, True
        try:
            yield
        finally:
            seen.hidden, seen.ffn_in, seen.stop, seen.active = None, None, None, False

    def _see(self, module, args, name: str = "hidden") -> None:
        if getattr(self._seen, "active", False):  # only while this thread is inside this object's forward
            setattr(self._seen, name, args[0])
            if self._seen.stop == name:
                raise _Reached(args[0])

    def _check_ids(self, ids_BT: torch.Tensor) -> None:
        if ids_BT.dim() != 2 or ids_BT.numel() == 0:
            raise UsageError(f"ids have shape {tuple(ids_BT.shape)}; '{self.name}' reads [batch, tokens]")
        low, high = int(ids_BT.min()), int(ids_BT.max())
        if low < 0 or high >= self.rows:
            raise UsageError(f"token id {low if low < 0 else high} is not one of '{self.name}', which reads 0 to "
                             f"{self.rows - 1}; use the tokenizer that belongs to it")

    def _mask(self, ids_BT: torch.Tensor, past: Past | None, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask over past and new tokens, int64 [B, past+T]; None where nothing is padded."""
        import torch

        batch, length = ids_BT.shape[0], (past.length if past is not None else 0) + ids_BT.shape[1]
        if mask is None and past is not None and past.mask is not None:
            mask = torch.cat([past.mask, torch.ones(len(past.mask), ids_BT.shape[1], dtype=torch.long,
                                                    device=past.mask.device)], 1)
        if mask is None:
            return None
        if tuple(mask.shape) != (batch, length):
            raise UsageError(f"mask has shape {tuple(mask.shape)}, past and ids make {(batch, length)}; "
                             "it covers the past too")
        mask_BL = mask.to(ids_BT.device).long()
        if bool(mask_BL.all()):
            return None
        if not bool(mask_BL.any(-1).all()):
            raise UsageError("mask has a row without any real token; leave that row out of the batch")
        self._check_padding(mask_BL)
        return mask_BL

    def _check_padding(self, mask_BL: torch.Tensor) -> None:
        """Padding between real tokens (right padding, continued) counts as distance where only places are compared."""
        begins_B = (mask_BL[:, 1:] > mask_BL[:, :-1]).sum(-1) + mask_BL[:, 0]
        between = bool((begins_B > 1).any())
        if between and self.sliding is not None and mask_BL.shape[1] > self.sliding:
            raise CapabilityError(f"'{self.name}' attends to the last {self.sliding} of {mask_BL.shape[1]} places and "
                                  "padding stands between real tokens, which would count as distance; pad on the left")
        if "position_ids" not in self._takes and (between or self.config.model_type not in ALIBI):
            way = "pad on the left" if between else "run rows of one length together"
            raise CapabilityError(f"'{self.name}' ({self.config.model_type}) takes no positions, so this padding would "
                                  f"move its tokens; {way}")

    def _positions(self, ids_BT: torch.Tensor, length: int, mask_BL: torch.Tensor | None) -> torch.Tensor:
        """Positions [B, T] that count real tokens only, from 0; padding in front shares position 0."""
        import torch

        if mask_BL is None:
            positions_BT = torch.arange(length, length + ids_BT.shape[1], device=ids_BT.device).expand(len(ids_BT), -1)
        else:
            positions_BT = (mask_BL.cumsum(-1) - 1).clamp(min=0)[:, length:]
        if (most := int(positions_BT.max()) + 1) > self.window:
            raise UsageError(f"{most} tokens do not fit the window of '{self.name}', which is {self.window}; "
                             "shorten the text or crop the past")
        return positions_BT


class _Reached(Exception):
    """Leaves a forward whose rest is not wanted."""

    def __init__(self, state: torch.Tensor):
        self.state = state


class Past:
    """Keys and values of the tokens seen so far. `length` counts places, padding included. Its holder owns it."""

    def __init__(self, cache: Any, length: int, mask: torch.Tensor | None, name: str):
        self.cache, self.length, self.mask, self.name = cache, length, mask, name

    def fork(self) -> Any:
        """A cache that can be continued without changing this one. Attention layers grow into new tensors."""
        from transformers.cache_utils import DynamicLayer

        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(x) if type(x) is DynamicLayer else copy.deepcopy(x) for x in self.cache.layers]
        return cache

    @property
    def croppable(self) -> bool:
        """Whether it holds a state per token, not one of all."""
        from transformers.cache_utils import DynamicLayer

        return all(type(x) is DynamicLayer or type(x).__name__ == "DummyLayer" for x in self.cache.layers)

    def crop(self, n: int) -> Past:
        """Keep the first n places; returns itself. Raises CapabilityError where the state of earlier tokens is gone."""
        if not 0 <= n <= self.length:
            raise UsageError(f"cannot crop a past of {self.length} tokens to {n}; use 0 to {self.length}")
        if n == self.length:
            return self
        if not self.croppable:
            raise CapabilityError(f"'{self.name}' keeps a running state, not one per token: its past cannot be cropped "
                                  f"from {self.length} to {n}; run the first {n} tokens again")
        self.cache.crop(n - self.length)
        self.length = n
        self.mask = None if self.mask is None else self.mask[:, :n]
        return self

    def reorder(self, index_B: torch.Tensor) -> Past:
        """Row b becomes what row index_B[b] was; returns itself. The batch may grow or shrink."""
        self.cache.reorder_cache(index_B)
        self.mask = None if self.mask is None else self.mask[index_B.to(self.mask.device)]
        return self


class HFTokenizer:
    """A tokenizer of transformers without its habits: adds no special tokens, cleans nothing up, and text that spells a
    special token is text (a document must not be able to end the prompt)."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def encode(self, text: str) -> list[int]:
        return self.inner(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """What `encode` gives, and the characters [start, end) each token stands at; None of a kind that does not tell."""
        if not getattr(self.inner, "is_fast", False):
            return None
        told = self.inner(text, add_special_tokens=False, split_special_tokens=True, verbose=False, return_offsets_mapping=True)
        return told["input_ids"], told["offset_mapping"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def new_cache(config: Any) -> Any:
    """An empty cache in which sliding-window layers keep every token (the mask slides), so that it can be cropped."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    return cache


def sliding_window(config: Any) -> int | None:
    """The smallest number of places a layer looks back at, None where every layer sees everything."""
    from transformers.cache_utils import DynamicCache

    sizes = [x.sliding_window for x in DynamicCache(config=config).layers if hasattr(x, "sliding_window")]
    return min(sizes, default=None)


def check_causal(config: Any, name: str) -> None:
    """Raise CapabilityError unless `config` is that of a decoder which sees only earlier tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config.model_type
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise CapabilityError(f"'{name}' ({kind}) is an encoder-decoder; use a causal model (a decoder)")
    if (kind in MASKED and not getattr(config, "is_decoder", False)) or getattr(
            text, "use_bidirectional_attention", None) in (True, "all"):
        raise CapabilityError(f"'{name}' ({kind}) sees later tokens (a masked model); use a causal model (a decoder)")
    if kind not in CAUSAL:
        raise CapabilityError(f"'{name}' ({kind}) is no language model that transformers can run as a decoder; "
                              "use a causal model")


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise unknown("dtype", str(name), ("fp32", "bf16", "fp16"))
    return getattr(torch, DTYPES[name])


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch says "not compiled with CUDA" by an assertion
        raise UsageError(f"device '{name}' cannot be used here: {str(e).splitlines()[0]}; use device=cpu") from e
    return device


def _keep(keep: int | torch.Tensor, device: torch.device) -> int | torch.Tensor:
    if isinstance(keep, int):
        if keep < 1:
            raise UsageError(f"keep={keep} asks for no logits; use at least 1, or none for all positions")
        return keep
    if keep.dim() != 1 or keep.numel() == 0:
        raise RalmError(f"keep has shape {tuple(keep.shape)}; give positions as one row [T']")
    return keep.to(device).long()
