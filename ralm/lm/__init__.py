"""WHO SPEAKS: language models by spec string. Nothing heavy is imported before a model is asked for.

`bundled:base`, `bundled:reader`, `bundled:retro`, `hf:NAME_OR_FOLDER,dtype=bf16,device=cuda`, `gpt:FOLDER,device=cuda` and
`retro:FOLDER,device=cuda` (a decoder, and a RETRO, that `ralm train` made), `remote:URL#NAME,timeout=120`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralm.errors import UsageError, unknown
from ralm.registry import make

if TYPE_CHECKING:
    from ralm.types import LanguageModel

BUNDLED = ("base", "reader", "retro")


def load(spec: str) -> LanguageModel:
    """The model a spec names. Raises UsageError for unknown names and options, and what the model itself raises."""
    return make("language model", spec, {"bundled": _bundled, "gpt": _gpt, "hf": _hf, "retro": _retro, "remote": _remote})


def _bundled(name: str = "") -> Any:
    if name == "base":
        from ralm.lm.gpt import load as load_gpt

        return load_gpt("base")
    if name == "reader":
        from ralm.lm.reader import Reader

        return Reader.load("bundled:reader")
    if name == "retro":
        from ralm.lm import retro_files

        return retro_files.load(retro_files.BUNDLED)
    raise unknown("bundled model", str(name), BUNDLED)


def _gpt(folder: str = "", device: str = "cpu") -> Any:
    if folder == "":
        raise UsageError("'gpt' names no model; write gpt:FOLDER")
    from ralm.lm.gpt import load as load_gpt

    return load_gpt(Path(str(folder)), device=str(device))


def _hf(name: str = "", dtype: str = "fp32", device: str = "cpu", revision: str | None = None,
        window: int | None = None, bos: int | None = None) -> Any:
    if name == "":
        raise UsageError("'hf' names no model; write hf:NAME or hf:FOLDER")
    from ralm.lm.hf import HF

    return HF(str(name), dtype=dtype, device=str(device), revision=None if revision is None else str(revision),
              window=window, bos=bos)


def _retro(folder: str = "", device: str = "cpu") -> Any:
    if folder == "":
        raise UsageError("'retro' names no model; write retro:FOLDER")
    from ralm.lm.retro_files import load as load_retro

    return load_retro(Path(str(folder)), device=str(device))


def _remote(address: str = "", timeout: float = 60.0) -> Any:
    url, mark, model = str(address).partition("#")
    if not url or not mark or not model:
        raise UsageError(f"'remote:{address}' needs an address and a model; write remote:http://HOST:PORT/v1#NAME")
    from ralm.lm.remote import Remote

    return Remote(url, model, timeout=timeout)
