"""Uploads against a stand-in of the hub: a local server that speaks the calls which huggingface_hub makes."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import constants

from rkconvert import demo
from rkconvert.conversion.convert import Options, convert
from rkconvert.output import publish
from rkconvert.output.publish import Destination, check_destination, push
from rkconvert.progress import QUIET
from rkruntime import cli
from rkruntime.bundle.manifest import MANIFEST, open_bundle
from rkruntime.errors import BundleError, HostError, OutputError, UsageError

# huggingface_hub hands its client bytes in a way that the client calls old; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_averysecrettoken"
TO = Destination("me/gemma-demo")


def described(name, data):
    """A file as the hub lists it: by the hash of Git LFS if it is large, else by Git's own."""
    if len(data) > 10_000:
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": lfs}
    git = subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True, check=True)
    return {"rfilename": name, "size": len(data), "blobId": git.stdout.decode().strip()}


class StandIn(BaseHTTPRequestHandler):
    """Users, repositories and LFS objects in memory; every request is kept for the tests to look at."""

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        data = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(data), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_call(self):
        hub, body = self.server.hub, self.body()
        hub.calls.append((self.command, self.path.partition("?")[0], body))
        if hub.meanwhile and hub.meanwhile[0] in self.path:
            hub.meanwhile[1]()
        if hub.refuses and hub.refuses[0] in self.path:
            return self.answer({"error": f"no: {self.headers.get('Authorization')}"}, hub.refuses[1])
        if self.path.startswith("/lfs/"):
            hub.objects[self.path[5:]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/whoami-v2":
            return self.answer(hub.person)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            return self.create(hub, json.loads(body))
        return self.repository(hub, body)

    do_GET = do_POST = do_PUT = handle_call

    def create(self, hub, asked):
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in hub.repos:
            return self.answer({"url": f"{hub.url}/{repo}", "error": "exists"}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        hub.repos[repo] = {"private": private, "files": {".gitattributes": b"x"}}
        return self.answer({"url": f"{hub.url}/{repo}"})

    def repository(self, hub, body):
        path = self.path.partition("?")[0].removeprefix("/api/models/").lstrip("/")
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        owner, name, *rest = path.split("/")
        repo = hub.repos.get(f"{owner}/{name}")
        if repo is None:
            return self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        if not rest:
            files = [described(file, data) for file, data in repo["files"].items()]
            return self.answer({"id": f"{owner}/{name}", "private": repo["private"], "siblings": files})
        if rest[0] == "preupload":
            large = [(file["path"], file["size"] > 10_000) for file in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False} for path, lfs in large
            ]
            return self.answer({"files": modes})
        assert rest[0] == "commit"
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                repo["files"][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile" and item["value"]["path"] not in hub.loses:
                repo["files"][item["value"]["path"]] = hub.objects[item["value"]["oid"]]
        return self.answer({"commitUrl": f"{hub.url}/{owner}/{name}/commit/0", "commitOid": "0" * 40})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    url = f"http://127.0.0.1:{server.server_port}"
    person = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}
    server.hub = SimpleNamespace(
        url=url, person=person, repos={}, objects={}, calls=[], refuses=None, loses=(), meanwhile=None
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # The storage protocol xet has a server of its own; without it the client uses Git LFS.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server.hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert(Options(demo.checkpoint(), tmp_path_factory.mktemp("converted") / "demo-bundle", max_context=256))


@pytest.fixture
def bundle(converted, tmp_path):
    return open_bundle(shutil.copytree(converted.path, tmp_path / "demo-bundle"))


def test_exactly_the_manifests_files_go_there(hub, bundle):
    (bundle.path / "notes-to-myself.txt").write_text("private")
    (bundle.path / "report" / "other.log").write_text("private")
    url = push(bundle, TO)
    assert url == f"{hub.url}/me/gemma-demo"
    there = hub.repos["me/gemma-demo"]
    assert there["private"] is True
    assert set(there["files"]) - {".gitattributes"} == {*bundle.manifest.files, MANIFEST}
    for name, record in bundle.manifest.files.items():
        assert hashlib.sha256(there["files"][name]).hexdigest() == record.sha256
    assert open_bundle(bundle.path).manifest.to_yaml() == there["files"][MANIFEST].decode()
    assert not any(b"private" in body for _, path, body in hub.calls if "create" not in path)


def test_public_only_when_asked(hub, bundle):
    push(bundle, Destination("us/gemma-demo", public=True))
    assert hub.repos["us/gemma-demo"]["private"] is False


def test_checks_need_no_work_and_write_nothing(hub):
    check_destination(TO)
    assert [method for method, _, _ in hub.calls] == ["GET", "GET"]
    assert hub.repos == {}


NO_REPOSITORIES = ["gemma", "me/", "/x", "me/a/b", "../me/x", "me/x y", "https://huggingface.co/me/x"]


@pytest.mark.parametrize("repo", [*NO_REPOSITORIES, "me/a--b", "me/a..b", "me/a.git", "me/a-"])
def test_what_is_no_repository(hub, repo):
    with pytest.raises(UsageError, match="not a repository name"):
        check_destination(Destination(repo))
    assert hub.calls == []


def test_another_persons_repository(hub):
    with pytest.raises(UsageError, match="knows you as me, who cannot write to google/gemma"):
        check_destination(Destination("google/gemma"))


def test_a_token_that_may_only_read(hub):
    hub.person["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(HostError, match="is read-only"):
        check_destination(TO)


def test_nobody_logged_in(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HostError, match="requires a login") as caught:
        check_destination(TO)
    assert "hf auth login" in caught.value.hint
    assert hub.calls == []


@pytest.mark.parametrize("token", ["hf_\u00fc", "hf_a\x07b"])
def test_what_is_no_token(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HostError, match="characters that no token has"):
        check_destination(TO)
    assert hub.calls == []


def test_a_token_that_is_no_longer_valid(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(HostError) as caught:
        check_destination(TO)
    assert "no longer valid" in caught.value.hint
    assert "hf_revoked" not in caught.value.message


@pytest.mark.parametrize(
    ("private", "public", "words"), [(False, False, "is public, but private"), (True, True, "is private, but public")]
)
def test_an_existing_repository_of_the_other_kind(hub, private, public, words):
    hub.repos["me/gemma-demo"] = {"private": private, "files": {}}
    with pytest.raises(UsageError, match=words):
        check_destination(Destination("me/gemma-demo", public))


def test_an_existing_repository_with_files(hub, bundle):
    hub.repos["me/gemma-demo"] = {"private": True, "files": {".gitattributes": b"", "model.rkllm": b"precious"}}
    with pytest.raises(OutputError, match=r"already contains files \(model\.rkllm\)"):
        push(bundle, TO)
    assert hub.repos["me/gemma-demo"]["files"]["model.rkllm"] == b"precious"


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("files", [{}, {"other.txt": b"theirs"}])
def test_a_repository_that_appears_meanwhile_is_looked_at_again(hub, bundle, public, files):
    """Also what an organization's rules do: a new repository may be other than it was asked for."""
    theirs = {"private": public, "files": {".gitattributes": b"", **files}}
    hub.meanwhile = ("/repos/create", lambda: hub.repos.update({TO.repo: theirs}))
    with pytest.raises(UsageError, match=r"but (public|private) was asked for\. Nothing was uploaded"):
        push(bundle, Destination(TO.repo, public))
    assert hub.repos[TO.repo]["files"] == {".gitattributes": b"", **files}


def test_files_that_appear_meanwhile_are_kept(hub, bundle):
    theirs = {"private": True, "files": {"README.md": b"theirs"}}
    hub.meanwhile = ("/repos/create", lambda: hub.repos.update({TO.repo: theirs}))
    with pytest.raises(OutputError, match="already contains files"):
        push(bundle, TO)
    assert hub.repos[TO.repo]["files"] == {"README.md": b"theirs"}


def test_an_upload_whose_answer_was_lost_counts(hub, bundle, capsys):
    url = push(bundle, TO)
    before = dict(hub.repos[TO.repo]["files"])
    hub.calls.clear()
    assert push(bundle, TO) == url
    assert not [path for method, path, _ in hub.calls if method != "GET"]
    assert hub.repos[TO.repo]["files"] == before
    hub.repos[TO.repo]["files"]["README.md"] += b"!"
    with pytest.raises(OutputError, match="already contains files"):
        push(bundle, TO)


@pytest.mark.parametrize("person", [[], None, "me", {}, {"name": "me", "orgs": 7}, {"name": "me", "orgs": ["us"]}])
def test_an_answer_that_is_no_hubs(hub, person):
    hub.person = person
    with pytest.raises(HostError, match="an answer about me/gemma-demo that huggingface_hub cannot read") as caught:
        check_destination(TO)
    assert "HF_ENDPOINT" in caught.value.hint


def test_the_hubs_reason_is_told(hub, bundle, monkeypatch):
    """The client announces it in one line, and has it in the next."""
    error = {"error": {"code": 422, "message": "quota exceeded"}}
    monkeypatch.setattr(
        "huggingface_hub._commit_api.post_lfs_batch_info",
        lambda **asked: ([], [{"oid": "x", "size": 1, **error}], None),
    )
    with pytest.raises(HostError, match="quota exceeded") as caught:
        push(bundle, TO)
    assert "network" in caught.value.hint


def test_a_silent_hub_ends_the_call(hub, monkeypatch):
    silent = threading.Event()
    hub.meanwhile = ("/whoami", lambda: silent.wait(60))
    monkeypatch.setattr("rkconvert.sources.hub._PATIENCE_S", 0.2)
    try:
        with pytest.raises(HostError, match="timed out"):
            check_destination(TO)
    finally:
        silent.set()


def test_an_empty_repository_is_filled(hub, bundle):
    hub.repos["me/gemma-demo"] = {"private": True, "files": {".gitattributes": b""}}
    push(bundle, TO)
    assert MANIFEST in hub.repos["me/gemma-demo"]["files"]


def test_a_changed_bundle_stays_here(hub, bundle):
    (bundle.path / "README.md").write_text("something else")
    with pytest.raises(BundleError, match=r"README\.md has 14 bytes"):
        push(bundle, TO)
    assert hub.repos == {}


SECRET = b"a secret of this machine"


def leads_outside(path):
    """The path becomes a link to something else of the same size."""
    other = path.parent.parent / "secret"
    other.write_bytes((SECRET * (1 + path.stat().st_size // len(SECRET)))[: path.stat().st_size])
    path.unlink()
    path.symlink_to(other)


def written_over(path):
    path.write_bytes((SECRET * (1 + path.stat().st_size // len(SECRET)))[: path.stat().st_size])


@pytest.mark.parametrize("change", [leads_outside, written_over])
@pytest.mark.parametrize("name", ["tokenizer.json", "model.rkemu", MANIFEST])
@pytest.mark.parametrize("moment", ["/whoami", "/repos/create", "/preupload", "/commit/"])
@pytest.mark.parametrize("limit", [0, 10 << 20])
def test_what_changes_meanwhile_is_never_uploaded_in_silence(hub, bundle, monkeypatch, change, name, moment, limit):
    # Files above the limit are read by the client itself, at any moment.
    monkeypatch.setattr(publish, "_IN_MEMORY", limit)
    whole = {file: (bundle.path / file).read_bytes() for file in [*bundle.manifest.files, MANIFEST]}
    done = []
    hub.meanwhile = (moment, lambda: done or (done.append(1), change(bundle.path / name)))
    try:
        push(bundle, TO)
    except (BundleError, HostError) as error:
        assert error.hint
    else:
        assert {**whole, ".gitattributes": b"x"} == hub.repos["me/gemma-demo"]["files"]
    assert done
    if limit:
        assert not any(SECRET in body for _, _, body in hub.calls)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "report/../../secret", ".git/config", "secret-link"])
def test_a_manifest_that_names_what_is_outside(hub, bundle, tmp_path, name):
    (tmp_path / "secret").write_bytes(SECRET)
    (bundle.path / "secret-link").symlink_to(tmp_path / "secret")
    (bundle.path / ".git").mkdir()
    (bundle.path / ".git" / "config").write_bytes(SECRET)
    path = bundle.path / MANIFEST
    manifest = yaml.safe_load(path.read_text())
    manifest["files"][name] = {"size": len(SECRET), "sha256": hashlib.sha256(SECRET).hexdigest()}
    path.write_text(yaml.safe_dump(manifest))
    with pytest.raises((BundleError, HostError)):
        push(open_bundle(bundle.path), TO)
    assert not any(SECRET in body for _, _, body in hub.calls)


def test_a_bundle_without_the_licences_notice_stays_here(hub, bundle):
    path = bundle.path / MANIFEST
    manifest = yaml.safe_load(path.read_text())
    del manifest["files"]["NOTICE"]
    path.write_text(yaml.safe_dump(manifest))
    with pytest.raises(BundleError, match="has no NOTICE"):
        push(open_bundle(bundle.path), TO)
    assert hub.repos == {}


@pytest.mark.parametrize(("where", "status"), [("/lfs/", 400), ("/commit/", 500), ("/repos/create", 403)])
def test_a_failed_upload_says_what_to_do_and_no_token(hub, bundle, where, status):
    hub.refuses = (where, status)
    with pytest.raises(HostError) as caught:
        push(bundle, TO)
    assert TOKEN not in f"{caught.value.message}{caught.value.hint}{caught.value.__cause__}"
    assert caught.value.hint
    hub.refuses = None
    push(bundle, TO)


def test_a_file_that_the_hub_lost_is_noticed(hub, bundle):
    hub.loses = ("tokenizer.json",)
    with pytest.raises(HostError, match=r"not what was uploaded: tokenizer\.json"):
        push(bundle, TO, QUIET)


def test_the_command(hub, bundle, capsys):
    assert cli.main(["push", str(bundle.path), "me/gemma-demo", "-q", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["url"] == f"{hub.url}/me/gemma-demo"
    assert cli.main(["--debug", "push", str(bundle.path), "me/other"]) == 0
    said = capsys.readouterr()
    assert "Gemma Terms of Use" in said.err
    assert TOKEN not in said.err + said.out


def convert_and_push(folder, *more):
    options = ["--push-to-hub", "me/gemma-demo", "-q", "-o", str(folder / "bundle")]
    return cli.main(["convert", str(demo.checkpoint()), *options, *more])


def test_convert_pushes_what_it_made(hub, tmp_path, capsys):
    assert convert_and_push(tmp_path, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["name"] == "bundle"
    assert f"{hub.url}/me/gemma-demo" in said.err
    assert set(open_bundle(tmp_path / "bundle").manifest.files) < set(hub.repos["me/gemma-demo"]["files"])


def test_convert_asks_first_whether_it_may(hub, tmp_path, capsys):
    hub.person["name"] = "somebody"
    assert convert_and_push(tmp_path) == 2
    assert "knows you as somebody" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_the_bundle_stays_when_the_upload_fails(hub, tmp_path, capsys):
    hub.refuses = ("/commit/", 500)
    assert convert_and_push(tmp_path) == 5
    assert "rkedge push" in capsys.readouterr().err
    open_bundle(tmp_path / "bundle").verify()


def test_public_without_an_upload(tmp_path, capsys):
    assert cli.main(["convert", str(demo.checkpoint()), "--public", "-o", str(tmp_path / "bundle")]) == 2
    assert "Add --push-to-hub" in capsys.readouterr().err


def test_a_matrix_gives_each_bundle_a_repository(hub, tmp_path, capsys):
    grid = [{"dtype": [dtype], "push_to_hub": [f"me/{dtype}"]} for dtype in ("w8a8", "fp32")]
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump({"checkpoint": str(demo.checkpoint()), "output": ".", "matrix": grid}))
    assert cli.main(["convert", "--matrix", str(path), "-q"]) == 0
    assert set(hub.repos) == {"me/w8a8", "me/fp32"}
    path.write_text(path.read_text().replace("me/fp32", "me/w8a8"))
    assert cli.main(["convert", "--matrix", str(path), "-q"]) == 2
    assert "several conversions of the matrix would push to the same repository" in capsys.readouterr().err


@pytest.fixture
def matrix(hub, tmp_path):
    """A matrix of two bundles with a repository each; the exit code of a run and the outcomes."""
    grid = [{"dtype": [dtype], "push_to_hub": [f"me/{dtype}"]} for dtype in ("w8a8", "fp32")]
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump({"checkpoint": str(demo.checkpoint()), "output": ".", "matrix": grid}))

    def run(capsys):
        code = cli.main(["convert", "--matrix", str(path), "--json"])
        return code, [(item["status"], item["message"]) for item in json.loads(capsys.readouterr().out)]

    return run


def test_a_matrix_uploads_what_an_earlier_run_could_not(hub, matrix, capsys):
    hub.refuses = ("/me/fp32/commit/", 403)
    code, outcomes = matrix(capsys)
    assert (code, [status for status, _ in outcomes]) == (5, ["made", "failed"])
    code, outcomes = matrix(capsys)
    assert (code, [status for status, _ in outcomes]) == (5, ["there", "failed"])
    hub.refuses = None
    assert matrix(capsys) == (0, [("there", ""), ("there", "")])
    assert "model.rkemu" in hub.repos["me/fp32"]["files"]
    commits = [path for _, path, _ in hub.calls if "/me/w8a8/commit/" in path]
    assert matrix(capsys)[0] == 0
    assert len(commits) == len([path for _, path, _ in hub.calls if "/me/w8a8/commit/" in path]) == 1


@pytest.mark.parametrize("name", ["model.rkemu", "rkedge.yaml", "more.txt"])
def test_a_matrix_does_not_take_other_files_for_its_upload(hub, matrix, capsys, name):
    assert matrix(capsys)[0] == 0
    files = hub.repos["me/w8a8"]["files"]
    files[name] = files.get(name, b"x")[::-1]
    code, [(status, message), _] = matrix(capsys)
    assert (code, status) == (3, "failed")
    assert "already contains files" in message
