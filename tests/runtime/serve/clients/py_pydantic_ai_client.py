from harness import LONG, QUESTION, URL, tried
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.ollama import OllamaProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Answer(BaseModel):
    cores: int


OPENAI = OpenAIChatModel("any", provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))
OLLAMA = OpenAIChatModel("any", provider=OllamaProvider(base_url=f"{URL}/v1"))
for name, model in {"openai": OPENAI, "ollama": OLLAMA}.items():
    agent = Agent(model)
    tried(f"chat {name}")(lambda agent=agent: agent.run_sync(QUESTION).output)
    tried(f"stream {name}")(lambda agent=agent: "".join(agent.run_stream_sync(QUESTION).stream_text(delta=True)))
    tried(f"long {name}")(lambda agent=agent: agent.run_sync(LONG).output)
agent = Agent(OPENAI, instructions="Be kind.")
tried("instructions")(lambda: agent.run_sync(QUESTION).output != "")
tried("tools")(lambda: str(Agent(OPENAI, output_type=Answer).run_sync(QUESTION).output))
