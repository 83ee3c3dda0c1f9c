"""The demo model for the emulator, its libraries, engines over them, and a library that misbehaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rkboard.emulator import build as emulator
from rkconvert import demo
from rkruntime import cli
from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.bundle.rkemu import Container, Writer, read_container
from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import GREEDY, Token
from rkruntime.text.tokenizer import Tokenizer

# One release of each layout that the emulator has.
LAYOUT_RELEASES = ("1.1.4", "1.2.0", "1.2.1b1", "1.2.3", "1.3.0")


@pytest.fixture(params=LAYOUT_RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    """Each layout in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo model, converted for the emulator."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert cli.main(["convert", str(demo.checkpoint()), "--target", "emulator", "-o", str(folder)]) == 0
    return open_bundle(folder)


@pytest.fixture(scope="session")
def demo_tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.parse(bundle.tokenizer.read_bytes(), bundle.tokenizer)


def _copy(source: Container, path: Path, drop: str) -> Path:
    """The container without the tensors whose names begin with `drop`."""
    kept = [entry.spec for name, entry in source.tensors.items() if not name.startswith(drop)]
    with Writer(path, source.metadata, kept) as writer:
        for spec in kept:
            writer.write(spec.name, source.read(spec.name))
    return path


@pytest.fixture(scope="session")
def model_without(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo model without some of its tensors."""
    container = read_container(bundle.model)
    return lambda drop: _copy(container, tmp_path_factory.mktemp("without") / "model.rkemu", drop)


@pytest.fixture
def options(bundle: Bundle) -> Callable[..., LoadOptions]:
    """Options for the demo model over an emulated release."""

    def make(release: str = "1.2.3", /, **changes: Any) -> LoadOptions:
        values: dict[str, Any] = {
            "library": emulator.build(release),
            "model": bundle.model,
            "max_context": 512,
            "sampling": GREEDY,
            "load_timeout": 60.0,
            "token_timeout": 60.0,
        }
        return LoadOptions(**(values | changes))

    return make


@pytest.fixture
def load(options: Callable[..., LoadOptions]) -> Iterator[Callable[..., Engine]]:
    """Loads the demo model; what is still loaded at the end is closed."""
    engines: list[Engine] = []

    def make(release: str = "1.2.3", /, **changes: Any) -> Engine:
        engines.append(Engine.load(options(release, **changes)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def misbehaving(double: Callable[..., Path], tmp_path: Path) -> Callable[..., LoadOptions]:
    """Options for the double: `misbehaving("init-segv", release="1.2.3", tokens=10)`."""
    model = tmp_path / "model.rkllm"
    model.write_bytes(b"not read")

    def make(
        behaviour: str, release: str = "1.2.3", *, tokens: int = 10, at: int = 3, us: int = 0, **changes: Any
    ) -> LoadOptions:
        environment = {
            "RKDOUBLE": behaviour,
            "RKDOUBLE_TOKENS": str(tokens),
            "RKDOUBLE_AT": str(at),
            "RKDOUBLE_US": str(us),
        }
        values: dict[str, Any] = {"load_timeout": 20.0, "token_timeout": 20.0, "close_timeout": 5.0} | changes
        values["library"] = changes.get("library") or double(release)
        return LoadOptions(model=model, environment=environment, **values)

    return make


def children_of(pid: int) -> list[int]:
    """The processes that a process of one thread has started, and those that it has inherited."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.fixture
def worker_of() -> Callable[[Engine], int]:
    """The pid of the process that holds the library; `engine._connection.worker.process` is its keeper."""

    def pid(engine: Engine) -> int:
        (worker,) = children_of(engine._connection.worker.process.pid)
        return worker

    return pid


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a process, a thread or a descriptor behind."""
    import threading

    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before, threads = children(), threading.active_count()
    descriptors = set(os.listdir("/proc/self/fd"))
    yield
    assert children() <= before
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors)


@pytest.fixture(scope="session")
def ids_of() -> Callable[[Sequence[Any]], list[int]]:
    """The token ids among events."""
    return lambda events: [event.token_id for event in events if isinstance(event, Token)]


@pytest.fixture(scope="session")
def question(demo_tokenizer: Tokenizer) -> list[int]:
    """Ids of the question in `one_question`, as a prompt."""
    control = demo_tokenizer.control
    encode = demo_tokenizer.encode
    return [
        control["<bos>"],
        control["<start_of_turn>"],
        *encode("user\nWhat is the RK3588?"),
        control["<end_of_turn>"],
        *encode("\n"),
        control["<start_of_turn>"],
        *encode("model\n"),
    ]


@pytest.fixture(scope="session")
def stops(demo_tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end its answer."""
    return frozenset({demo_tokenizer.control["<eos>"], demo_tokenizer.control["<end_of_turn>"]})
