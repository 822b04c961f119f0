"""`ralm tune knn`: k, lam and temperature of --how knn, chosen on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ralm.app import options
from ralm.app.options import LM, At, Files, StoreArg, Strict, TokensArg, Where, positive, skip
from ralm.app.parts import Parts
from ralm.app.terminal import Output, bold, count, duration, number, table
from ralm.errors import UsageError

if TYPE_CHECKING:
    from ralm.model import RALM

SHOWN = 10  # settings listed


def knn(store: StoreArg, /, *files: Files, lm: LM = "bundled:base", tokens: TokensArg = "default",
        database: options.DatabaseArg = "default",
        how: Annotated[str, Parameter(help="What is tuned: knn, or what stands below it too, like prepend:k=1+knn. Its k, lam and "
                                           "temperature are replaced.")] = "knn",
        when: options.WhenArg = "once",
        k: Annotated[str | None, Parameter(name="--k", help="Numbers of neighbours to try, separated by commas.")] = None,
        lam: Annotated[str | None, Parameter(help="Weights to try.")] = None,
        temperature: Annotated[str | None, Parameter(help="Temperatures to try.")] = None,
        gate: Annotated[bool, Parameter(show_default=False, help="Also fit a weight for each token on these texts, for "
                                        "lam=learned, and keep it with the token store.")] = False,
        window: Annotated[int | None, Parameter(help="Most tokens the model sees at once.")] = None,
        stride: Annotated[int | None, Parameter(help="Tokens predicted per window after the first.")] = None,
        retriever: options.Finder = "auto", where: Where = None, at: At = None, strict: Strict = False,
        out: Output = Output()) -> None:  # noqa: B008
    """Choose k, lam and temperature on texts that are held out: each is searched once, all settings are computed from what was
    found. A text that is itself in the datastore does not find itself. Report figures on other texts than these.

    JSON: best {k, lam, temperature, nats_per_token, ppl, interval}, spec (for --how), model {nats_per_token, ppl}, gain,
    gain_interval, table [{k, lam, temperature, nats_per_token, ppl}], tokens, documents, searched, edges, seconds; lm, version,
    skipped; with --gate: gate {spec, model, fixed, lam, early, late, spare, tokens, apart, seconds}, nats per token on a tenth
    of the text that was kept apart."""
    from ralm.eval.tune import KS, LAMS, TEMPERATURES, tune_knn
    from ralm.how import fusion
    from ralm.how.output import Interpolate

    if not isinstance(fusion(how), Interpolate):
        raise UsageError(f"--how {how} ends in something else than knn, so there is nothing to tune; use knn or prepend:k=1+knn")
    tried = {"ks": _values("--k", k, int, KS), "lams": _values("--lam", lam, float, LAMS),
             "temperatures": _values("--temperature", temperature, float, TEMPERATURES)}
    positive("--window", window)
    positive("--stride", stride)
    skipped: list[Any] = []
    texts = list(options.documents("tune knn", files, strict, skipped))
    parts = Parts(store, at, retriever, tokens, database)
    system, kb = parts.system(lm, how, when, where, window), parts.kb
    found = tune_knn(system, texts, **tried, window=window, stride=stride)
    below = how.rpartition("+")[0] + "+" if "+" in how else ""
    data = found | {"spec": below + found["spec"], "lm": lm, "version": kb.version, "skipped": [skip(s) for s in skipped]}
    if gate:
        data["gate"] = _gate(system, texts, found["best"], below, window, stride)
    named = "" if tokens == "default" else f" --tokens {tokens}"
    out.show(data, lambda: _lines(data, f"ralm score {store} … --lm {lm}{named} --how "))


def _gate(system: RALM, texts: list[Any], best: dict[str, Any], below: str, window: int | None,
          stride: int | None) -> dict[str, Any]:
    """Fit the gate for the k and temperature that were chosen, and keep it with the token store."""
    from ralm.train.gate import fit_gate

    how = replace(system.how, k=best["k"], temperature=best["temperature"], lam=best["lam"])
    fitted = fit_gate(replace(system, how=how), texts, window=window, stride=stride)
    spec = f"{below}knn:k={best['k']},lam=learned,temperature={best['temperature']:g}"
    return {"spec": spec} | {k: v for k, v in fitted.items() if k != "gate"}


def _values(name: str, given: str | None, kind: Callable[[str], Any], usual: tuple[Any, ...]) -> tuple[Any, ...]:
    """Numbers separated by commas. Raises UsageError for what is none."""
    if given is None:
        return usual
    try:
        return tuple(kind(part) for part in given.split(","))
    except ValueError as e:
        what = "whole numbers" if kind is int else "numbers"
        like = ",".join(map(str, usual[:3]))
        raise UsageError(f"{name} {given}: {what} separated by commas are wanted, like {name} {like}") from e


def _lines(data: dict[str, Any], command: str) -> Iterator[str]:
    best, (low, high) = data["best"], data["gain_interval"]
    sure = f" ({number(low, 3)} to {number(high, 3)})" if data["documents"] > 1 else ""
    yield (f"{bold(data['spec'])}: perplexity {number(best['ppl'], 2)}, without neighbours {number(data['model']['ppl'], 2)}; "
           f"{number(data['gain'], 3)} nats a token saved{sure}")
    yield (f"over {count(data['documents'], 'document')}, {count(data['tokens'], 'token')}, {duration(data['seconds'])}; "
           f"{count(len(data['table']), 'setting')}, the best of them:")
    rows = sorted(data["table"], key=lambda r: r["nats_per_token"])[:SHOWN]
    yield from table([[r["k"], f"{r['lam']:g}", f"{r['temperature']:g}", number(r["nats_per_token"]), number(r["ppl"], 2)]
                      for r in rows], ["k", "lam", "temperature", "nats per token", "perplexity"], right=range(5))
    for name in data["edges"]:
        yield f"the best {name} is at the end of what was tried; try --{name} beyond {best[name]:g}"
    yield command + data["spec"]
    if g := data.get("gate"):
        learned = g["early"] if g["late"] is None else g["late"]
        yield (f"a weight for each token, on {count(g['apart'], 'token')} kept apart: {number(learned)} nats a token, one for "
               f"all {number(g['fixed'])}, the model {number(g['model'])}; kept with the token store")
        yield command + g["spec"]
