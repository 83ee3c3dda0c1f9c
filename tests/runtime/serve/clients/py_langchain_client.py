from harness import IMAGE, LONG, QUESTION, URL, tried
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Answer(BaseModel):
    cores: int


@tool
def light() -> str:
    """Turns a light on."""
    return "on"


CHATS = {
    "openai": ChatOpenAI(model="any", base_url=f"{URL}/v1", api_key="none", max_retries=0),
    "ollama": ChatOllama(model="any", base_url=URL),
}
for name, chat in CHATS.items():
    tried(f"chat {name}")(lambda chat=chat: chat.invoke(QUESTION).content)
    tried(f"stream {name}")(lambda chat=chat: "".join(part.content for part in chat.stream(QUESTION)))
    tried(f"batch {name}")(lambda chat=chat: [one.content for one in chat.batch([QUESTION] * 2)])
    tried(f"long {name}")(lambda chat=chat: chat.invoke(LONG).content)
    tried(f"tools {name}")(lambda chat=chat: chat.bind_tools([light]).invoke(QUESTION).content)
    tried(f"format {name}")(lambda chat=chat: chat.with_structured_output(Answer).invoke(QUESTION))
    image = HumanMessage([{"type": "image_url", "image_url": {"url": IMAGE}}])
    tried(f"image {name}")(lambda chat=chat, image=image: chat.invoke([image]).content)
# Without that option, it counts tokens as OpenAI does and sends them as numbers.
openai = OpenAIEmbeddings(model="any", base_url=f"{URL}/v1", api_key="none", check_embedding_ctx_length=False)
tried("embed openai")(lambda: len(openai.embed_query("x")))
tried("embed ollama")(lambda: len(OllamaEmbeddings(model="any", base_url=URL).embed_query("x")))
tried("validated")(lambda: bool(ChatOllama(model="none-such", base_url=URL, validate_model_on_init=True)))
