"""HOW evidence enters the model: at the input (`input`), by cross-attention (`intermediate`), at the output (`output`)."""

from __future__ import annotations

from ralm.types import Fusion


def fusion(spec: str) -> Fusion:
    """`none`, `prepend:k=2,tokens=200`, `ensemble:k=4,weights=posterior,temperature=5`. Raises UsageError for anything else."""
    from ralm.how.input import Ensemble, Plain, Prepend
    from ralm.registry import make

    return make("fusion", spec, {"none": Plain, "prepend": Prepend, "ensemble": Ensemble})
