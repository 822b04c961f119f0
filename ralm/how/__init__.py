"""HOW evidence enters the model: at the input (`input`), by cross-attention (`intermediate`), at the output (`output`)."""

from __future__ import annotations

import re

from ralm.errors import UsageError
from ralm.types import Fusion


def fusion(spec: str) -> Fusion:
    """`none`, `prepend:k=2,tokens=200`, `ensemble:k=4,weights=posterior,temperature=5`, `knn:k=1024,lam=0.25,temperature=10`,
    `trime:k=1024,temperature=1.2`, `infgram:lam=0.05,sparse=0.2,levels=4`, `retro:k=2`, and compositions:
    `prepend:k=1+knn:lam=0.2` mixes at the output what a model that reads passages says, `retro+knn` what one that reads neighbours
    says.

    Raises UsageError for anything else."""
    from dataclasses import replace

    from ralm.how.infinigram import InfiniGram
    from ralm.how.input import Ensemble, Plain, Prepend
    from ralm.how.intermediate import CrossAttend
    from ralm.how.joint import Joint
    from ralm.how.output import Interpolate
    from ralm.registry import make

    table = {"none": Plain, "prepend": Prepend, "ensemble": Ensemble, "retro": CrossAttend, "knn": Interpolate,
             "trime": Joint, "infgram": InfiniGram}
    first, *more = re.split(r"\+(?=[a-z])", spec.strip())
    made = make("fusion", first, table)
    for part in more:
        upper = make("fusion", part, table)
        if upper.how != "output":
            raise UsageError(f"'{part}' in '{spec}' does not work at the output, so nothing can stand before it; the order is "
                             "prepend+knn, retro+knn")
        made = replace(upper, inner=made)
    return made
