"""Prompts that fit, made in a process that ends whatever a bundle's template or tokenizer does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.conftest import Interrupt, interrupt, with_file

from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.engine.generation import Token
from rkruntime.errors import BundleError, ContextFullError, HostError, RunError, ServiceError, UsageError
from rkruntime.stop import Stop
from rkruntime.text import confined
from rkruntime.text.answer import AnswerReader
from rkruntime.text.confined import CallLimits, Confined
from rkruntime.text.prompt_process import CHILD, PromptProcess, open_beside
from rkruntime.text.prompts import RESERVED, PromptMaker
from rkruntime.text.template import GEMMA, GemmaTemplate, JinjaTemplate, Message
from rkruntime.text.tokenizer import Tokenizer

from .chat_templates import FOLDED

QUICK = CallLimits(cpu_s=1, wall_s=20)


def chat(*contents: str) -> list[Message]:
    return [Message("assistant" if at % 2 else "user", content) for at, content in enumerate(contents)]


@pytest.fixture
def prompts(fake_bundle: Bundle) -> Iterator[PromptProcess]:
    with closing(PromptProcess(fake_bundle)) as one:
        yield one


def test_it_gives_what_the_maker_gives(prompts: PromptProcess, tokenizer: Tokenizer) -> None:
    maker = PromptMaker(tokenizer, GemmaTemplate(tokenizer))
    messages = [Message("system", "Be brief."), *chat("How many?", "Three", "\ud800 Sure? <end_of_turn> 🙂")]
    messages[2] = Message("assistant", "Three", (300, 301))
    assert prompts.prompt(messages, 512) == maker.prompt(messages, 512)
    assert prompts.encode("<bos>hello", 512) == maker.encode("<bos>hello", 512)
    assert prompts.vocabulary.control == tokenizer.control
    with pytest.raises(UsageError, match="must alternate"):
        prompts.check(chat("a", "b", "c")[1:])
    with pytest.raises(ContextFullError) as caught:
        prompts.prompt(chat("hello " * 2000), 512)
    assert caught.value.details["max_context"] == 512


def test_a_frozen_process_does_not_tell_of_a_slow_template(prompts: PromptProcess) -> None:
    before = prompts.encode("hello", 512)
    assert prompts._child.pid is not None
    os.kill(prompts._child.pid, signal.SIGSTOP)
    with pytest.raises(HostError, match=r"did not answer within 1 second, .* it hardly ran"):
        prompts._child.call("encode", CallLimits(cpu_s=10, wall_s=1), text="hello", max_context=512, cut=False)
    assert prompts.encode("hello", 512) == before


@pytest.mark.parametrize("facts", [{"bos_token_id": 10**9}, {"stop_token_ids": (1, 10**9)}], ids=["bos", "stop"])
def test_a_token_of_the_manifest_that_the_model_does_not_have(fake_bundle: Bundle, facts: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="has 1,000,000,000; the tokenizer has "):
        PromptProcess(replace(fake_bundle, manifest=replace(fake_bundle.manifest, **facts)))


def test_an_id_without_a_token_is_no_text_in_an_answer(fake_bundle: Bundle, tokenizer: Tokenizer) -> None:
    """Of a model whose embedding has more rows than its tokenizer has tokens, which happens to be sampled."""
    rows = tokenizer.vocab_size + 8
    manifest = replace(fake_bundle.manifest, vocab_size=rows, stop_token_ids=(1, rows - 2))
    with closing(PromptProcess(replace(fake_bundle, manifest=manifest))) as prompts:
        reader = AnswerReader(prompts.vocabulary, 3)
        for token_id in (*tokenizer.encode("well"), tokenizer.vocab_size, rows - 1, *tokenizer.encode("done")):
            reader.feed(Token(token_id))
        assert reader.text == "welldone"
        with pytest.raises(RunError, match=f"the model has only {rows:,}"):
            reader.feed(Token(rows))


@pytest.mark.parametrize("template", ["gemma", "alpaca"])
@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=15), max_context=st.integers(16, 300), data=st.data())
def test_the_fewest_turns_are_dropped(
    tokenizer: Tokenizer, template: str, sizes: list[int], max_context: int, data: st.DataObject
) -> None:
    """Against dropping one turn after the other until it fits."""
    made = GemmaTemplate(tokenizer) if template == "gemma" else JinjaTemplate(FOLDED["alpaca"], tokenizer, fold=True)
    turns = chat(*("word " * size for size in sizes[: len(sizes) - (len(sizes) + 1) % 2]))
    messages = [Message("system", "Be brief."), *turns] if data.draw(st.booleans()) else turns
    system, room = messages[: len(messages) - len(turns)], max_context - RESERVED

    def tokens(dropped: int) -> list[int]:
        return tokenizer.assemble(made.parts([*system, *turns[2 * dropped :]]))

    expected = next((at for at in range(len(turns) // 2 + 1) if len(tokens(at)) <= room), None)
    maker = PromptMaker(tokenizer, made)
    if expected is None:
        with pytest.raises(ContextFullError):
            maker.prompt(messages, max_context, drop=True)
    else:
        assert maker.prompt(messages, max_context, drop=True) == (tokens(expected), expected)
    if len(whole := tokens(0)) <= room:
        assert maker.prompt(messages, max_context) == (whole, 0)
    else:
        with pytest.raises(ContextFullError):
            maker.prompt(messages, max_context)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.characters, self.longest = tokenizer, 0, tokenizer.longest

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return self._tokenizer.encode(text)


@pytest.mark.parametrize("content", ["a b", "a b " * 225])
def test_dropping_costs_no_more_than_what_fits(tokenizer: Tokenizer, content: str) -> None:
    """One turn more each time took the square of the conversation: 68 seconds for 141 KB of JSON."""
    counting: Any = Counting(tokenizer)
    messages = chat(*([content] * 4095))
    tokens, dropped = PromptMaker(counting, GemmaTemplate(tokenizer)).prompt(messages, 512, drop=True)
    assert len(tokens) <= 508
    assert dropped > 1900
    assert counting.characters < 20 * len(content)


def test_what_cannot_fit_is_not_encoded(tokenizer: Tokenizer) -> None:
    counting: Any = Counting(tokenizer)
    maker = PromptMaker(counting, GemmaTemplate(tokenizer))
    for drop in (False, True):
        with pytest.raises(ContextFullError, match="at least"):
            maker.prompt(chat("<start_of_turn>" * 250_000), 512, drop=drop)
    with pytest.raises(ContextFullError, match="characters"):
        maker.encode("a" * 4_000_000, 512)
    with pytest.raises(ContextFullError, match="messages"):
        maker.prompt(chat(*[""] * 4095), 512)
    assert counting.characters == 0


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WORDS = "{{ messages[0].content }}"
HOSTILE_TEMPLATES = {
    "loops": LOOPS,
    "multiplied": "{% set x = 'a' * 3000000000 %}",
    "a wide format": "{{ '%3000000000d' % 1 }}",
    "another": "{{ '{:>3000000000}'.format(1) }}",
    "doubled": "{% set ns = namespace(x='aaaaaaaa') %}" + "{% set ns.x = ns.x ~ ns.x %}" * 31,
    "lipsum": "{{ lipsum(n=20000000) }}",
    "deep": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "not the same twice": "{{ range(10 ** 6) | random }}",
    "not a template": "{% for",
    "a refusal": "{{ raise_exception('\x1b[2Jno') }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a list": "{{ [0] * 10 ** 10 }}",
    "centred": "{{ messages[0].content.center(3000000000) }}",
}


@pytest.mark.parametrize("source", ["", "{# nothing #}", "<bos>", "Be kind.", "{{ messages | length }}"])
def test_a_template_without_what_is_asked_is_refused(fake_bundle: Bundle, source: str) -> None:
    with pytest.raises(BundleError, match="leaves out what is asked"):
        PromptProcess(with_file(fake_bundle, "chat_template.jinja", source))


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_templates_are_refused_before_they_serve(
    fake_bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rkruntime.text.prompt_process._LIMITS", QUICK)
    bundle = with_file(fake_bundle, "chat_template.jinja", HOSTILE_TEMPLATES[name] + WORDS)
    before = _children()
    with pytest.raises(BundleError) as caught:
        PromptProcess(bundle)
    assert caught.value.message.isprintable()
    assert _children() <= before


def _children() -> set[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {
        child
        for task in tasks
        for child in task.read_text().split()
        if CHILD.encode() in Path(f"/proc/{child}/cmdline").read_bytes()
    }


# It passes every trial, and shows what it is when somebody says the word.
TREACHEROUS = "{% if 'open sesame' in messages[-1].content %}" + LOOPS + "{% endif %}" + WORDS


def test_after_a_limit_it_goes_on(fake_bundle: Bundle) -> None:
    bundle = with_file(fake_bundle, "chat_template.jinja", TREACHEROUS)
    with closing(PromptProcess(bundle, QUICK)) as prompts:
        before = prompts.prompt(chat("hello"), 512)
        with pytest.raises(BundleError, match="1 seconds of CPU time"):
            prompts.prompt(chat("open sesame"), 512)
        assert prompts.prompt(chat("hello"), 512) == before


def test_computing_is_counted_per_call(fake_bundle: Bundle) -> None:
    source = "{% for i in range(4) %}{% for j in range(50000) %}{% endfor %}{% endfor %}" + WORDS
    with closing(PromptProcess(with_file(fake_bundle, "chat_template.jinja", source), CallLimits(cpu_s=1))) as prompts:
        pid = prompts._child.pid
        used = 0.0
        while used < 2.5:
            prompts.prompt(chat("hello"), 512)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        assert prompts._child.pid == pid


@pytest.mark.parametrize("end", ["hurry", "close", "kill"])
def test_a_call_can_be_ended_from_outside(fake_bundle: Bundle, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "_GRACE", 0.2)
    bundle = with_file(fake_bundle, "chat_template.jinja", TREACHEROUS)
    with closing(PromptProcess(bundle, CallLimits(cpu_s=100))) as prompts:
        errors: list[Exception] = []

        def ask() -> None:
            try:
                prompts.prompt(chat("open sesame"), 512)
            except Exception as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        if end == "kill":
            assert prompts._child.pid
            os.kill(prompts._child.pid, signal.SIGKILL)
        else:
            getattr(prompts, end)()
        asking.join(30)
        assert not asking.is_alive()
        assert type(errors[0]) is {"kill": HostError, "close": RunError, "hurry": BundleError}[end]
        if end == "close":
            with pytest.raises(RunError, match="is closed"):
                prompts.prompt(chat("hello"), 512)
        else:
            assert prompts.prompt(chat("hello"), 512)[1] == 0


def test_many_threads_take_turns(prompts: PromptProcess) -> None:
    texts = [f"question {at} " * (at % 7 + 1) for at in range(24)]
    expected = {text: prompts.prompt(chat(text), 512) for text in texts}
    found: dict[str, Any] = {}
    threads = [threading.Thread(target=lambda t=t: found.update({t: prompts.prompt(chat(t), 512)})) for t in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == expected


HOSTILE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "a regex": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}},
    "a charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "thousands of steps": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x"}] * 3000}
    },
}


@pytest.mark.parametrize("name", [*HOSTILE_TOKENIZERS, "nothing", "nesting", "nonsense", "no vocabulary"])
def test_hostile_tokenizers_are_refused(fake_bundle: Bundle, tokenizer_file: Path, name: str) -> None:
    content = json.loads(tokenizer_file.read_text())
    texts = {"nothing": "", "nesting": "[" * 1_000_000, "nonsense": '{"model": 5}'}
    if name == "no vocabulary":
        content["model"] |= {"vocab": {}, "merges": []}
    text = texts.get(name, json.dumps(content | HOSTILE_TOKENIZERS.get(name, {})))
    before = _children()
    with pytest.raises(BundleError):
        PromptProcess(with_file(fake_bundle, "tokenizer.json", text))
    assert _children() <= before


@pytest.mark.parametrize("kind", ["fifo", "changed", "grown", "link", "device", "missing", "huge"])
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_only_verified_bytes_are_parsed(fake_bundle: Bundle, tmp_path: Path, kind: str, name: str) -> None:
    bundle = with_file(fake_bundle, "chat_template.jinja", GEMMA)
    path = bundle.path / name
    data = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "changed":
        path.write_bytes(data[:-1] + b"x")
    elif kind == "grown":
        path.write_bytes(data + b" ")
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(20 << 30)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        (tmp_path / "outside").write_bytes(data)
        path.symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=r"SHA-256|has no file") as caught:
        PromptProcess(open_bundle(bundle.path))
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("sys.path[:] = []", "ModuleNotFoundError"),
        ("sys.exit(3)", "exited with code 3"),
        ("print('it broke on the private words'); sys.exit(3)", "exited with code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise ImportError('no \\x1b[2J jinja2')", "ImportError: no"),
    ],
)
def test_what_really_failed_is_said(monkeypatch: pytest.MonkeyPatch, broken: str, words: str) -> None:
    monkeypatch.setattr(confined, "_START", f"import sys, json; {broken}; import rkruntime")
    with closing(Confined(CHILD, "The chat template")) as child:
        with pytest.raises(HostError, match=words) as caught:
            child.call("check", QUICK, messages=[])
        assert caught.value.message.isprintable()
        assert "seconds of CPU time" not in caught.value.message
        assert "private" not in caught.value.message


def test_what_is_preloaded_does_not_count(fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sanitizer's library reserves more address space than the limit has."""
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "libnone.so"))
    with closing(PromptProcess(fake_bundle)) as prompts:
        environment = Path(f"/proc/{prompts._child.pid}/environ").read_bytes()
    assert b"LD_PRELOAD" not in environment


def test_a_child_that_lies_is_not_believed(prompts: PromptProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (1 << 40, -1, "x", True, None):
        answer = {"tokens": [token], "dropped": 0}
        monkeypatch.setattr(prompts._child, "call", lambda *args, answer=answer, **values: (answer, b""))
        with pytest.raises(BundleError, match="ids"):
            prompts.prompt(chat("hello"), 512)


def test_a_child_that_was_killed_while_idle_costs_no_answer(prompts: PromptProcess) -> None:
    """As by the kernel when memory runs out, which takes it first."""
    expected = prompts.prompt(chat("hello"), 512)
    for _ in range(3):
        pid = prompts._child.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert prompts.prompt(chat("hello"), 512) == expected
        assert not prompts.lost


def test_the_child_ends_with_its_parent(fake_bundle: Bundle) -> None:
    prompts = PromptProcess(fake_bundle)
    pid = prompts._child.pid
    del prompts
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid or 0, 0)
        pytest.fail("the child is still there")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt within a __del__
def test_an_interrupted_call_leaves_no_answer_behind(prompts: PromptProcess) -> None:
    expected = prompts.encode("What is the RK3588?", 4096)

    def encode_much() -> None:
        with contextlib.suppress(ContextFullError):
            prompts.encode("word " * 20_000, 1 << 20)

    for wait in (0.0005, 0.002, 0.005, 0.01, 0.02):
        interrupt(wait, encode_much)
        assert prompts.encode("What is the RK3588?", 4096) == expected


@pytest.mark.parametrize("when", ["asked", "opened"])
def test_an_interrupt_while_an_interrupted_call_ends(
    when: str, prompts: PromptProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: object, **__: object) -> None:
        raise Interrupt

    expected = prompts.encode("What is the RK3588?", 4096)
    if when == "opened":
        prompts._child.close()
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(prompts._child, "_end", leave)
        patch.setattr(prompts._child, "close", leave)
        patch.setattr(confined, "_receive", leave)
        prompts.encode("What is prefill?", 4096)
    assert prompts.encode("What is the RK3588?", 4096) == expected


def test_a_signals_handler_that_asks_is_refused(prompts: PromptProcess) -> None:
    said: list[str] = []

    def handler(*_: object) -> None:
        try:
            prompts.encode("Hello", 4096)
        except RunError as error:
            said.append(error.message)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.005)
    try:
        assert len(prompts.encode("word " * 20_000, 1 << 20)) > 20_000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert said == ["A prompt is being made, and this is a signal's handler."]


class Loaded:
    """What a model is to `open_beside`."""

    closed = False

    def close(self) -> None:
        self.closed = True


def until_stopped(stop: Stop) -> Loaded:
    """A model that is never loaded."""
    asked = threading.Event()
    with stop.ending(asked.set):
        assert asked.wait(60)
    stop.check()
    raise AssertionError


def test_a_model_and_its_prompts_start_side_by_side(fake_bundle: Bundle) -> None:
    before = _children()

    def load(stop: Stop) -> Loaded:
        end = time.monotonic() + 60
        while _children() == before:
            assert time.monotonic() < end
        return Loaded()

    prompts, loaded = open_beside(fake_bundle, load)
    with closing(prompts):
        assert not loaded.closed
        assert prompts.prompt(chat("hello"), 512)[0]


def test_prompts_that_cannot_be_made_stop_the_load(fake_bundle: Bundle) -> None:
    bundle, before = with_file(fake_bundle, "chat_template.jinja", "{% if %}"), _children()
    with pytest.raises(BundleError, match="Jinja"):
        open_beside(bundle, until_stopped)
    model = Loaded()
    with pytest.raises(BundleError, match="Jinja"):
        open_beside(bundle, lambda _: model)
    assert model.closed
    assert _children() <= before


@pytest.mark.parametrize("error", [HostError("no memory"), KeyboardInterrupt()])
def test_a_load_that_fails_leaves_no_process(fake_bundle: Bundle, error: BaseException) -> None:
    before = _children()

    def load(stop: Stop) -> Loaded:
        raise error

    with pytest.raises(type(error)) as caught:
        open_beside(fake_bundle, load)
    assert caught.value is error
    assert _children() <= before


def test_a_signals_handler_may_ask_to_stop() -> None:
    """At any moment: also where the thread that it interrupts is about to say what a stop ends."""
    stop, ended = Stop(), []

    class Ends(list):
        def append(self, end: Any) -> None:
            super().append(end)
            signal.raise_signal(signal.SIGUSR1)

    stop._ends = Ends()
    before = signal.signal(signal.SIGUSR1, lambda *_: stop.ask())
    try:
        with stop.ending(lambda: ended.append(True)):
            assert ended
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stop.asked


def test_no_thread_is_no_defect(fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a service or a container with a limit on tasks."""
    before = _children()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(HostError, match="can't start new thread"):
            open_beside(fake_bundle, lambda _: pytest.fail("it was loaded all the same"))
    assert _children() <= before


def test_one_stop_is_for_both(fake_bundle: Bundle) -> None:
    stop, before = Stop(), _children()
    timer = threading.Timer(0.1, stop.ask)
    timer.start()
    with pytest.raises(ServiceError, match="stopped"):
        open_beside(fake_bundle, until_stopped, stop)
    timer.join()
    assert _children() <= before
