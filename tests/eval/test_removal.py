"""The removal experiment on made-up books: what each step holds, and that the scores are those of a store without the book."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
from ralm.errors import UsageError
from ralm.eval import removal
from ralm.model import RALM
from ralm.types import Document
from ralm.what.datastore import Datastore
from ralm.what.token_store import TokenStore

MARSH = "Captain Ormerod walked the marsh of Tull with his grey dog Pilchard; Captain Ormerod never spoke of the marsh of Tull. "
SEA = "The sea was calm. A gull stood on the rail and looked at the cook, who looked at the soup. "
LIBRARY = [Document(f"{a}/{t}", x * 3, t, metadata={"author": a}) for a, t, x in [
    ("Ann", "Marsh", MARSH), ("Ann", "Dog", "Pilchard the grey dog slept. " + MARSH), ("Ann", "Tull", "Again the marsh. " + MARSH),
    ("Bob", "Sea", SEA), ("Bob", "Soup", SEA + "The soup was hot. "), ("Cid", "Hill", "The hill was green, the road was long. ")]]
RECIPE = {"name": "small", "title": "made up", "how": "knn:k=8,lam=0.5,temperature=2", "tolerance": 1e-4,
          "store": {"books": ["Ann/Marsh", "Ann/Dog", "Bob/Sea", "Cid/"]},
          "case": [{"held": "Ann/Tull", "one": "Ann/Marsh", "control": "Bob/Soup"}]}


def test_every_step_is_a_store_that_never_held_what_is_gone(tmp_path, lm):
    rows = removal.run(RECIPE | {"lm": lm}, LIBRARY, tmp_path)
    assert [(r["step"], r["scored"]) for r in rows] == [(s, t) for s in removal.STEPS for t in ("held", "control")]
    held = {r["step"]: r for r in rows if r["scored"] == "held"}
    assert held["one_removed"]["removed"] == ["Ann/Marsh"] and held["author_removed"]["removed"] == ["Ann/Dog"]
    assert [held[s]["documents"] for s in removal.STEPS] == [4, 4, 3, 2]
    assert held["all"]["nats_per_token"] < held["one_removed"]["nats_per_token"] < held["author_removed"]["nats_per_token"]
    by_id = {d.id: d for d in LIBRARY}
    for step, left in (("one_removed", ["Ann/Dog", "Bob/Sea", "Cid/Hill"]), ("author_removed", ["Bob/Sea", "Cid/Hill"])):
        never = Datastore.build(tmp_path / step, [by_id[i] for i in left])
        score = RALM(lm, how=RECIPE["how"], tokens=TokenStore.build(never, lm)).score(by_id["Ann/Tull"].text)
        assert held[step]["nats_per_token"] == pytest.approx(score.nats_per_token(), abs=1e-6)
    assert RALM(lm).score(by_id["Ann/Tull"].text).nats_per_token() == pytest.approx(held["alone"]["nats_per_token"], abs=1e-6)
    assert not (tmp_path / "small.copy.ralm").exists() and len(Datastore.open(tmp_path / "small.ralm")) == 4
    again = removal.run(RECIPE | {"lm": lm}, LIBRARY, tmp_path)  # what is built is used again, and gives the same
    assert np.allclose([r["nats_per_token"] for r in again], [r["nats_per_token"] for r in rows], atol=1e-6)


def test_a_missed_figure_is_told(tmp_path, lm):
    case = RECIPE["case"][0] | {"expected": {"held": {"alone": 1.0}}}
    rows = removal.run(RECIPE | {"lm": lm, "case": [case]}, LIBRARY, tmp_path)
    assert [removal.good(r) for r in rows].count(False) == 1 and not removal.good(rows[0])
    assert "expected 1.0000" in "\n".join(removal.lines(RECIPE, rows))


@pytest.mark.parametrize("change, says", [({"held": "Ann/Nothing"}, "Ann/Nothing"), ({"held": "Ann/Dog"}, "to be stored")])
def test_recipes_that_cannot_be_are_refused(tmp_path, lm, change, says):
    with pytest.raises(UsageError, match=says):
        removal.run(RECIPE | {"lm": lm, "case": [RECIPE["case"][0] | change]}, LIBRARY, tmp_path)
    assert not (tmp_path / "small.ralm").exists()


def test_books_are_named_by_author_and_title(tmp_path):
    (tmp_path / "books.jsonl").write_text(json.dumps({"path": "Ann/The Marsh.md", "text": MARSH}) + "\n")
    (book,) = removal.books(tmp_path / "books.jsonl")
    assert (book.id, book.title, book.metadata) == ("Ann/The Marsh", "The Marsh", {"author": "Ann"})
    with pytest.raises(UsageError, match="--data"):
        list(removal.books(tmp_path / "none.jsonl"))


def test_the_recipe_that_ships_can_be_read():
    import tomllib
    from pathlib import Path

    recipe = tomllib.loads((Path(__file__).parents[2] / "recipes" / "knnlm_removal.toml").read_text())
    assert {"title", "lm", "how", "tolerance", "store", "case"} <= recipe.keys()
    assert all({"held", "one", "control"} <= c.keys() for c in recipe["case"])
