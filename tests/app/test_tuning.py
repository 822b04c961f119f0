"""ralm tune knn: the setting it names gives the figure it promises, when scored."""

import pytest

pytest.importorskip("torch")
TRIED = ["--k", "2,8", "--lam", "0.1,0.5", "--temperature", "1,10"]


@pytest.fixture(scope="module")
def held(shared, tiny, tmp_path_factory):
    import shutil

    from ralm.app import cli

    kb = shutil.copytree(shared, tmp_path_factory.mktemp("tune") / "kb")
    assert cli.main(["tokens", str(kb), "--lm", tiny, "-q"]) == 0
    return kb


def test_the_best_setting_scores_as_promised(ralm, held, folder, tiny):
    data = ralm("tune", "knn", held, folder / "moon.md", folder / "deep", "--lm", tiny, *TRIED, "--json").json
    assert data.keys() >= {"best", "spec", "model", "gain", "table", "tokens", "documents", "edges", "lm", "version", "skipped"}
    assert len(data["table"]) == 8 and data["documents"] == 2
    assert data["best"]["nats_per_token"] == min(r["nats_per_token"] for r in data["table"])
    args = ["score", held, folder / "moon.md", folder / "deep", "--lm", tiny, "--exclude-self", "--json"]
    assert ralm(*args, "--how", data["spec"]).json["nats_per_token"] == pytest.approx(data["best"]["nats_per_token"], abs=1e-4)
    assert ralm(*args).json["nats_per_token"] == pytest.approx(data["model"]["nats_per_token"], abs=1e-4)


def test_text_names_the_command_and_the_edges(ralm, held, folder, tiny):
    out = ralm("tune", "knn", held, folder / "moon.md", "--lm", tiny, "--k", "4,8,16", "--lam", "0.1,0.2", "--temperature", "5").out
    assert "lam" in out and f"ralm score {held}" in out and "--how knn:k=" in out
    assert "at the end of what was tried" in out and "try --lam" in out


def test_a_gate_is_fitted_and_used(ralm, held, folder, tiny, tmp_path):
    missing = ralm("score", held, folder / "moon.md", "--lm", tiny, "--how", "knn:k=4,lam=learned", "-q")
    assert missing.code == 1 and "ralm tune knn --gate" in missing.err
    (tmp_path / "long.txt").write_text(" ".join(f"The tower number {i} is {i % 7} metres high, on the Moon." for i in range(160)))
    ran = ralm("tune", "knn", held, tmp_path / "long.txt", "--lm", tiny, "--k", "8", "--lam", "0.3", "--temperature", "3", "--gate",
               "--json")
    gate = ran.json["gate"]
    assert gate.keys() >= {"spec", "model", "fixed", "lam", "early", "late", "spare", "tokens", "apart"} and gate["apart"] > 0
    data = ralm("score", held, folder / "moon.md", "--lm", tiny, "--how", gate["spec"], "--json").json
    assert "lam='learned'" in data["convention"]["how"]
    assert ralm("doctor", held, "-q").code == 0
    made = ralm("explain", held, "The Moon.", "--lm", tiny, "--how", gate["spec"], "--json").json
    assert all(t["p_knn"] is not None for t in made["tokens"])
    short = ralm("tune", "knn", held, folder / "moon.md", "--lm", tiny, "--k", "8", "--gate", "-q")
    assert short.code == 2 and "more text" in short.err


def test_what_stands_below_is_kept(ralm, held, folder, tiny):
    data = ralm("tune", "knn", held, folder / "moon.md", "--lm", tiny, *TRIED, "--how", "prepend:k=1,tokens=64+knn", "--when",
                "every:16", "--json").json
    assert data["spec"].startswith("prepend:k=1,tokens=64+knn:k=")


@pytest.mark.parametrize("line, says", [
    ("tune knn {kb} {text} --lm {lm} --k a,b", "whole numbers"), ("tune knn {kb} {text} --lm {lm} --lam 2", "0..1"),
    ("tune knn {kb} {text} --lm {lm} --temperature 0", "temperature"), ("tune knn {kb} {text} --lm {lm} --k 0", "k="),
    ("tune knn {kb} {text} --lm {lm} --how prepend", "knn"), ("tune knn {kb} --lm {lm}", "at least one file"),
    ("tune kn {kb}", "did you mean 'knn'"), ("tune knn", "store is missing")])
def test_wrong_use_is_one_line_and_exit_code_2(line, says, ralm, held, folder, tiny):
    ran = ralm(*[w.format(kb=held, text=folder / "moon.md", lm=tiny) for w in line.split()], "-q")
    assert ran.code == 2 and ran.err.count("\n") == 1 and says in ran.err.lower() and ran.out == "", ran
