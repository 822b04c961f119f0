"""doctor: tells what is there, and finds a single flipped byte."""


def test_doctor_of_the_machine(ralm):
    data = ralm("doctor", "--json").json
    assert data["ok"] is True and data["store"] is None
    assert data["machine"]["cores"] >= 1 and data["machine"]["disk_free"] > 0
    assert data["versions"]["ralm"] and data["versions"]["python"]
    for extra in data["extras"].values():
        assert (extra["install"] is None) == (not extra["missing"])
    assert set(data["checkpoints"]) == {"base", "reader", "retro"}
    assert "cores" in ralm("doctor").out


def test_missing_packages_are_named_with_the_way_to_get_them(ralm, monkeypatch):
    from ralm.app import doctor

    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "pypdfium2" else version(name))
    data = ralm("doctor", "--json").json
    assert data["extras"]["pdf"]["missing"] == ["pypdfium2"]
    assert "pip install 'ralm[pdf]'" in ralm("doctor").out


def test_a_sound_store(ralm, shared):
    data = ralm("doctor", shared, "--json").json
    assert data["ok"] is True and data["problems"] == []
    assert (data["store"]["documents"], data["store"]["chunks"]) == (5, 5)
    assert [a["wrong"] for a in data["store"]["artifacts"]] == [[]]


def test_one_flipped_byte_is_found(ralm, kb):
    file = max((p for p in (kb / "index" / "bm25").glob("*/*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    ran = ralm("doctor", kb)
    assert ran.code == 1
    assert "PROBLEM" in ran.out and file.name in ran.out


def test_a_model_tells_what_it_gives(ralm, tiny):
    lm = ralm("doctor", "--lm", tiny, "--json").json["lm"]
    assert {"text", "logits"} & set(lm["gives"]) and lm["window"] == 512
