"""What the README shows is run as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "old.md").write_text("The old tower burned down in 1850. Nobody knows why.")
    (tmp_path / "docs" / "light.md").write_text("The lighthouse stands on a reef. The lighthouse was built in 1873 by Maria Holt.")
    return tmp_path


def test_the_python_example_runs_and_cites_what_it_says(docs, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    answer = names["answer"]
    assert not answer.abstained and "1873" in answer.answer
    for c in answer.citations:
        assert (docs / "docs" / c.document).read_text()[c.start:c.end] == c.quote
    assert not names["store"].has("old.md")
    assert capsys.readouterr().err == ""


def test_every_command_named_in_the_readme_exists():
    from ralm.app.cli import COMMANDS

    used = set(re.findall(r"(?m)(?:^|; )ralm ([a-z]+) ", README))
    assert used - {"eval"} <= set(COMMANDS), used - set(COMMANDS)


def test_what_the_readme_links_to_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
