"""Models and adapters of the hub, from a server on loopback."""

from __future__ import annotations

import gzip
import json
import threading
import tracemalloc
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat

import numpy as np
import pytest
from tests.converter.sources.other_formats import everything, state_of

from rkconvert.adapters.merged_model import AdapterSource, merged_model
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.sources.hub import hub_file
from rkconvert.sources.open import open_source
from rkruntime.errors import CheckpointError, HostError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which answers every request as it is told to."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            status, headers, body = answers.get(self.path.split("?")[0], (404, {"X-Error-Code": "RepoNotFound"}, b"{}"))
            self.send_response(status)
            for key, value in (
                ({"Content-Length": str(len(body))} if isinstance(body, bytes) else {}) | headers
            ).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                with suppress(OSError):
                    for part in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(part)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for module in ("constants", "file_download", "hf_api", "_snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.ENDPOINT", address, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address, raising=False)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(answers, folder, model):
    files = [file.name for file in folder.iterdir()]
    listing = json.dumps({"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}).encode()
    for revision in ("main", COMMIT):
        answers[f"/api/models/{model}/revision/{revision}"] = (200, {"Content-Type": "application/json"}, listing)
    tree = [{"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": name} for name in files]
    answers[f"/api/models/{model}/tree/{COMMIT}"] = (
        200,
        {"Content-Type": "application/json"},
        json.dumps(tree).encode(),
    )
    for name in files:
        data = (folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
        for revision in ("main", COMMIT):
            answers[f"/{model}/resolve/{revision}/{name}"] = (200, headers, data)


def test_a_hub_model_is_downloaded_and_its_commit_kept(hub, make_model, bits):
    base = make_model()
    (base / "model.gguf").write_bytes(b"not needed")
    serve(hub, base, "someone/tiny-gemma")
    checkpoint = open_source("someone/tiny-gemma")
    assert (checkpoint.name, checkpoint.revision) == ("someone/tiny-gemma", COMMIT)
    assert not (checkpoint.path / "model.gguf").exists()
    state = state_of(base)
    for name, values in everything(checkpoint).items():
        np.testing.assert_array_equal(values, bits(state[name]))


def test_an_adapter_of_the_hub(hub, make_model, make_adapter, peft_merge, assert_merged):
    base = make_model()
    adapter = make_adapter(base)
    serve(hub, adapter, "someone/pirate")
    model = merged_model(open_checkpoint(base), [AdapterSource("someone/pirate", 0.5)])
    assert [(item.name, item.revision) for item in model.adapters] == [("someone/pirate", COMMIT)]
    theirs = peft_merge(base, {adapter: 0.5})
    for name, info in model.weights.tensors.items():
        assert_merged(name, model.weights.read(name, 0, info.shape[0]), theirs[name])


def test_hub_answers(hub):
    model = "google/gemma-2-2b-it"
    hub[f"/api/models/{model}/revision/main"] = (403, {"X-Error-Code": "GatedRepo"}, b"{}")
    with pytest.raises(CheckpointError, match="gated") as error:
        open_source(model)
    assert f"https://huggingface.co/{model}" in error.value.hint
    hub["/api/models/a/b/revision/v9"] = (404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
    with pytest.raises(CheckpointError, match="no model a/b at v9"):
        open_source("a/b", "v9")
    with pytest.raises(CheckpointError, match="no model no/such, or you do not have access"):
        open_source("no/such")


def test_offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HostError, match="cannot be fetched from the hub"):
        open_source("google/gemma-2-2b-it")


def test_without_a_network_the_answer_comes_at_once(hub, monkeypatch):
    """huggingface_hub would try a name that does not resolve for half a minute."""
    for module in ("constants", "file_download", "hf_api", "_snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.ENDPOINT", "http://hub.invalid", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", None)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(HostError, match="there seems to be no network"):
        open_source("google/gemma-2-2b-it")


def test_a_folder_has_no_revision(make_model):
    with pytest.raises(CheckpointError, match="not a hub model"):
        open_source(str(make_model()), "main")


def chunks(data, count):
    """Many pieces of an answer whose length is not said."""
    return repeat(b"%x\r\n%b\r\n" % (len(data), data), count)


ENDLESS = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_without_an_end_is_not_read_to_it(hub, status, packed, monkeypatch):
    monkeypatch.setattr("rkconvert.sources.hub._MOST_ANSWER", 1 << 20)
    data = gzip.compress(b" " * 1_000_000) if packed else b" " * 100_000
    headers = ENDLESS | ({"Content-Encoding": "gzip"} if packed else {})
    for revision in ("main", COMMIT):
        path = f"/api/models/someone/endless/revision/{revision}"
        hub[path] = (status, headers, chunks(data, 100_000))
    tracemalloc.start()
    with pytest.raises((HostError, CheckpointError), match="does not end"):
        open_source("someone/endless", None)
    assert tracemalloc.get_traced_memory()[1] < 600_000_000
    tracemalloc.stop()


def test_a_file_whose_length_is_not_said_is_no_larger_than_some(hub, monkeypatch):
    monkeypatch.setattr("rkconvert.sources.hub._MOST_UNSTATED", 1 << 20)
    named = {"X-Repo-Commit": COMMIT, "ETag": '"x"'}
    hub["/someone/model/resolve/main/config.json"] = (200, named | ENDLESS, chunks(b"x" * 100_000, 100_000))
    with pytest.raises(HostError, match="does not end"):
        hub_file("someone/model", "config.json")


def test_redirects_that_lead_nowhere(hub):
    named = {"X-Repo-Commit": COMMIT, "ETag": '"x"', "Location": "/someone/model/resolve/main/config.json"}
    hub["/someone/model/resolve/main/config.json"] = (302, named, b"")
    with pytest.raises(HostError, match="cannot be fetched"):
        hub_file("someone/model", "config.json")


@pytest.mark.parametrize("place", ["/cdn/0123", "/api/resolve-cache/models/someone/model/x/config.json"])
def test_a_file_from_elsewhere_may_be_large(hub, monkeypatch, place):
    monkeypatch.setattr("rkconvert.sources.hub._MOST_ANSWER", 1000)
    data = json.dumps({"x": "y" * 100_000}).encode()
    named = {"X-Repo-Commit": COMMIT, "ETag": '"x"', "X-Linked-Size": str(len(data)), "Location": place}
    hub["/someone/model/resolve/main/config.json"] = (302, named, b"")
    hub[place] = (200, {"ETag": '"x"', "X-Repo-Commit": COMMIT}, data)
    found = hub_file("someone/model", "config.json")
    assert found.read_bytes() == data
