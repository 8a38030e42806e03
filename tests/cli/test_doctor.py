"""`doctor`: each line says what is there, and what is broken ends with 7."""

import json

from command import called, document

from sdpctl import machine


def states(told):
    return {row["name"]: row["state"] for row in told["rows"]}


def test_a_machine_that_runs_the_tests_is_not_broken_and_nothing_is_made(tmp_path):
    told = document(tmp_path, "doctor", OMP_NUM_THREADS="1")
    assert told["schema"] == "sdpctl.doctor/1"
    assert "broken" not in states(told).values()
    assert {"Python", "torch", "CUDA", "cores", "memory", "store", "disk"} <= set(states(told))
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_a_file_is_broken(tmp_path):
    (tmp_path / "file").write_text("x")
    done = called(tmp_path, "doctor", "--store", "file", "--json")
    assert done.returncode == 7
    assert states(json.loads(done.stdout))["store"] == "broken"
    assert "not work here before this is mended: store" in done.stderr


def test_extras_are_read_from_the_metadata(monkeypatch):
    about = type("About", (), {})
    texts = {
        "Provides-Extra": ["pages", "tests"],
        "Requires-Dist": ["numpy>=2", "no-such-one>=1; extra == 'pages'", "pytest; extra == 'tests'"],
    }
    about.get_all = lambda _, name: texts[name]
    monkeypatch.setattr(machine, "metadata", lambda _: about())
    found = {check.name: check for check in machine._extras()}
    assert (found["extra pages"].state, found["extra tests"].state) == ("missing", "ok")
    assert found["extra pages"].found == "not installed: no-such-one"
    assert "pip install 'sdpctl[pages]'" in found["extra pages"].advice
    texts["Requires-Dist"][0] = "no-such-two"
    assert [check.state for check in machine._packages()] == ["broken"]


def test_fewer_threads_than_cores_are_a_warning(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine._cores().state == "warning"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert machine._cores().state == "ok"
