"""A training step of our dual encoder beside sentence-transformers' losses: the same model, batch and texts, processor seconds.

    python benchmarks/dpr_peer.py [batch] [steps]       # $RALM_DATA: where qa/squad-v1.1.train.json.zst is

One thread; the four take turns within each step. Both cached forms encode 8 texts at a time."""

import os
import statistics
import sys
import tempfile
import time
import warnings

import torch

warnings.simplefilter("ignore")

from sentence_transformers.sentence_transformer import losses  # noqa: E402

from ralm.train import recipes  # noqa: E402

RECIPE = {"kind": "dpr", "data": {"train": ["qa/squad-v1.1.train.json.zst"]},
          "encoder": {"model": "minilm", "tokens": 128, "dropout": 0.0}, "loss": {"temperature": 0.05, "hard": 1, "mined": 4}}


def main(batch: int = 16, steps: int = 5) -> None:
    torch.set_num_threads(1)
    root, folder = recipes.data_folder(), os.environ.get("RALM_RUNS") or tempfile.mkdtemp()
    tasks = {name: recipes.make(RECIPE | {"loss": RECIPE["loss"] | {"cached": name == "ralm, cached"},
                                          "train": {"steps": steps, "batch": batch, "micro": 8, "device": "cpu"}}, root, folder)
             for name in ("ralm", "ralm, cached")}
    model = tasks["ralm"].encoder.model
    tasks["ralm, cached"].encoder = tasks["ralm"].encoder
    theirs = {"MultipleNegativesRankingLoss": losses.MultipleNegativesRankingLoss(model, scale=20.0),
              "CachedMultipleNegativesRankingLoss": losses.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=8)}

    def ours(name, part):
        loss, _ = tasks[name].loss(part)
        loss.backward()
        return float(loss.detach())

    def other(name, part):
        columns = part.queries, part.passages[:batch], part.passages[batch:]
        loss = theirs[name]([model.preprocess(texts) for texts in columns], None)
        loss.backward()
        return float(loss.detach())

    runs = {name: ours for name in tasks} | {name: other for name in theirs}
    took, said = {name: [] for name in runs}, {}
    for step in range(steps + 1):
        part, = tasks["ralm"].batch(step)
        part = part._replace(mask_BN=torch.zeros_like(part.mask_BN))  # theirs know no false negatives
        for name, run in runs.items():
            model.zero_grad(set_to_none=True)
            began = time.process_time()
            said[name] = run(name, part)
            if step:  # the first one warms up
                took[name].append(time.process_time() - began)
    for name, seconds in took.items():
        print(f"{name:36} {statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})   loss {said[name]:.6f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
