"""optuna-dashboard shows a study's trials as they are: it is started as a user would start it, and asked by its own JSON API."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import postgres_server
import pytest
from tiny_fakes import fakes

from lowsearch.study import run as studies
from lowsearch.study.settings import StudySettings, read_study_file
from lowsearch.study.storage import candidates, open_study
from lowsearch.study.workers.database import PASSWORD

SPACE = fakes.SPACE
pytestmark = pytest.mark.skipif(importlib.util.find_spec("optuna_dashboard") is None, reason="optuna-dashboard is not installed")
NO_SERVER = postgres_server.missing()


def asked(url, *paths, env=None):
    """What the dashboard of `url` answers, as JSON."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()", url, "--port", str(port), "--quiet"]
    process = subprocess.Popen(
        [*command, "--server", "wsgiref"], env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                return [json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=60)) for path in paths]
            except (URLError, ConnectionError):
                assert process.poll() is None, process.communicate()[1].decode()
                assert time.monotonic() < deadline, "it does not answer"
                time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()


def assert_shown(shown, folder, settings):
    """The dashboard's trials are the study's, network by network."""
    study = open_study(folder, settings.objectives)
    found = candidates(study, SPACE)
    assert (shown["objective_names"], shown["directions"]) == (["accuracy", "latency_ms"], ["maximize", "minimize"])
    assert [t["number"] for t in shown["trials"]] == [c.number for c in found]
    for trial, c in zip(shown["trials"], found, strict=True):
        assert {p["name"]: int(p["param_external_value"]) for p in trial["params"]} == study.get_trials()[c.number].params
        attrs = {attr["key"]: attr["value"] for attr in trial["user_attrs"]}
        assert attrs["origin"] == c.origin
        assert trial["state"] == "Complete"
        assert trial["values"] == pytest.approx([c.accuracy, fakes.FakeLatency().predict(c.genome[None])[0][0]])
        assert c.origin == "family" or attrs["why"].startswith(("diverse start", "expected gain", "least certain"))


def test_a_study_that_was_run_is_shown_with_its_networks_and_values(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SPACE", str(Path(__file__).with_name("tiny_space.yaml")))
    settings, folder = StudySettings(trials=3, workers=2), tmp_path / "study"
    studies.run(settings, folder, backend=fakes.backend())
    listed, shown = asked(f"sqlite:///{folder / 'study.db'}", "studies", "studies/1")
    assert [s["study_name"] for s in listed["study_summaries"]] == ["lowsearch"]
    assert_shown(shown, folder, settings)


@pytest.mark.skipif(bool(NO_SERVER), reason=NO_SERVER)
def test_so_is_one_on_a_server(tmp_path, monkeypatch):
    with postgres_server.PostgresServer() as server:
        monkeypatch.setenv(PASSWORD, postgres_server.PASSWORD)
        settings, folder = StudySettings(trials=2, workers=1, storage=server.url), tmp_path / "study"
        fakes.search(folder, settings)
        listed, shown = asked(server.url, "studies", "studies/1", env={"PGPASSWORD": postgres_server.PASSWORD})
        assert [s["study_name"] for s in listed["study_summaries"]] == [(read_study_file(folder) or {})["optuna_study"]]
        assert_shown(shown, folder, settings)
        gc.collect()  # Storages close their connections then, and psycopg would warn of open ones.
