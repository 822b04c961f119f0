"""Lists of specs: a comma between specs, and a comma between the options of one."""

import pytest

from ralm.app.options import positive, said, specs
from ralm.errors import UsageError


@pytest.mark.parametrize("given, wanted", [
    (["bm25,dense"], ["bm25", "dense"]),
    (["bm25", "dense"], ["bm25", "dense"]),
    (["bm25:form=atire,k1=1.2,dense"], ["bm25:form=atire,k1=1.2", "dense"]),
    (["dense:minilm,index=hnsw,bm25:b=0.4"], ["dense:minilm,index=hnsw", "bm25:b=0.4"]),
    (["bm25, bm25"], ["bm25"]),
    (None, ["bm25"])])
def test_specs(given, wanted):
    assert specs(given, "bm25") == wanted


@pytest.mark.parametrize("given", ["", "bm25,", ",bm25"])
def test_empty_parts_are_refused(given):
    with pytest.raises(UsageError, match="empty part"):
        specs([given])


def test_numbers_and_texts():
    assert positive("-k", 1) == 1 and positive("-k", None) is None
    for k in (0, -1):
        with pytest.raises(UsageError, match="at least 1"):
            positive("-k", k)
    assert said("query", " x ") == " x "
    with pytest.raises(UsageError, match="the query is empty"):
        said("query", " \t")
