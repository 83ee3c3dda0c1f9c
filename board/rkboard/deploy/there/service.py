"""The program, library and bundle in use, and the daemon that uses them.

A generation is a folder with a link to each of the three. `current` names one of them, so that one rename changes all
three. A new generation has to prove that it works; if it does not, the previous one comes back.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rkboard.deploy.there.ground import Ground, Refused, from_json, link, make_folder, sync, write
from rkboard.deploy.there.store import KINDS, Store

UNITS = ("rkedge.socket", "rkedge.service")
SOCKET = "/run/rkedge/rkedge.sock"
_MOST_ANSWER = 1 << 17
_MOST_SAID = 2000
_LOOK_S = 0.5
# The daemon's HTTP status for what is done, and for a request that has waited for its turn in vain.
_DONE, _BUSY = 200, 429
# Limit for the self-test's unit, so that a test for which nobody waits any more does not keep the NPU.
_END = "--property=RuntimeMaxSec={:.0f}"
# Added to a request's patience to bound the whole answer; the patience itself bounds the wait for each piece.
_LATE_S = 5.0
# Limit for a load: a model of 10 GB on an SD card takes about ten minutes to check and load.
_LOAD_S = 1500.0
# Limit for the daemon to begin a reload that was asked for.
_BEGIN_S = 20.0
# Settings of the daemon's unit that the self-test does not take over: how the daemon is started, watched and stopped.
_OF_A_DAEMON = re.compile(r"(?:Type|NotifyAccess|Exec|Restart|Watchdog|Timeout|Kill|Runtime|OOM)")
# Links that make /opt/rkedge a virtual environment, whichever generation is in use.
FIXED = {
    "bin": "current/programs/bin",
    "lib": "current/programs/lib",
    "pyvenv.cfg": "current/programs/pyvenv.cfg",
    "bundle": "current/bundles",
    "library": "current/libraries",
}
Say = Callable[[str], None]


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, patience: float) -> None:
        super().__init__("localhost", timeout=patience)
        self._path = path

    def shut(self) -> None:
        """Close the connection under whoever waits for an answer; may be called from any thread."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except (OSError, AttributeError):  # it has ended, or was never made
            pass

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        # A socket's address has at most 107 bytes, but the path of its folder may be longer.
        folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self.sock.connect(f"/proc/self/fd/{folder}/{self._path.name}")
        finally:
            os.close(folder)


class Service:
    """The daemon of this board."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._generations = ground.home / "generations"
        self.current_link = ground.home / "current"
        self.previous_link = ground.home / "previous"

    # Generations

    def made_of(self, generation: str | None) -> dict[str, str] | None:
        """Return the names of the parts of a generation, by kind, without the kinds that it lacks."""
        if generation is None or not re.fullmatch(r"\d{1,9}", generation):
            return None
        folder = self._generations / generation
        if not folder.is_dir():
            return None
        return {kind: Path(os.readlink(folder / kind)).name for kind in KINDS if (folder / kind).is_symlink()}

    def named(self, which: Path) -> str | None:
        """Return the generation that the link `current` or `previous` names."""
        return Path(os.readlink(which)).name if which.is_symlink() else None

    def generation(self, parts: Mapping[str, str]) -> str:
        """Return the generation with these parts; make it if there is none."""
        make_folder(self._generations)
        known = sorted((name for name in os.listdir(self._generations) if name.isdigit()), key=int)
        for name in reversed(known):
            if self.made_of(name) == dict(parts):
                return name
        name = str(int(known[-1]) + 1 if known else 1)
        building = self._generations / f".{name}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for kind, part in parts.items():
            if Store(self._ground).record(kind, part) is None:
                raise Refused(f"{part} is not on this board.", "rkedge status names the bundles that are.")
            (building / kind).symlink_to(f"../../{kind}/{part}")
        if "libraries" in parts:
            library = self._ground.home / "library/librkllmrt.so"
            write(building / "environment", f"RKEDGE_LIBRARY={library}\n".encode(), 0o644)
        sync(building)
        building.rename(self._generations / name)
        sync(self._generations)
        return name

    def forget(self, kind: str, name: str) -> None:
        """Remove the generations that have a part. Raises Refused if one of them is in use."""
        for generation in os.listdir(self._generations) if self._generations.is_dir() else []:
            if (self.made_of(generation) or {}).get(kind) != name:
                continue
            if generation == self.named(self.current_link):
                raise Refused(f"{name} is in use.", "Deploy another bundle first, or undeploy everything.")
            if generation == self.named(self.previous_link):
                self.previous_link.unlink()
            shutil.rmtree(self._generations / generation)

    # The daemon

    def ask(self, path: str, body: Any = None, patience: float = 10) -> tuple[int, Mapping[str, str], Any] | None:
        """Send a request to the daemon; return status, headers and answer, or None if it does not answer."""
        connection = _Connection(self._ground.at(SOCKET), patience)
        late = threading.Timer(patience + _LATE_S, connection.shut)  # for an answer that comes drop by drop
        late.daemon = True
        late.start()
        try:
            sent = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read(_MOST_ANSWER)
            return response.status, dict(response.getheaders()), from_json(text)
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            late.cancel()
            connection.close()

    def status(self) -> dict[str, Any] | None:
        """Return the daemon's own status; None if it does not answer."""
        if not self.is_active():  # systemd holds the socket, and nobody would answer
            return None
        answer = self.ask("/status")
        return answer[2] if answer and answer[0] == 200 and isinstance(answer[2], dict) else None

    def is_active(self) -> bool:
        """Whether the daemon's unit is active."""
        return self.property("ActiveState") in ("active", "reloading")

    def property(self, name: str) -> str:
        """Return the value of a property of the daemon's unit; empty if systemd does not tell."""
        try:
            return self._ground.run("systemctl", "show", "--value", f"--property={name}", UNITS[1]) or ""
        except Refused:
            return ""

    def serves(self, generation: str | None) -> bool:
        """Whether the daemon answers with the bundle of a generation."""
        parts, status = self.made_of(generation), self.status()
        if parts is None or status is None:
            return False
        loaded = status.get("state") == "ready" and status.get("bundle") == self.fingerprint(parts)
        return loaded or status.get("state") == "unloaded"  # idle: the next request loads what `current` names

    def fingerprint(self, parts: Mapping[str, str]) -> str | None:
        """Return the fingerprint by which the daemon names the bundle among these parts."""
        record = Store(self._ground).record("bundles", parts.get("bundles", "_"))
        return record["info"].get("fingerprint") if record else None

    def settle(self, say: Say) -> None:
        """Complete a switch that an earlier run began and did not finish."""
        pending = self._ground.state["pending"]
        if not pending:
            return
        say("completing what an earlier run began")
        try:
            self.switch(pending["to"], say, since=pending["from"], certain=True)
        except Refused as failed:  # the request that follows may be what repairs it
            say(failed.message)
            self._ground.note(pending=None)

    def switch(self, to: str, say: Say, since: str | None = None, certain: bool = False) -> None:
        """Use a generation; if it does not work, return to the previous one.

        Args:
            since: The generation to return to, if that is not the current one.
            certain: Restart the daemon even if a reload would do: what it was started with is not known.

        Raises:
            Refused: It does not work; the previous one answers again, if there was one.
        """
        before = since or self.named(self.current_link)
        self._ground.note(pending={"to": to, "from": before})
        try:
            self._use(to, before, say, certain)
        except Refused as failed:
            if before is None or before == to:
                self._ground.note(pending=None)
                raise
            say(f"{failed.message} Going back.")
            self._use(before, None, say, True)
            self._ground.note(pending=None)
            raise Refused(f"{failed.message} The board answers with what it had before.", failed.hint) from None
        if before not in (None, to):
            link(self.previous_link, f"generations/{before}")
        self._ground.note(pending=None)

    def _use(self, to: str, before: str | None, say: Say, certain: bool) -> None:
        parts = self.made_of(to)
        if parts is None:
            raise Refused(f"There is no generation {to}.")
        link(self.current_link, f"generations/{to}")
        for name, target in FIXED.items():
            if not (self._ground.home / name).is_symlink():
                link(self._ground.home / name, target)
        old = self.made_of(before)
        same = old is not None and {**old, "bundles": ""} == {**parts, "bundles": ""}
        # Reload only a daemon that has a model: otherwise its status shows no more of a reload than of a restart.
        reload = same and not certain and (self.status() or {}).get("state") == "ready"
        if self._ground.run("systemctl", "enable", *UNITS) is None:
            return  # a tree without a system
        self._ground.run("systemctl", "start", UNITS[0])
        say("the daemon loads the other bundle" if reload else "the daemon starts")
        reloads = (self.status() or {}).get("reloads") if reload else None
        # While an answer is in progress, a reload waits for its end.
        self._ground.run("systemctl", "reload" if reload else "restart", UNITS[1], limit=_LOAD_S)
        self._wait(self.fingerprint(parts), reload, reloads)

    def _wait(self, wanted: str | None, reload: bool, reloads: Any) -> None:
        """Wait until the bundle is loaded. Raises Refused if that fails.

        Args:
            wanted: The bundle's fingerprint.
            reloads: How many reloads the daemon had finished before; None where it does not say.
        """
        began = idle = time.monotonic()
        while time.monotonic() - began < _LOAD_S:
            status = self.status() or {}
            state = status.get("state")
            if wanted is not None and status.get("bundle") == wanted and state == "ready":
                return
            if state == "unloaded" and not reload:  # it loads with the first request
                self.ask("/api/generate", {"model": "rkedge", "stream": False}, _LOAD_S)
            if state == "failed":
                raise Refused(f"The daemon could not load it: {status.get('error')}", "See: rkedge logs USER@BOARD")
            if self.property("ActiveState") == "failed":
                raise Refused("The daemon does not start.", "See: rkedge logs USER@BOARD")
            if reloads is not None and status.get("reloads", reloads) != reloads:
                why = status.get("reload_error") or "it serves something else"
                raise Refused(f"The daemon refused it: {why}", "See: rkedge logs USER@BOARD")
            if state != "ready" or self.property("ActiveState") == "reloading":
                idle = time.monotonic()
            if time.monotonic() - idle > _BEGIN_S:
                raise Refused("The daemon refused it, and kept the old one.", "See: rkedge logs USER@BOARD")
            time.sleep(_LOOK_S)
        raise Refused(f"The bundle was not loaded within {_LOAD_S / 60:.0f} minutes.", "See: rkedge logs USER@BOARD")

    def selftest(self) -> Any:
        """Run the bundle's self-test in the daemon's place: the NPU may not have memory for two models."""
        self._unload()
        home, given = str(self._ground.home), []
        if (self.current_link / "environment").exists():
            given = [f"--setenv={(self.current_link / 'environment').read_text().strip()}"]
        rights = [f"--property={item}" for item in self._rights()]
        command = [f"{home}/bin/rkedge", "run", f"{home}/bundle", "--selftest", "--json"]
        options = ("--quiet", "--wait", "--pipe", "--collect")
        words = (*options, _END.format(_LOAD_S), *rights, *given, *command)
        try:
            said = self._ground.run("systemd-run", *words, limit=_LOAD_S, fine=(0, 3, 7, 9))
        finally:
            self.ask("/api/generate", {"model": "rkedge", "stream": False}, _LOAD_S)
        try:
            return from_json((said or "null").encode())
        except ValueError:
            raise Refused(f"The self-test said something else: {(said or '')[-_MOST_SAID:]}") from None

    def _unload(self) -> None:
        """Have the daemon, if it answers, unload its model after the answers before. Raises Refused if it does not."""
        end = time.monotonic() + _LOAD_S
        while answer := self.ask("/api/generate", {"model": "rkedge", "keep_alive": 0, "stream": False}, _LOAD_S):
            if answer[0] == _DONE:
                return
            if answer[0] != _BUSY or time.monotonic() > end:
                said = answer[2].get("error") if isinstance(answer[2], dict) else None
                raise Refused(f"The daemon does not unload its model for the self-test: {said}", "Try again later.")
            time.sleep(_LOOK_S)

    def _rights(self) -> list[str]:
        """Return the user, groups and limits of the daemon's unit, since the self-test runs the same library."""
        section, found = "", []
        for line in (self._ground.at("/etc/systemd/system") / UNITS[1]).read_text().splitlines():
            section = line if line.startswith("[") else section
            if section == "[Service]" and re.match(r"[A-Z]\w+=", line) and not _OF_A_DAEMON.match(line):
                found.append(line.strip())
        return found

    def stop(self) -> None:
        """Stop the daemon and disable it."""
        names = [name for name in UNITS if (self._ground.at("/etc/systemd/system") / name).exists()]
        if names:
            self._ground.run("systemctl", "disable", "--now", *names)
        if self.is_active():  # its unit file is gone
            self._ground.run("systemctl", "stop", *UNITS, fine=(0, 5))
