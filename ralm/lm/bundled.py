"""Where the checkpoints that ship with the package are: beside it in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

from ralm.errors import StoreError

PACKAGE = Path(__file__).resolve().parents[1]


def bundled(name: str) -> Path:
    """The folder of the bundled checkpoint `name`. Raises StoreError where the installation lacks it."""
    for folder in (PACKAGE / "checkpoints" / name, PACKAGE.parent / "checkpoints" / name):
        if folder.is_dir():
            return folder
    raise StoreError(f"this installation has no checkpoint '{name}' (looked in {PACKAGE / 'checkpoints'} and "
                     f"{PACKAGE.parent / 'checkpoints'}); reinstall ralm, or train it with recipes/{name}.toml")
