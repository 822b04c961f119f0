"""Errors are for people: one line, the nearest known name, the extra to install."""

import sys

import pytest

from ralm import errors
from ralm.errors import CapabilityError, MissingDependency, RalmError, StoreError, UsageError, need, unknown


def test_the_family_and_its_exit_codes():
    assert all(issubclass(e, RalmError) for e in (UsageError, StoreError, CapabilityError, MissingDependency, errors.ReadError))
    assert issubclass(errors.FingerprintError, StoreError)
    assert (RalmError.exit_code, StoreError.exit_code, UsageError.exit_code, CapabilityError.exit_code) == (1, 1, 2, 2)


def test_unknown_names_the_nearest():
    assert str(unknown("fusion", "prepand", ["none", "prepend"])) == (
        "unknown fusion 'prepand'. Did you mean 'prepend'? Known: none, prepend.")
    assert "Did you mean" not in str(unknown("fusion", "zzz", ["none", "prepend"]))


def test_need_imports_or_names_the_extra():
    import json

    assert need("json", "a test", "lm") is json
    with pytest.raises(MissingDependency, match=r"reading moons needs the package 'no_such_package_here'.*ralm\[files\]"):
        need("no_such_package_here", "reading moons", "files")


@pytest.mark.parametrize("body, why", [("import no_such_package_here", "No module named 'no_such_package_here'"),
                                       ("raise ImportError('part b\\nis now elsewhere')", "part b is now elsewhere")])
def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch, body, why):
    (tmp_path / "halfthere.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match=rf"'halfthere', which is installed but cannot be imported \({why}\)"):
        need("halfthere", "a test", "lm")
    sys.modules.pop("halfthere", None)
