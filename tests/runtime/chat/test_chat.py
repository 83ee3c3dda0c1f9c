"""The chat loop: commands, stopping, what a program at a pipe sees, and what a terminal is kept from."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.forced import wait_until

from rkruntime.bundle.manifest import Bundle
from rkruntime.chat.localchat import LocalChat
from rkruntime.chat.repl import COMMANDS, Repl
from rkruntime.engine.engine import Engine
from rkruntime.engine.generation import FinishReason
from rkruntime.engine.loading import LoadOptions
from rkruntime.errors import BundleError, RunError, UsageError, WorkerCrashedError
from rkruntime.stop import Stop
from rkruntime.terminal import Terminal, printable
from rkruntime.text.conversation import Conversation
from rkruntime.text.tokenizer import Tokenizer


class Typed(Terminal):
    """A person whose lines are known beforehand."""

    def __init__(self, lines: Iterator[str | BaseException]) -> None:
        super().__init__()
        self.interactive = True
        self._lines = lines

    def _line(self, prompt: str) -> str | None:
        line = next(self._lines, None)
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def talk(
    fake_bundle: Bundle, fake_engine: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[LocalChat, Any, str]]:
    """Runs a chat of these lines with an engine of these answers: the chat, the engine, and all that was shown."""

    def run(lines: list[Any], *answers: Any, **options: Any) -> tuple[LocalChat, Any, str]:
        engine = fake_engine(*answers, max_context=options.pop("max_context", 512))
        chat = LocalChat(fake_bundle, lambda **_: engine, **options)
        Repl(chat, Typed(iter(lines))).run()
        shown = capsys.readouterr()
        return chat, engine, shown.out + shown.err

    return run


def test_two_questions(talk: Any) -> None:
    chat, engine, shown = talk(["hello", "", "again"], "hi there", "yes 🙂")
    assert "hi there" in shown
    assert "yes 🙂" in shown
    assert "tokens/s (emulated)" in shown
    first, second = (request.tokens for request in engine.requests)
    assert second[: len(first)] == first
    assert engine.requests[0].stop_tokens == {1, 107}
    assert len(chat._conversation.messages) == 4


def test_commands(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "my talk.json"
    lines = [
        "/help",
        "/system Be kind.",
        "hello",
        f'/save "{path}"',
        "/clear",
        f'/load "{path}"',
        "/stats",
        "/exit",
        "no",
    ]
    chat, engine, shown = talk(lines, "hi there")
    assert all(command.usage in shown for command in COMMANDS.values())
    assert "Be kind." in chat._prompts.vocabulary.decode(engine.requests[0].tokens)
    assert [item["content"] for item in json.loads(path.read_text())["messages"]] == ["hello", "hi there"]
    assert len(chat._conversation.messages) == 2
    assert "1 turn\n" in shown


def test_system_is_shown_and_removed(talk: Any) -> None:
    chat, _, shown = talk(["/system", "/system -"], system="Be kind.")
    assert "System prompt: Be kind.\nSystem prompt: (none)" in shown
    assert chat.system == ""


@pytest.mark.parametrize("line", ["/nonsense", "/save", "/save a b", "/load /no/such", '/save "', "/save /no/such/x"])
def test_a_wrong_command_is_said_to_be_wrong(talk: Any, line: str) -> None:
    _, _, shown = talk([line, "hello"], "hi there")
    assert "error: " in shown
    assert "hint:  " in shown
    assert "hi there" in shown


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", "/BYE", "exit", " Quit ", "bye"])
def test_ways_to_leave(talk: Any, word: str) -> None:
    _, engine, _ = talk(["hello", word, "again"], "hi", "no")
    assert len(engine.requests) == 1


def test_a_program_may_say_exit(
    monkeypatch: pytest.MonkeyPatch, fake_bundle: Bundle, fake_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "exit\n")
    Repl(LocalChat(fake_bundle, lambda **_: fake_engine("That is a command.", max_context=512)), Terminal()).run()
    assert capsys.readouterr().out == "That is a command.\n"


@pytest.mark.parametrize("word", ["/regenerate", "/retry"])
def test_the_last_answer_again(talk: Any, word: str) -> None:
    chat, engine, shown = talk(["one", "two", word, "/stats"], "first", "second", "another")
    assert "another" in shown
    assert engine.requests[2].tokens == engine.requests[1].tokens
    assert [message.content for message in chat._conversation.messages] == ["one", "first", "two", "another"]


def test_no_answer_to_give_again(talk: Any) -> None:
    _, engine, shown = talk(["/retry", "/regenerate"])
    assert shown.count("no answer to give again") == 2
    assert engine.requests == []


def test_settings_as_other_chats_have_them(talk: Any) -> None:
    chat, _, shown = talk(["/set system Be kind.", "/set temperature 1", "/set"])
    assert chat.system == "Be kind."
    assert "/set temperature is not possible in a chat" in shown
    assert "--temperature" in shown


def test_the_nearest_command_is_suggested(talk: Any) -> None:
    _, _, shown = talk(["/regenrate"])
    assert "Did you mean /regenerate?" in shown


def test_one_turn_is_singular(talk: Any) -> None:
    _, _, shown = talk(["hello", "/stats"], "hi")
    assert "1 turn\n" in shown


def test_several_lines(talk: Any) -> None:
    chat, _, _ = talk(['"""one', "two", 'three"""', "four\\", "five", '"""six"""'], "a", "b", "c")
    asked = [item.content for item in chat._conversation.messages if item.role == "user"]
    assert asked == ["one\ntwo\nthree", "four\nfive", "six"]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk: Any, tokenizer: Tokenizer) -> None:
    begun = tokenizer.encode("well begun")
    chat, _, shown = talk(["hello", "again"], [*begun, ctrl_c], "fine")
    assert "well begun" in shown
    assert "stopped" in shown
    assert "fine" in shown
    # What was said before the interrupt stays, by its ids.
    assert chat._conversation.messages[1].tokens == tuple(begun)


def test_ctrl_c_before_the_first_token_leaves_no_turn(talk: Any) -> None:
    chat, _, _ = talk(["hello"], [ctrl_c])
    assert chat._conversation.messages == []


def test_a_whole_answer_without_a_token_is_a_turn(talk: Any) -> None:
    """As in the daemon: the model has said that it says nothing."""
    chat, _, _ = talk(["hello", "again"], [107], "fine")
    assert [item.content for item in chat._conversation.messages] == ["hello", "", "again", "fine"]


def test_ctrl_c_at_the_prompt_explains_how_to_leave(talk: Any) -> None:
    _, _, shown = talk([KeyboardInterrupt(), "hello"], "hi there")
    assert "Ctrl-D or /exit leaves" in shown
    assert "hi there" in shown


def test_a_failed_run_leaves_the_conversation_as_it_was(talk: Any, tokenizer: Tokenizer) -> None:
    broken = RunError("The NPU did not answer.", hint="Look at dmesg.")
    chat, _, shown = talk(["hello", "again"], [*tokenizer.encode("well"), broken], "fine")
    assert "The NPU did not answer." in shown
    assert "Look at dmesg." in shown
    assert [item.content for item in chat._conversation.messages] == ["again", "fine"]


def test_a_crashed_worker_is_loaded_again(
    fake_bundle: Bundle, fake_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = [fake_engine([WorkerCrashedError("gone")]), fake_engine("fine")]
    chat = LocalChat(fake_bundle, lambda **_: engines.pop(0))
    Repl(chat, Typed(iter(["hello", "again"]))).run()
    assert "fine" in capsys.readouterr().out
    assert engines == []


def test_a_stop_while_the_prompt_is_made_is_not_forgotten(
    talk: Any, fake_bundle: Bundle, fake_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the prompt is made nevertheless, or is cut short."""
    real = Conversation.prompt
    chat = LocalChat(fake_bundle, lambda **_: fake_engine("not said", "not said", "fine"))

    def stopped(*arguments: Any, **options: Any) -> Any:
        chat.stop()
        return real(*arguments, **options)

    def cut_short(*arguments: Any, **options: Any) -> Any:
        chat.stop()
        raise BundleError("It took too long.")

    for prompt in (stopped, cut_short):
        monkeypatch.setattr(Conversation, "prompt", prompt)
        assert list(chat.ask("hello")) == []
        assert chat.last is not None
        assert chat.last.reason is FinishReason.ABORT
        assert chat._conversation.messages == []
    monkeypatch.setattr(Conversation, "prompt", real)
    assert "".join(map(str, chat.ask("hello"))) in ("fine", "not said")
    chat.close()


@pytest.fixture
def hanging(double: Callable[..., Path], tmp_path: Path, fake_bundle: Bundle) -> Iterator[Callable[..., LocalChat]]:
    """A chat with a library that does so at its first load, another thing at the next one, and so on."""
    model, chats = tmp_path / "model.rkllm", []
    model.write_bytes(b"not read")

    def make(*behaviours: str, **limits: float) -> LocalChat:
        left = list(behaviours)

        def load(*, stop: Stop | None = None) -> Engine:
            environment = {"RKDOUBLE": left.pop(0), "RKDOUBLE_TOKENS": "5", "RKDOUBLE_AT": "3"}
            given = LoadOptions(double("1.2.3"), model, environment=environment, stop=stop or Stop(), **limits)
            return Engine.load(given)

        chats.append(LocalChat(fake_bundle, load))
        return chats[-1]

    yield make
    for chat in chats:
        chat.close()


def pressing(chat: LocalChat, when: Callable[[], object], times: int = 1) -> threading.Thread:
    """A person who presses Ctrl-C as soon as `when` holds."""

    def press() -> None:
        while not when():
            time.sleep(0.01)
        for _ in range(times):
            time.sleep(0.2)
            if chat._stop is not None:
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_twice_leaves_a_run_that_hangs(
    hanging: Callable[..., LocalChat], capsys: pytest.CaptureFixture[str]
) -> None:
    """What was said before stays; the next question loads the model again."""
    chat = hanging("token-hang", "", abort_timeout=300)
    person = pressing(chat, lambda: chat._answering, times=2)
    Repl(chat, Typed(iter(["hello", "again"]))).run()
    person.join()
    shown = capsys.readouterr()
    assert "stopped" in shown.out
    assert "error" not in shown.err
    assert chat._generated == 3 + 5
    assert len(chat._conversation.messages) == 4


def test_ctrl_c_once_ends_a_run_that_hangs_in_a_while(
    hanging: Callable[..., LocalChat], capsys: pytest.CaptureFixture[str]
) -> None:
    chat = hanging("token-hang", "", abort_timeout=0.3)
    person = pressing(chat, lambda: chat._answering)
    Repl(chat, Typed(iter(["hello", "again"]))).run()
    person.join()
    assert "did not respond for 0.3 seconds and was killed" in capsys.readouterr().err
    assert len(chat._conversation.messages) == 2


def test_a_worker_that_dies_while_nothing_is_asked(
    hanging: Callable[..., LocalChat], caplog: pytest.LogCaptureFixture
) -> None:
    chat = hanging("", "")

    def lines() -> Iterator[str]:
        yield "hello"
        assert chat._engine is not None
        worker = chat._engine._connection.worker
        os.kill(worker.process.pid, signal.SIGKILL)
        wait_until(lambda: worker.exited)
        yield "again"

    Repl(chat, Typed(lines())).run()
    assert [item.content for item in chat._conversation.messages if item.role == "user"] == ["hello", "again"]
    assert "crashed (SIGKILL). The model is loaded again." in caplog.text


def test_ctrl_c_stops_a_reload(hanging: Callable[..., LocalChat], capsys: pytest.CaptureFixture[str]) -> None:
    chat = hanging("token-segv", "init-hang", "")
    person = pressing(chat, lambda: chat._engine and not chat._engine.alive)
    Repl(chat, Typed(iter(["hello", "again", "at last"]))).run()
    person.join()
    shown = capsys.readouterr()
    assert shown.err.count("error") == 1  # of the crash
    assert "[stopped]" in shown.out
    assert [item.content for item in chat._conversation.messages if item.role == "user"] == ["at last"]


def test_a_full_context(talk: Any) -> None:
    lines = ["a", "b", "c d e f g h i j k l m n o p"]
    _, _, shown = talk(lines, "word " * 10, "word " * 10, max_context=60)
    assert "longer than the model's context length of 60 tokens" in shown
    _, _, shown = talk(lines, "word " * 10, "word " * 10, "fine", max_context=60, drop_oldest=True)
    assert "dropped" in shown
    assert "fine" in shown


def test_escape_sequences_do_not_reach_a_terminal(talk: Any) -> None:
    _, _, shown = talk(["hello"], "bad \x1b]0;title\x07\x9b2J text\r")
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert "\r" not in shown
    assert printable("a\tb\n\x00\x7f🙂") == "a\tb\n🙂"


def ctrl_c() -> None:
    """As an engine's step: the person presses Ctrl-C, and the engine goes on until it is told to stop."""
    signal.raise_signal(signal.SIGINT)


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_at_a_pipe_only_answers_are_on_standard_output(
    fake_bundle: Bundle, fake_engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "hello\r\nagain")
    Repl(LocalChat(fake_bundle, lambda **_: fake_engine("hi \x1b there", "yes")), Terminal()).run()
    shown = capsys.readouterr()
    assert shown.out == "hi \x1b there\nyes\n"
    assert shown.err == ""


def test_at_a_pipe_a_cut_answer_is_said_to_be_cut(
    fake_bundle: Bundle, fake_engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(monkeypatch, "hello\nagain")
    chat = LocalChat(fake_bundle, lambda **_: fake_engine("one two three", "yes"), max_new_tokens=4)
    Repl(chat, Terminal()).run()
    shown = capsys.readouterr()
    assert shown.out.endswith("\nyes\n")
    assert shown.err == "The answer may not be whole: the limit of tokens was reached.\n"


def test_a_line_that_is_not_utf_8_ends_no_conversation(
    fake_bundle: Bundle, fake_engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one that was pasted, or typed on a terminal of another encoding."""
    lines: list[str | Exception] = ["hello", UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "no"), "again", EOFError()]

    def typed(_: str) -> str:
        line = lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    terminal, chat = Terminal(), LocalChat(fake_bundle, lambda **_: fake_engine("one", "two"))
    terminal.interactive = True
    Repl(chat, terminal).run()
    assert [message.content for message in chat._conversation.messages] == ["hello", "one", "again", "two"]
    assert "not UTF-8" in capsys.readouterr().err


def test_at_a_pipe_a_line_without_end_fills_no_memory(
    fake_bundle: Bundle, fake_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/zero", encoding="utf-8") as endless:  # noqa: PTH123 - as standard input is opened
        monkeypatch.setattr("sys.stdin", endless)
        with pytest.raises(UsageError, match="more than 16 MB"):
            Repl(LocalChat(fake_bundle, lambda **_: fake_engine()), Terminal()).run()


LINE = st.sampled_from(["", " ", '"""', '"""a', 'a"""', "\\", "a\\", *COMMANDS, "/save x", "/nonsense", " /exit"])


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(LINE | st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=9), max_size=6))
@example([*COMMANDS, "/save x", '"""', "a\\", "", "b"])
def test_at_a_pipe_each_line_is_a_message(
    fake_bundle: Bundle, fake_engine: Any, tmp_path: Path, lines: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path)
        piped(monkeypatch, "".join(f"{line}\n" for line in lines))
        engine = fake_engine(*("yes" for _ in lines), max_context=100_000)
        chat = LocalChat(fake_bundle, lambda **_: engine)
        Repl(chat, Terminal()).run()
        chat.close()
    assert [item.content for item in chat._conversation.messages if item.role == "user"] == lines
    assert not (tmp_path / "x").exists()


def test_at_a_pipe_an_error_ends_the_chat(
    fake_bundle: Bundle, fake_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, "hello\nagain\n")
    engine = fake_engine([RunError("it broke")], "not reached")
    with pytest.raises(RunError, match="it broke"):
        Repl(LocalChat(fake_bundle, lambda **_: engine), Terminal()).run()
    assert len(engine.requests) == 1


def test_at_a_pipe_ctrl_c_ends_the_chat(
    fake_bundle: Bundle,
    fake_engine: Any,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cut answer must not look whole, nor must the next question be asked. The command line makes 130 of it."""
    piped(monkeypatch, "hello\nagain\n")
    engine = fake_engine([*tokenizer.encode("well begun"), ctrl_c], "not reached")
    chat = LocalChat(fake_bundle, lambda **_: engine)
    with pytest.raises(KeyboardInterrupt):
        Repl(chat, Terminal()).run()
    assert capsys.readouterr().out == "well begun\n"
    assert len(engine.requests) == 1
    assert [item.content for item in chat._conversation.messages] == ["hello", "well begun"]


def test_at_a_pipe_ctrl_c_between_two_lines_ends_the_chat(fake_bundle: Bundle, fake_engine: Any) -> None:
    terminal = Typed(iter([KeyboardInterrupt(), "hello"]))
    terminal.interactive = False
    with pytest.raises(KeyboardInterrupt):
        Repl(LocalChat(fake_bundle, lambda **_: fake_engine()), terminal).run()
