import instructor
import openai
from harness import QUESTION, URL, tried
from pydantic import BaseModel


class Answer(BaseModel):
    cores: int


def ask(mode: instructor.Mode):
    client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), mode=mode)
    talk = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(model="any", messages=talk, response_model=Answer, max_retries=1)


tried("tools")(lambda: ask(instructor.Mode.TOOLS))
tried("format")(lambda: ask(instructor.Mode.JSON))
