from harness import LONG, QUESTION, URL, tried
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike


def light() -> str:
    """Turns a light on."""
    return "on"


TALK = [ChatMessage(role="user", content=QUESTION)]
CHATS = {
    "openai": OpenAILike(model="any", api_base=f"{URL}/v1", api_key="none", is_chat_model=True, max_retries=0),
    "ollama": Ollama(model="any", base_url=URL, request_timeout=60),
}
for name, chat in CHATS.items():
    tried(f"chat {name}")(lambda chat=chat: chat.chat(TALK).message.content)
    tried(f"stream {name}")(lambda chat=chat: "".join(part.delta for part in chat.stream_chat(TALK)))
    tried(f"complete {name}")(lambda chat=chat: chat.complete(QUESTION).text)
    tried(f"long {name}")(lambda chat=chat: chat.complete(LONG).text)
tool = FunctionTool.from_defaults(light)
tried("tools ollama")(lambda: CHATS["ollama"].chat_with_tools([tool], user_msg=QUESTION).message.content)
tried("format ollama")(lambda: Ollama(model="any", base_url=URL, json_mode=True).complete(QUESTION).text)
tried("embed ollama")(lambda: len(OllamaEmbedding(model_name="any", base_url=URL).get_text_embedding("x")))
