from functools import partial

import litellm
from harness import IMAGE, LONG, QUESTION, TOOL, URL, tried

litellm.suppress_debug_info = True


def ask(model: str, content: object = QUESTION, **more: object):
    base = URL if model.startswith("ollama") else f"{URL}/v1"
    messages = [{"role": "user", "content": content}]
    return litellm.completion(model=model, messages=messages, api_base=base, api_key="none", **more)


for model in ("openai/any", "ollama_chat/any", "ollama/any"):
    tried(f"chat {model}")(lambda model=model: ask(model).choices[0].message.content)
    tried(f"stream {model}")(
        lambda model=model: "".join(part.choices[0].delta.content or "" for part in ask(model, stream=True))
    )
    tried(f"long {model}")(lambda model=model: ask(model, LONG).choices[0].message.content)
tried("tools")(lambda: ask("openai/any", tools=[TOOL]))
tried("tools ollama")(lambda: ask("ollama_chat/any", tools=[TOOL]))
tried("image")(lambda: ask("openai/any", [{"type": "image_url", "image_url": {"url": IMAGE}}]))
tried("format")(lambda: ask("openai/any", response_format={"type": "json_object"}))
for model, base in (("openai/any", f"{URL}/v1"), ("ollama/any", URL)):
    found = partial(litellm.embedding, model, input=["x"], api_base=base, api_key="none")
    tried(f"embed {model}")(lambda found=found: len(found().data[0]["embedding"]))
