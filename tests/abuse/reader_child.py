"""A reader beside a writer: `python reader_child.py STORE SECONDS SEED`, one line of JSON for every answer it was given.

Each turn it goes to the newest version (or opens the datastore anew), asks for a few things, and says at which version and what
it got; at the end `done`. Whether the answers are right is for the test to say, who knows what every version held."""

import json
import random
import sys
import time

from ralm.errors import StoreError
from ralm.index.sparse import BM25
from ralm.what.datastore import Datastore

QUERIES = [f"w{i} w{j}" for i in range(6) for j in range(i, 6)]


def main() -> None:
    path, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    r, end = random.Random(seed), None
    store = found = None
    print("ready", flush=True)
    while end is None or time.monotonic() < end:
        try:
            if found is None or r.random() < 0.2:
                found = None
                store = Datastore.open(path)
                found = BM25(store)
            else:
                store.refresh()
            query = r.choice(QUERIES)
            hits = found.search([query], 5)
            ids = hits.ids[0][hits.ids[0] >= 0].tolist()
            chunks = [(c.document, c.text) for c in store.chunks(ids)]
            name = f"d{r.randrange(80)}"
            text = store.document(name).text if store.has(name) else None
            end = end or time.monotonic() + seconds  # machine code is loaded now
            listed = sorted(d.id for d in store.documents()) if r.random() < 0.2 else None
            told = {"version": store.version, "query": query, "hits": chunks, "scores": hits.scores[0][:len(ids)].tolist(),
                    "name": name, "text": text, "documents": len(store), "listed": listed}
        except StoreError as e:
            told = {"error": str(e)}
        except BaseException as e:
            told = {"raised": f"{type(e).__name__}: {e}"}
        print(json.dumps(told), flush=True)
    print('"done"', flush=True)


if __name__ == "__main__":
    main()
