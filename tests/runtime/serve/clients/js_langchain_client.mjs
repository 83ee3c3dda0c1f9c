import { HumanMessage } from "@langchain/core/messages";
import { ChatOllama, OllamaEmbeddings } from "@langchain/ollama";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { LONG, PIXEL, QUESTION, TOOL, URL, joined, tried } from "./harness.mjs";

const configuration = { baseURL: `${URL}/v1` };
const chats = {
  openai: new ChatOpenAI({ model: "any", apiKey: "none", maxRetries: 0, configuration }),
  ollama: new ChatOllama({ model: "any", baseUrl: URL, maxRetries: 0 }),
};
const image = new HumanMessage({
  content: [{ type: "image_url", image_url: { url: `data:image/png;base64,${PIXEL}` } }],
});
for (const [name, chat] of Object.entries(chats)) {
  await tried(`chat ${name}`, async () => (await chat.invoke(QUESTION)).content);
  await tried(`stream ${name}`, async () => joined(await chat.stream(QUESTION), (part) => part.content));
  await tried(`long ${name}`, () => chat.invoke(LONG));
  await tried(`tools ${name}`, () => chat.bindTools([TOOL]).invoke(QUESTION));
  await tried(`image ${name}`, () => chat.invoke([image]));
}
const openai = new OpenAIEmbeddings({ model: "any", apiKey: "none", maxRetries: 0, configuration });
await tried("embed openai", async () => (await openai.embedQuery("x")).length);
await tried("embed ollama", async () => (await new OllamaEmbeddings({ model: "any", baseUrl: URL }).embedQuery("x")).length);
