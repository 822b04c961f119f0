"""Reading a model of transformers from a folder, the local cache or the hub: safetensors only, no code, no waiting."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ralm import progress
from ralm.errors import CapabilityError, UsageError

CONVERT = ("ralm reads no pickles; where you trust it, convert once: AutoModelForCausalLM.from_pretrained(NAME)"
           ".save_pretrained(FOLDER), the same for AutoTokenizer, and use hf:FOLDER")
SECONDS = 10.0  # for the hub's first answer


def load(name: str, dtype: Any, revision: str | None = None, tokenizer: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a hub name; the cache is asked first, the network once.

    Raises UsageError for what is not there or cannot be read, CapabilityError for models that are not causal."""
    from transformers import AutoTokenizer

    from ralm.lm.hf import check_causal

    where = _folder(name)
    revision = None if revision is None else str(revision)
    config, local = _config(where, name, revision)
    check_causal(config, f"hf:{name}")
    options = dict(revision=revision or "main", trust_remote_code=False)
    try:
        model = _weights(where, name, dtype, config, local, options)
    except UsageError:
        if not local or Path(where).is_dir():
            raise
        local = False  # the cache holds the config but not all weights: ask the hub
        _ask_hub(name, revision)
        model = _weights(where, name, dtype, config, local, options)
    if tokenizer is None:
        tokenizer = _reading(name, "tokenizer", AutoTokenizer.from_pretrained, where, local_files_only=local, **options)
    return model, tokenizer


def _folder(name: str) -> str:
    """The folder as a path, or the hub name unchanged. Raises UsageError for a path that holds no safe weights."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"'{name}' has no config.json, so it is no model folder; give one made by save_pretrained")
        _check_files([p.name for p in path.iterdir()], name)
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise UsageError(f"'{name}' is not a folder; give one made by save_pretrained, or a hub name (owner/name)")
    return name


def _check_files(files: list[str], name: str) -> None:
    if any(f.endswith(".safetensors") for f in files):
        return
    pickles = sorted(f for f in files if f.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    if pickles:
        raise UsageError(f"'{name}' holds its weights as pickle only ({pickles[0]}), which can run code; {CONVERT}")
    raise UsageError(f"'{name}' holds no weights (*.safetensors); give a folder made by save_pretrained, or a hub name")


def _config(where: str, name: str, revision: str | None) -> tuple[Any, bool]:
    """(config, whether local files are enough)."""
    from transformers import AutoConfig

    options = dict(revision=revision or "main", trust_remote_code=False)
    try:
        return AutoConfig.from_pretrained(where, local_files_only=True, **options), True
    except (OSError, ValueError, KeyError) as e:
        if Path(where).is_dir() or "trust_remote_code" in str(e):
            raise _unreadable(name, "config", e) from e
    _ask_hub(name, revision)
    return _reading(name, "config", AutoConfig.from_pretrained, where, **options), False


def _ask_hub(name: str, revision: str | None) -> None:
    """One question to the hub, without transformers' retries (23 s without a network): is it there, is it safe?"""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.errors import RepositoryNotFoundError as NotFound
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    # the hub's client has changed its HTTP package between versions; ask it which one it speaks
    http = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    try:
        info = HfApi().model_info(name, revision=revision, timeout=SECONDS)
    except HFValidationError as e:
        raise UsageError(f"'{name}' is neither a folder nor a possible hub name; give one of them") from e
    except NoRevision as e:
        raise UsageError(f"the hub has '{name}' but no revision '{revision}'; leave revision out for its newest") from e
    except GatedRepoError as e:
        raise UsageError(f"'{name}' is gated; accept its terms on the hub and log in (hf auth login)") from e
    except NotFound as e:
        raise UsageError(f"the hub has no model '{name}' that you may read; check the spelling, or log in") from e
    except (OfflineModeIsEnabled, http.TransportError, OSError) as e:
        if isinstance(e, HfHubHTTPError):
            raise UsageError(f"the hub refused '{name}': {_line(e)}; try again later, or give a model folder") from e
        raise UsageError(f"'{name}' is not in the local cache and the hub cannot be reached; give a model folder "
                         "(hf:FOLDER), use bundled:base, or run once with a network") from e
    _check_files([s.rfilename for s in info.siblings or ()], name)


def _weights(where: str, name: str, dtype: Any, config: Any, local: bool, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = _reading(name, "weights", AutoModelForCausalLM.from_pretrained, where, config=config, dtype=dtype,
                             use_safetensors=True, local_files_only=local, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    wrong = sorted(k[0] if isinstance(k, tuple) else str(k) for k in report.get("mismatched_keys") or ())
    if missing or wrong:  # transformers would fill them with noise and a warning
        raise UsageError(f"the weights of '{name}' lack {len(missing)} tensors of {type(model).__name__}, {len(wrong)} "
                         f"have another shape (first: {(missing + wrong)[0]}); give config and weights of one model")
    return model


def _reading(name: str, part: str, reader: Any, *args: Any, **kwargs: Any) -> Any:
    from safetensors import SafetensorError

    try:
        with progress.quiet() if kwargs.get("local_files_only") else nullcontext():  # a download may show its bar
            return reader(*args, **kwargs)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as e:
        raise _unreadable(name, part, e) from e


def _unreadable(name: str, part: str, e: Exception) -> UsageError | CapabilityError:
    if "trust_remote_code" in str(e):
        return CapabilityError(f"'{name}' needs code from its own repository, which ralm never runs; "
                               "use an architecture that transformers knows")
    return UsageError(f"the {part} of '{name}' cannot be read: {_line(e)}; give a model folder made by save_pretrained")


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200].rstrip(".")
