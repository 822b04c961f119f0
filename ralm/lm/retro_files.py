"""A RETRO as a folder: what was added to a decoder, and which decoder it was added to.

    save(lm, folder, Base.of(lm, "bundled:base"))         # the decoder as it is: only what is new is written
    lm = load(folder)                                     # --lm retro:FOLDER

    config.json           {"retro": RetroConfig, "base": {spec, fingerprint, trained}, "trained": what a model card says}
    adapter.safetensors   the new weights, float16 (loaded as float32)
    base.safetensors      the decoder's weights, float16, where they were trained too; its tokenizer stays the decoder's own
    base/                 instead of a spec: a decoder of ralm that exists nowhere else (from scratch), as lm/gpt.py writes one

The decoder is found by its spec and checked by its fingerprint: new weights around another decoder would read well and say
nonsense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralm.errors import FingerprintError, RalmError, StoreError, UsageError, need
from ralm.lm.keys import fingerprint
from ralm.registry import parse

if TYPE_CHECKING:
    from torch import nn

    from ralm.lm.retro import Retro
    from ralm.types import LanguageModel

OWN = "base"  # the folder of a decoder that has no spec
BUNDLED = "bundled:retro"


@dataclass(frozen=True)
class Base:
    """The decoder of a RETRO. spec: '' for one that is written beside the new weights; fingerprint: of the decoder that the spec
    loads (keys.py), so from before any training; trained: whether its weights are others now."""

    spec: str
    fingerprint: str = ""
    trained: bool = False

    @staticmethod
    def of(lm: LanguageModel, spec: str | None = None, trained: bool = False) -> Base:
        """Of a decoder as it is now (or of the one in a Retro), which is to be trained if `trained`. spec: what loads it, default
        its name. Raises UsageError for a name that loads nothing."""
        spec = lm.name.removeprefix("retro(").removesuffix(")") if spec is None else spec
        if spec and parse(spec).name not in ("bundled", "hf", "gpt"):
            raise UsageError(f"'{spec}' is no spec that loads a decoder; use bundled:base, hf:NAME or gpt:FOLDER, or '' for a "
                             "model of ralm that is to be written beside the new weights")
        return Base(spec, fingerprint(lm) if spec else "", trained)


def save(lm: Retro, folder: str | Path, base: Base, trained: Mapping[str, Any] | None = None) -> None:
    """Write a RETRO, float16. trained: what the run knows about itself, kept verbatim. Every file is replaced atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not base.spec:
        from ralm.lm.gpt import GPT
        from ralm.lm.gpt import save as save_gpt

        if not isinstance(lm.base, GPT):
            raise UsageError(f"'{lm.base.name}' is a model of transformers: save it with save_pretrained, and give hf:FOLDER as "
                             "its spec")
        save_gpt(folder / OWN, lm.base.model, lm.base.tokenizer, replace(lm.base.config, trained={}))
    elif base.trained:
        _write(lm.base.model, folder / "base.safetensors")
    else:
        (folder / "base.safetensors").unlink(missing_ok=True)
    _write(lm.adapter, folder / "adapter.safetensors")
    values = {"retro": asdict(lm.config) | {"layers": lm.layers}, "base": asdict(base), "trained": dict(trained or {})}
    part = folder / ".part"
    part.write_text(json.dumps(values, indent=1) + "\n")
    part.replace(folder / "config.json")


def load(source: str | Path, base: LanguageModel | None = None, device: str = "cpu") -> Retro:
    """The model `bundled:retro`, or the one in a folder that `save` wrote.

    base: the decoder itself, where its spec would not find it (it becomes part of the RETRO: where its weights were trained, it is
    given them). Raises StoreError for missing or damaged files, FingerprintError for another decoder."""
    need("safetensors", "a local language model", "lm")
    need("torch", "a local language model", "lm")
    from ralm.lm.bundled import bundled
    from ralm.lm.retro import Retro

    folder = bundled("retro") if str(source) == BUNDLED else Path(source)
    config, made = _config(folder)
    lm = base if base is not None else _decoder(made, folder, device)
    if made.spec and (found := fingerprint(lm)) != made.fingerprint:
        raise FingerprintError(f"'{folder}' was made around {made.spec} with fingerprint {made.fingerprint}, '{lm.name}' has "
                               f"{found}; give the decoder it was trained with, in the same precision, or train anew")
    out = Retro(lm, config)
    if made.spec and made.trained:
        _read(lm.model, folder / "base.safetensors")
        vars(lm).pop("_fingerprint", None)  # it is another model now
    _read(out.adapter, folder / "adapter.safetensors")
    out.model.requires_grad_(False)
    out.name = BUNDLED if str(source) == BUNDLED else f"retro:{folder}"
    return out


def described(folder: Path) -> dict[str, Any]:
    """config.json of a RETRO. Raises StoreError where there is none, or none of ours."""
    path = folder / "config.json"
    files = ("config.json", "adapter.safetensors")
    if missing := [f for f in files if not (folder / f).is_file()]:
        raise StoreError(f"'{folder}' has no {missing[0]}, so no RETRO is there; give a folder that `ralm train` of a retro recipe "
                         f"wrote ({', '.join(files)}), or a decoder as bundled:base or hf:NAME")
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or not {"retro", "base"} <= values.keys():
            raise ValueError("neither retro nor base in it")
    except ValueError as e:
        raise StoreError(f"{path} describes no RETRO ({' '.join(str(e).split())[:200]}); write the folder again") from e
    return values


def _config(folder: Path) -> tuple[Any, Base]:
    from ralm.lm.retro_net import RetroConfig

    values = described(folder)
    for key, kind in (("retro", RetroConfig), ("base", Base)):
        if odd := sorted(values[key].keys() - {f.name for f in fields(kind)}):
            raise StoreError(f"{folder / 'config.json'} has {key}.{odd[0]}, which this release does not know; update ralm, or "
                             "write the folder again")
    shape = {k: tuple(v) if isinstance(v, list) else v for k, v in values["retro"].items()}
    return RetroConfig(**shape), Base(**values["base"])


def _decoder(made: Base, folder: Path, device: str) -> LanguageModel:
    from ralm.lm import gpt

    if not made.spec:
        lm = gpt.load(folder / OWN, device)
        lm.name = f"gpt:{folder / OWN}"
        return lm
    spec = parse(made.spec)
    if spec.name == "hf":
        from ralm.lm.hf import HF

        return HF(str(spec.args[0]), **(spec.options | {"device": device}))
    return gpt.load(str(spec.args[0]), device)


def _write(module: nn.Module, path: Path) -> None:
    """All parameters in half precision, tied ones once. Raises RalmError for numbers that half precision cannot write."""
    import torch
    from safetensors.torch import save_file

    tensors = {n: p.detach().half().cpu().contiguous() for n, p in module.named_parameters()}
    if odd := [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]:
        raise RalmError(f"'{odd[0]}' holds numbers that float16 cannot write: the training ran away; use an earlier state")
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.chmod(0o644)  # safetensors writes for the owner alone
    part.replace(path)


def _read(module: nn.Module, path: Path) -> None:
    """Weights into parameters of whatever type and device. Raises StoreError where they are not those of this module."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    named = dict(module.named_parameters())
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise StoreError(f"{path} cannot be read ({' '.join(str(e).split())[:200]}); write the folder again") from e
    odd = sorted(named.keys() ^ tensors.keys()) or sorted(n for n in named if named[n].shape != tensors[n].shape)
    if odd:
        raise StoreError(f"weights and config of '{path.parent}' disagree: {odd[0]} is not in both, or of another shape; use files "
                         "that were written together")
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[name])
