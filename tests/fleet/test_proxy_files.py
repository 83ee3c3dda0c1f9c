"""The files for proxies: what the programs themselves say of them, and what is refused."""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.runtime.serve.sshd import free_port

from rkruntime import cli

from .test_proxy import NGINX, inventory, needs_nginx, nginx_command, running

PORTS = [8101, 8102, 8103]


@pytest.mark.parametrize("listen", ["127.0.0.1:8090", "[::1]:8090", "localhost:1"])
@needs_nginx
def test_nginx_takes_the_file(listen: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    path = inventory(tmp_path, bundles["base"], PORTS)
    conf = tmp_path / "rkedge.conf"
    assert cli.main(["fleet", "proxy", str(path), "--for", "nginx", "--listen", listen, "-o", str(conf)]) == 0
    done = subprocess.run([*nginx_command(tmp_path), "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr
    shown = subprocess.run([*nginx_command(tmp_path), "-T"], capture_output=True, text=True, check=True).stdout
    assert [f"127.0.0.1:{port} " in shown for port in PORTS] == [True] * 3
    assert NGINX


def test_the_file_for_litellm(bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = inventory(tmp_path, bundles["base"], PORTS)
    assert cli.main(["fleet", "proxy", str(path), "--for", "litellm"]) == 0
    made: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    assert [one["litellm_params"]["api_base"] for one in made["model_list"]] == [
        f"http://127.0.0.1:{port}/v1" for port in PORTS
    ]
    assert {one["model_name"] for one in made["model_list"]} == {"base"}
    # No key stands in the file, only where they are.
    keys = [one["litellm_params"]["api_key"] for one in made["model_list"]]
    assert keys == ["os.environ/KEY_1", "os.environ/KEY_2", "os.environ/KEY_3"]
    assert made["general_settings"]["master_key"] == "os.environ/LITELLM_MASTER_KEY"


@pytest.mark.parametrize("listen", ["8090", "127.0.0.1", "127.0.0.1:8090; }", "*:80", "unix:/x", "a:1\nb", ""])
def test_where_nginx_listens_is_an_address(listen: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    path = inventory(tmp_path, bundles["base"], PORTS)
    conf = tmp_path / "rkedge.conf"
    assert cli.main(["fleet", "proxy", str(path), "--for", "nginx", "--listen", listen, "-o", str(conf)]) == 2
    assert not conf.exists()


def test_boards_that_cannot_answer_for_each_other(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Different models, two that have one name, no address, no bundle."""

    def refused(board: dict[str, Any], program: str) -> str:
        path = inventory(tmp_path, bundles["base"], PORTS)
        text = json.loads(path.read_text())
        text["groups"]["all"]["boards"]["board-3"] = {"ssh": "x", "url": "http://h:1", **board}
        if not board.get("bundle", "there"):
            del text["bundle"]
        path.write_text(json.dumps(text))
        status = cli.main(["fleet", "proxy", str(path), "--for", program])
        said = capsys.readouterr()
        return f"{status} {said.err}" if status else ""

    pirate = {"bundle": str(bundles["pirate"])}
    assert "2 error: The boards have different models" in refused(pirate, "nginx")
    assert refused(pirate, "litellm") == ""
    twin = tmp_path / "twin"
    subprocess.run(["cp", "-r", bundles["pirate"], twin], check=True)
    manifest = (twin / "rkedge.yaml").read_text().replace("name: pirate", "name: base")
    (twin / "rkedge.yaml").write_text(manifest)
    for program in ("nginx", "litellm"):
        assert "Two different bundles are called base" in refused({"bundle": str(twin)}, program)
        assert "where a proxy reaches" in refused({"url": None}, program)
        assert "names no bundle" in refused({"bundle": None}, program)
        assert "bundle is empty" in refused({"bundle": ""}, program)


@needs_nginx
def test_a_daemon_sees_the_name_that_the_client_used(bundles: dict[str, Path], tmp_path: Path) -> None:
    """One without keys answers to localhost only; a proxy that calls it so would open it to any web page."""
    ports = [free_port(), free_port()]
    daemon = HTTPServer(("127.0.0.1", ports[1]), _Names)
    threading.Thread(target=daemon.serve_forever, daemon=True).start()
    conf, url = tmp_path / "rkedge.conf", f"http://127.0.0.1:{ports[0]}"
    path = inventory(tmp_path, bundles["base"], ports[1:])
    listen = f"127.0.0.1:{ports[0]}"
    assert cli.main(["fleet", "proxy", str(path), "--for", "nginx", "--listen", listen, "-o", str(conf)]) == 0
    with running(nginx_command(tmp_path), tmp_path / "log", f"{url}/health"):
        for place in ("/v1/models", "/api/tags", "/health"):
            request = urllib.request.Request(url + place, headers={"Host": "rebound.example"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.read() == b"rebound.example"
    daemon.shutdown()
    daemon.server_close()


class _Names(BaseHTTPRequestHandler):
    """Answers with the name that it is called."""

    def do_GET(self) -> None:
        name = self.headers["Host"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(name)))
        self.end_headers()
        self.wfile.write(name)

    def log_message(self, *_: object) -> None:
        pass
