import { Ollama } from "ollama";
import { LONG, PIXEL, QUESTION, TALK, TOOL, URL, joined, tried } from "./harness.mjs";

const client = new Ollama({ host: URL });
const chat = (more = {}) => client.chat({ model: "any", messages: TALK, ...more });

await tried("chat", async () => (await chat()).message.content);
await tried("stream", async () => joined(await chat({ stream: true }), (part) => part.message.content));
await tried("complete", async () => (await client.generate({ model: "any", prompt: QUESTION })).response);
await tried("embed", async () => (await client.embed({ model: "any", input: QUESTION })).embeddings[0].length);
await tried("models", async () => (await client.list()).models.length);
await tried("long", () => chat({ messages: [{ role: "user", content: LONG }] }));
await tried("tools", () => chat({ tools: [TOOL] }));
await tried("image", () => chat({ messages: [{ role: "user", content: "?", images: [PIXEL] }] }));
await tried("format", () => chat({ format: "json" }));
await tried("pull", () => client.pull({ model: "gemma2" }));
