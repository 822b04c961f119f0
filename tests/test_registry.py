"""Spec strings: parsed once, the same everywhere, every mistake one line."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.how import fusion
from ralm.registry import Spec, make, parse


@dataclass
class Part:
    n: int = 1
    name: str = ""

    def __post_init__(self):
        if self.n < 0:
            raise ValueError(f"n={self.n} is negative")


def test_values_become_what_they_say():
    spec = parse("part:3,k=0.5,on=true,off=False,none=none,text=a:b/c,big=1e-3")
    assert spec == Spec("part", (3,), dict(k=0.5, on=True, off=False, none=None, text="a:b/c", big=1e-3))
    assert spec.args[0] is not True and isinstance(spec.args[0], int)


@pytest.mark.parametrize(("text", "line"), [
    ("", "empty name"), (":3", "empty name"), ("part:k=1,k=2", "given twice"), ("part:n=1,2", "bare values go first"),
    ("part:=2", "has no key"), ("prat", "Did you mean 'part'"), ("part:m=2", "unknown option of part 'part' 'm'.*Known: n, name"),
    ("part:1,a,2", "at most 2 values"), ("part:n=-1", "part 'part:n=-1': n=-1 is negative"), ("part:1,n=2", "multiple values")])
def test_mistakes_are_one_line(text, line):
    with pytest.raises(UsageError, match=line) as caught:
        make("part", text, {"part": Part})
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_make():
    assert make("part", "part:2,x", {"part": Part}) == Part(2, "x") == make("part", "part:name=x,n=2", {"part": Part})


names = st.text("abcdefg", min_size=1, max_size=5)
values = st.one_of(st.integers(-99, 99), st.booleans(), st.none(), st.floats(-10, 10), names.map(lambda s: s + "_"))


@given(names, st.lists(values, max_size=3), st.dictionaries(names, values, max_size=3))
def test_a_spec_reads_what_it_writes(name, args, options):
    spec = Spec(name, tuple(args), options)
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(("spec", "line"), [
    ("prepend:k=-1", "k=-1"), ("prepend:k=4,tokens=3", "cannot be shared"), ("ensemble:weights=both", "neither 'prior' nor"),
    ("ensemble:temperature=0", "temperature=0"), ("ensmble", "Did you mean 'ensemble'"), ("prepend:query=0", "at least 1")])
def test_fusions_refuse_what_makes_no_sense(spec, line):
    with pytest.raises(UsageError, match=line):
        fusion(spec)
