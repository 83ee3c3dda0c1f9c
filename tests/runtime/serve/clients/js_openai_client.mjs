import OpenAI from "openai";
import { LONG, PIXEL, QUESTION, TALK, TOOL, URL, joined, tried } from "./harness.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none", maxRetries: 0 });
const chat = (more = {}) => client.chat.completions.create({ model: "any", messages: TALK, ...more });
const image = [{ role: "user", content: [{ type: "image_url", image_url: { url: `data:image/png;base64,${PIXEL}` } }] }];

await tried("chat", async () => (await chat()).choices[0].message.content);
await tried("stream", async () => joined(await chat({ stream: true }), (part) => part.choices[0]?.delta.content));
await tried("helper", () => client.chat.completions.stream({ model: "any", messages: TALK }).finalContent());
await tried("embed", async () => (await client.embeddings.create({ model: "any", input: QUESTION })).data[0].embedding.length);
await tried("models", async () => (await client.models.list()).data.length);
await tried("long", () => chat({ messages: [{ role: "user", content: LONG }] }));
await tried("tools", () => chat({ tools: [TOOL] }));
await tried("image", () => chat({ messages: image }));
await tried("format", () => chat({ response_format: { type: "json_object" } }));
await tried("responses", () => client.responses.create({ model: "any", input: QUESTION }));
