"""Other people's clients: openai's and ollama's own Python packages, and the curl line of the llamafile model card."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest

from rkconvert.demo import questions

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def client(daemon: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="no-key", max_retries=0) as one:
        yield one


@pytest.fixture
def olla(daemon: Any) -> Iterator[ollama.Client]:
    one = ollama.Client(host=daemon.url)
    yield one
    one._client.close()


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=user(FIRST), temperature=0, seed=7)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (QA[FIRST], "assistant", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == client.models.list().data[0].id


def test_chat_streams(client: openai.OpenAI) -> None:
    for question in ("Does it work?", FIRST):
        options: Any = {"stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(model="x", messages=user(question), stream=True, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == QA[question]
        assert chunks[-1].usage is not None
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


@pytest.mark.parametrize("us", ["0", "500", "5000"])
def test_each_token_is_an_event(start_daemon: Callable[..., Any], us: str) -> None:
    """At whatever pace they come, as long as the client reads them."""
    daemon = start_daemon(RKEMU_TOKEN_US=us)
    body = {"messages": [{"role": "user", "content": FIRST}], "stream": True}
    body["stream_options"] = {"include_usage": True}
    _, _, text = daemon.request("POST", "/v1/chat/completions", body)
    events = [
        json.loads(line.removeprefix("data: ")) for line in text.decode().splitlines() if line.startswith("data: {")
    ]
    texts = [choice["delta"]["content"] for event in events for choice in event["choices"] if choice["delta"]]
    assert "".join(texts) == QA[FIRST]
    # The first one has the role. All of this answer's tokens have a text.
    assert len(texts[1:]) == events[-1]["usage"]["completion_tokens"]


def test_system_and_developer_messages(client: openai.OpenAI) -> None:
    for role in ("system", "developer"):
        messages: Any = [{"role": role, "content": [{"type": "text", "text": "Be brief."}]}, *user(FIRST)]
        assert client.chat.completions.create(model="x", messages=messages, max_tokens=3).usage.completion_tokens == 3


HELLO: dict[str, Any] = {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ([*user("Does it"), *user("work?")], user("Does it\n\nwork?")),
        ([*user("Hi."), HELLO, {"role": "system", "content": "Be kind."}, *user(FIRST)],
         [*user("Hi."), HELLO, *user(f"Be kind.\n\n{FIRST}")]),
        ([HELLO, *user(FIRST)], [*user(""), HELLO, *user(FIRST)]),
    ],
    ids=["neighbours", "late system text", "greeting"],
)  # fmt: skip
def test_turns_that_do_not_alternate(client: openai.OpenAI, olla: ollama.Client, sent: Any, read: Any) -> None:
    answers = [client.chat.completions.create(model="x", messages=given) for given in (sent, read)]
    first, second = ((one.choices[0].message.content, one.usage) for one in answers)
    assert first[0] == second[0] == olla.chat(model="x", messages=sent).message.content
    assert first[1].prompt_tokens == second[1].prompt_tokens


def test_turns_that_must_alternate(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("strict_roles: true")
    refused = pytest.raises(openai.BadRequestError, match="must alternate")
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="x", max_retries=0) as client, refused:
        client.chat.completions.create(model="x", messages=[*user("Does it"), *user("work?")])


def test_tools_that_may_not_be_called(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    raw = client.chat.completions.with_raw_response.create(
        model="x", messages=user(FIRST), tools=tools, tool_choice="none"
    )
    assert raw.parse().choices[0].message.content == QA[FIRST]
    assert raw.headers["x-rkedge-ignored"] == "tools"


def test_tools_that_are_left_out(start_daemon: Callable[..., Any]) -> None:
    """As the settings may have it; a call that is demanded is still refused."""
    daemon = start_daemon("tools: ignore")
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="x", max_retries=0) as client:
        ask = client.chat.completions.with_raw_response.create
        for choice in ({}, {"tool_choice": "auto"}):
            raw = ask(model="x", messages=user(FIRST), tools=tools, **choice)
            assert raw.parse().choices[0].message.content == QA[FIRST]
            assert raw.headers["x-rkedge-ignored"] == "tools"
        for choice in ({"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}):
            with pytest.raises(openai.BadRequestError, match="cannot call tools"):
                ask(model="x", messages=user(FIRST), tools=tools, **choice)
    one = ollama.Client(daemon.url)
    assert one.chat("x", user(FIRST), tools=tools).message.content == QA[FIRST]
    one._client.close()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: this model cannot call tools. Leave"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "reads text only"),
        ({"messages": [*user("x"), {"role": "tool", "content": "x"}]}, "cannot call tools"),
        ({"response_format": {"type": "json_object"}}, "RKLLM cannot hold an answer to a format"),
        ({"n": 3}, "one answer at a time"),
    ],
    ids=["tools", "image", "tool", "format", "n"],
)  # fmt: skip
def test_a_person_understands_why(client: openai.OpenAI, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "x", "messages": user("hi"), **wrong})
    message = str(caught.value.body["message"])  # type: ignore[index]
    assert said in message
    assert not any(word in message for word in ("at most", "items", "null", "openapi", "schema"))


def test_more_tokens_than_there_can_be(client: openai.OpenAI, olla: ollama.Client) -> None:
    raw = client.chat.completions.with_raw_response.create(model="x", messages=user(FIRST), max_tokens=(1 << 31) - 1)
    assert raw.parse().choices[0].message.content == QA[FIRST]
    assert raw.headers["x-rkedge-ignored"] == "max_tokens"
    most = {"num_predict": (1 << 31) - 1}
    assert olla.chat(model="x", messages=user(FIRST), options=most).message.content == QA[FIRST]


def test_limits_and_stop_strings(client: openai.OpenAI) -> None:
    for options in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        choice = client.chat.completions.create(model="x", messages=user(FIRST), **options).choices[0]  # type: ignore[call-overload]
        assert choice.finish_reason == "length"
        assert QA[FIRST].startswith(choice.message.content)
    for stop in ("with eight", ["nothing", "with eight"]):
        choice = client.chat.completions.create(model="x", messages=user(FIRST), stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == (QA[FIRST].partition("with eight")[0], "stop")


def test_completions(start_daemon: Callable[..., Any]) -> None:
    """A plain text, continued; control tokens in it are text."""
    with openai.OpenAI(base_url=f"{start_daemon('temperature: 0').url}/v1", api_key="x", max_retries=0) as client:
        check_completions(client)


def check_completions(client: openai.OpenAI) -> None:
    done = client.completions.create(model="x", prompt="What is", max_tokens=4)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 4)
    assert done.choices[0].finish_reason == "length"
    parts = list(client.completions.create(model="x", prompt=["What is"], max_tokens=4, stream=True))
    assert "".join(part.choices[0].text for part in parts) == done.choices[0].text


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["What is the RK3588?", "What is the RK3588?", "Who made Gemma?"]
    data = client.embeddings.create(model="x", input=texts, encoding_format="float").data
    first, same, other = (item.embedding for item in data)
    assert len(first) == 128
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-5)
    assert first == pytest.approx(same, abs=1e-5)
    assert sum(x * y for x, y in zip(first, other, strict=True)) < 0.999
    # The package asks for base64 by itself if nothing is said.
    assert client.embeddings.create(model="x", input=texts[0]).data[0].embedding == pytest.approx(first, abs=1e-5)
    raw = client.embeddings.with_raw_response.create(model="x", input=texts[0], encoding_format="base64")
    assert raw.headers["x-rkedge-emulated"] == "1"
    packed = base64.b64decode(json.loads(raw.text)["data"][0]["embedding"])
    assert struct.unpack("<128f", packed) == pytest.approx(first, abs=1e-5)


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert client.models.retrieve(card.id).id == card.id
    assert client.models.retrieve(f"{card.id}:latest").id == card.id
    with pytest.raises(openai.NotFoundError, match="this daemon has"):
        client.models.retrieve("gpt-4")


def said_by(ask: Callable[[], object]) -> str:
    """What a person reads whose program prints the error."""
    with pytest.raises((openai.APIStatusError, ollama.ResponseError)) as caught:
        ask()
    return str(caught.value)


def test_what_there_is_not(client: openai.OpenAI, olla: ollama.Client) -> None:
    for ask, said in (
        (lambda: client.responses.create(model="x", input="hi"), "Let the client use chat completions"),
        (lambda: client.moderations.create(input="hi"), "reads and writes text only"),
        (lambda: client.images.generate(prompt="hi"), "reads and writes text only"),
        (lambda: olla.pull("gemma2"), "This daemon serves one model"),
        (lambda: olla.create("mine", from_="x"), "This daemon serves one model"),
        (lambda: olla.delete("x"), "This daemon serves one model"),
    ):
        assert said in said_by(ask)


def test_an_assistant_for_the_home(daemon: Any) -> None:
    """As Home Assistant's integration asks, without devices to control."""

    async def ask() -> str:
        client = ollama.AsyncClient(host=daemon.url)
        options = {"num_ctx": 8192}
        parts = await client.chat(
            model="any", messages=user(FIRST), stream=True, keep_alive="-1s", options=options, think=False
        )
        text = "".join([part.message.content or "" async for part in parts])
        await client._client.aclose()
        return text

    assert asyncio.run(ask()) == QA[FIRST]


PAGE = (Path(__file__).parents[3] / "docs" / "clients.md").read_text()
HI = user("hi")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": user("word " * 6000)}),
        ("/v1/chat/completions", {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("/v1/chat/completions", {"messages": HI, "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"messages": HI, "n": 2}),
        ("/v1/responses", {"input": "hi"}),
        ("/api/pull", {"model": "gemma2"}),
        ("/chat/completions", {"messages": HI}),
        ("/v1/embeddings", {"input": ""}),
        ("/v1/embeddings", {"input": [[1, 2]]}),
        ("/v1/chat/completions", {"messages": HI, "temperature": 99}),
    ],
    ids=range(11),
)
def test_the_page_has_the_sentence(daemon: Any, path: str, body: dict[str, Any]) -> None:
    status, _, answer = daemon.request("POST", path, body)
    error = answer["error"]
    said = error if isinstance(error, str) else error["message"]
    assert 400 <= status < 500
    assert f"| {said} |" in PAGE


def test_an_address_that_is_nearly_right(daemon: Any) -> None:
    messages = user("hi")
    for address, said in (
        (daemon.url, "ends with /v1."),
        (f"{daemon.url}/api/v1", "ends with /v1, without /api."),
        (f"{daemon.url}/api", "ends with /v1, without /api."),
        (f"{daemon.url}/v1/chat/completions", "ends with /v1: the client adds the rest."),
    ):
        with openai.OpenAI(base_url=address, api_key="x", max_retries=0) as client:
            assert said in said_by(lambda client=client: client.chat.completions.create(model="x", messages=messages))
    assert "Let the client use OpenAI's" in daemon.request("POST", "/v1/messages", {})[2]["error"]["message"]
    olla = ollama.Client(f"{daemon.url}/v1")
    assert "does not end with /v1." in said_by(lambda: olla.chat("x", messages))
    olla._client.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 2},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"function_call": {"name": "f"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"extra_body": {"guided_json": {"type": "object"}}},
        {"extra_body": {"grammar": "root ::= 'yes'"}},
        {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}},
        {"logit_bias": {"5": 1}},
        {"temperature": 11},
        {"top_p": -1},
        {"max_tokens": 0},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"stop": ["x"] * 17},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_cannot_be_had_is_a_400_that_says_why(client: openai.OpenAI, wrong: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "x", "messages": user("hi"), **wrong})
    body: Any = caught.value.body
    assert body["type"] == "invalid_request_error"
    assert next(iter(wrong.get("extra_body", wrong))) in f"{body['param']} {body['message']}"


def test_keys(start_daemon: Callable[..., Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    guarded = start_daemon(f"listen: {{api_keys: {keys}}}")
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0) as right:
        assert right.chat.completions.create(model="x", messages=user(FIRST)).choices[0].message.content == QA[FIRST]
    for wrong in ("no-key", KEY[:-1], KEY + "x", "é"):
        assert guarded_status(guarded, wrong) == 401
    # The Unix socket's permissions are its key.
    assert guarded.ask(FIRST) == QA[FIRST]


def guarded_status(daemon: Any, key: str) -> int:
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"Authorization: Bearer {key}"]
    return int(subprocess.run([*command, f"{daemon.url}/v1/models"], capture_output=True, text=True, check=True).stdout)


def test_ollama_chat(olla: ollama.Client) -> None:
    whole = olla.chat(model="any", messages=user(FIRST), options={"temperature": 0, "seed": 1})
    assert (whole.message.content, whole.done, whole.done_reason) == (QA[FIRST], True, "stop")
    assert whole.eval_count > 5
    parts = list(olla.chat(model="any", messages=user("Does it work?"), stream=True))
    assert "".join(part.message.content for part in parts) == QA["Does it work?"]
    assert [part.done for part in parts][-1]
    short = olla.chat(model="any", messages=user(FIRST), options={"num_predict": 2, "stop": ["zzz"]})
    assert (short.eval_count, short.done_reason) == (2, "length")


def test_ollama_generate(olla: ollama.Client) -> None:
    assert olla.generate(model="any", prompt=FIRST).response == QA[FIRST]
    parts = list(olla.generate(model="any", prompt=FIRST, system="", stream=True))
    assert "".join(part.response for part in parts) == QA[FIRST]
    raw = olla.generate(model="any", prompt="What is", raw=True, options={"num_predict": 3})
    assert raw.prompt_eval_count == 3
    assert olla.generate(model="any").done_reason == "load"


def test_ollama_says_what_there_is(olla: ollama.Client, daemon: Any) -> None:
    (card,) = olla.list().models
    assert card.details.family == "gemma2"
    assert olla.ps().models[0].model == card.model
    assert olla.ps().models[0].context_length == 4096
    shown = olla.show("any")
    assert shown.modelinfo["gemma2.context_length"] == 4096
    assert "completion" in shown.capabilities
    assert daemon.request("GET", "/api/version")[2]["version"]
    assert daemon.request("GET", "/")[2] == b"Ollama is running"


def test_ollama_stops_a_model(olla: ollama.Client) -> None:
    """As `ollama stop` does; the next question loads it again."""
    for other in ("0x", "s", "0s1", "00m0.0s0", "1s", "10s", "0s" * 40 + "5m", ".", "0.", "", " 0"):
        assert olla.generate(model="x", keep_alive=other).done_reason == "load", other
    for zero in (0, "0", "0.0", "0s", "0m0s", "0h0.00ms", "000us0ns", "0s" * 5000):
        assert olla.generate(model="x", keep_alive=zero).done_reason == "unload"
        assert olla.ps().models == []
    assert olla.chat(model="x", messages=user(FIRST)).message.content == QA[FIRST]


def test_ollama_embeds(olla: ollama.Client, client: openai.OpenAI) -> None:
    texts = [FIRST, "Does it work?"]
    expected = [item.embedding for item in client.embeddings.create(model="x", input=texts).data]
    found = olla.embed(model="x", input=texts)
    assert [list(vector) for vector in found.embeddings] == expected
    assert found.prompt_eval_count == client.embeddings.create(model="x", input=texts).usage.prompt_tokens
    assert [list(vector) for vector in olla.embed(model="x", input=FIRST, truncate=True).embeddings] == expected[:1]
    assert list(olla.embeddings(model="x", prompt=FIRST).embedding) == expected[0]


def test_ollama_cuts_what_is_too_long_to_embed(olla: ollama.Client, daemon: Any) -> None:
    """As Ollama does unless told otherwise: the beginning stands for the whole."""
    words = "NPU " * 20_000
    (vector,) = olla.embed(model="x", input=words).embeddings
    (longer,) = olla.embed(model="x", input=words + "tokenizer " * 20_000, truncate=True).embeddings
    (other,) = olla.embed(model="x", input="tokenizer " + words).embeddings
    assert vector == longer != other
    with pytest.raises(ollama.ResponseError, match="context length") as refused:
        olla.embed(model="x", input=words, truncate=False)
    assert refused.value.status_code == 400
    body = {"model": "x", "input": [FIRST, words, words]}
    _, headers, content = daemon.request("POST", "/api/embed", body)
    assert "2 texts" in headers["X-RKEdge-Notes"]
    assert content["prompt_eval_count"] > 2 * 4000


def test_ollama_errors(olla: ollama.Client) -> None:
    for wrong in (
        {"format": "json"},
        {"options": {"temperature": 99}},
        {"messages": [{"role": "user", "images": ["eA=="]}]},
    ):
        with pytest.raises(ollama.ResponseError) as caught:
            olla.chat(**{"model": "x", "messages": user("hi"), **wrong})  # type: ignore[arg-type]
        assert caught.value.status_code == 400


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({}, None),
        ({"stop": "x", "max_tokens": 3, "user": "u", "n": 1, "top_logprobs": 0}, None),
        ({"modalities": ["text"], "function_call": "none", "logprobs": False}, None),
        ({"seed": 7}, "seed"),
        ({"extra_body": {"": 1}}, "?"),
        ({"extra_body": {"min_p": 0.1, "nothing": None}}, "min_p"),
        ({"reasoning_effort": "low", "metadata": {"a": "b"}, "store": True}, "metadata, reasoning_effort, store"),
        ({"messages": [{"role": "user", "content": "?", "name": "ann"}]}, "messages[].name"),
        ({"extra_body": {"a\r\nX-Evil: 1": 1, "\u00e9\ud800".encode("utf-16", "surrogatepass").hex(): 1}}, None),
    ],
    ids=range(9),
)
def test_openai_is_told_what_has_no_effect(client: openai.OpenAI, wanted: dict[str, Any], named: str | None) -> None:
    given: Any = {"model": "x", "messages": user("Does it work?"), **wanted}
    for stream in (False, True):
        headers = client.chat.completions.with_raw_response.create(**given, stream=stream).headers
        assert "x-evil" not in headers
        found = headers.get("x-rkedge-ignored")
        if "a\r\nX-Evil: 1" in wanted.get("extra_body", {}):
            assert found.startswith("a??X-Evil??1, ")
        else:
            assert found == named or sorted(found.split(", ")) == named.split(", ")


def test_what_has_no_effect_is_told_in_bounds(client: openai.OpenAI) -> None:
    many: Any = {f"{number}" * 100: 1 for number in range(5_000)}
    raw = client.chat.completions.with_raw_response.create(model="x", messages=user("Does it work?"), extra_body=many)
    named = raw.headers["x-rkedge-ignored"].split(", ")
    assert (len(named), named[-1]) == (17, "...")
    assert all(len(name) <= 48 for name in named)


def test_turns_that_are_dropped_are_told(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("max_context: 128")
    turns: Any = [*user("word " * 60), {"role": "assistant", "content": "yes"}, *user("Does it work?")]
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="x", max_retries=0) as client:
        chat = client.chat.completions
        note = "The context was full: the oldest turn was dropped."
        whole = chat.with_raw_response.create(model="x", messages=turns, extra_body={"drop_oldest": True})
        assert whole.headers["x-rkedge-notes"] == note
        assert whole.parse().model_extra["rkedge"] == {"notes": [note]}
        parts = list(chat.create(model="x", messages=turns, stream=True, extra_body={"drop_oldest": True}))
        assert [part.model_extra for part in parts if part.model_extra] == [{"rkedge": {"notes": [note]}}]
        assert "".join(part.choices[0].delta.content or "" for part in parts) == QA["Does it work?"]
        short = chat.with_raw_response.create(model="x", messages=turns[-1:], extra_body={"drop_oldest": True})
        assert "x-rkedge-notes" not in short.headers
        assert short.parse().model_extra == {}
        with pytest.raises(openai.BadRequestError):
            chat.create(model="x", messages=turns)
    told: dict[str, Any] = {"model": "x", "messages": turns, "stream": False}
    status, headers, body = daemon.request("POST", "/api/chat", {**told, "truncate": True})
    assert (status, headers["x-rkedge-notes"], headers["x-rkedge-ignored"]) == (200, note, None)
    assert body["message"]["content"] == QA["Does it work?"]
    assert daemon.request("POST", "/api/chat", {**told, "truncate": False})[0] == 400


def test_ollama_is_told_what_has_no_effect(olla: ollama.Client) -> None:
    answers: list[httpx.Response] = []
    olla._client.event_hooks = {"response": [answers.append]}
    chat: dict[str, Any] = {"model": "x", "messages": user("Does it work?")}
    for given, named in (
        ({}, None),
        ({"options": {"num_predict": 3, "stop": ["x"]}}, None),
        ({"keep_alive": 0}, "keep_alive"),
        ({"options": {"num_ctx": 64, "min_p": 0.5, "mirostat": 2, "seed": 1}}, "options."),
        ({"think": False, "logprobs": False}, None),
    ):
        olla.chat(**{**chat, **given})
        found = answers[-1].headers.get("x-rkedge-ignored")
        if named == "options.":
            assert set(found.split(", ")) == {f"options.{name}" for name in ("num_ctx", "min_p", "mirostat", "seed")}
        else:
            assert found == named
    assert olla.generate(model="x", keep_alive=5).done_reason == "load"
    assert answers[-1].headers["x-rkedge-ignored"] == "keep_alive"
    for wrong in ({"logprobs": True}, {"top_logprobs": 3}):
        for ask in (
            lambda wrong=wrong: olla.chat(**chat, **wrong),
            lambda wrong=wrong: olla.generate("x", "?", **wrong),
        ):
            with pytest.raises(ollama.ResponseError) as caught:
                ask()
            assert caught.value.status_code == 400
            assert next(iter(wrong)) in caught.value.error


def test_the_other_bodies_tell_it_too(daemon: Any) -> None:
    for method, path, body, named in (
        ("POST", "/v1/embeddings", {"input": "x", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2, "min_p": 0.1}, "min_p"),
        ("POST", "/api/show", {"model": "x", "verbose": True}, "verbose"),
        ("PUT", "/sessions/told", {"system": "x", "sytem": "y"}, "sytem"),
        ("POST", "/sessions/told/messages", {"content": "?", "max_tokens": 2, "min_p": 1}, "min_p"),
    ):
        status, headers, text = daemon.request(method, path, body)
        assert (status, headers["x-rkedge-ignored"]) == (200, named)
    assert json.loads(text.splitlines()[0])["ignored"] == ["min_p"]
    # Nothing of one request is told to the next one.
    assert daemon.request("GET", "/sessions/told")[1]["x-rkedge-ignored"] is None
    assert daemon.request("DELETE", "/sessions/told")[0] == 200


def test_the_curl_line_of_the_llamafile_model_card(daemon: Any) -> None:
    """As it stands there, but for the port."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = f"""curl http://localhost:{daemon.port}/v1/chat/completions \\
-H "Content-Type: application/json" \\
-H "Authorization: Bearer no-key" \\
-d '{{
  "model": "LLaMA_CPP",
  "messages": [
      {{
          "role": "system",
          "content": "You are LLAMAfile, an AI assistant. Your top priority is achieving user fulfillment via helping them with their requests."
      }},
      {{
          "role": "user",
          "content": "Write a limerick about python exceptions"
      }}
    ]
}}' | python3 -c '
import json
import sys
json.dump(json.load(sys.stdin), sys.stdout, indent=2)
print()
'"""  # noqa: E501 - quoted
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_log_says_what_requests_cannot_change(daemon: Any, client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="x", messages=user(FIRST), temperature=0)
    assert raw.headers["x-rkedge-ignored"] == "temperature"
    lines = daemon.log.splitlines()
    assert any("takes sampling only with the model (temperature 0.8, " in line for line in lines)
    assert any(raw.headers["x-request-id"] in line and line.endswith("; ignored: temperature") for line in lines)


def test_a_text_that_is_too_long_to_embed_is_told_in_its_own_words(daemon: Any) -> None:
    text = "What is RKLLM? " * 3000
    for path, field, style in (
        ("/api/embeddings", "prompt", str),
        ("/v1/embeddings", "input", lambda error: error["message"]),
    ):
        status, _, body = daemon.request("POST", path, {"model": "x", field: text})
        assert status == 400
        assert "longer than the model's context length" in style(body["error"])
        assert "pieces" in style(body["error"])
        assert "turns" not in style(body["error"])
