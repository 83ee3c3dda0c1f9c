import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { LONG, PIXEL, QUESTION, TALK, URL, joined, tried } from "./harness.mjs";

const board = createOpenAICompatible({ name: "board", baseURL: `${URL}/v1`, apiKey: "none" });
const ask = (more = {}) => generateText({ model: board("any"), messages: TALK, maxRetries: 0, ...more });
const empty = jsonSchema({ type: "object", properties: {} });
const image = [{ role: "user", content: [{ type: "image", image: `data:image/png;base64,${PIXEL}` }] }];

await tried("chat", async () => (await ask()).text);
await tried("stream", () => joined(streamText({ model: board("any"), messages: TALK }).textStream, (part) => part));
await tried("embed", async () => (await embed({ model: board.textEmbeddingModel("any"), value: QUESTION })).embedding.length);
await tried("long", () => ask({ messages: [{ role: "user", content: LONG }] }));
await tried("tools", () => ask({ tools: { light: tool({ description: "A light.", inputSchema: empty }) } }));
await tried("image", () => ask({ messages: image }));
await tried("format", () => generateObject({ model: board("any"), prompt: QUESTION, schema: empty, maxRetries: 0 }));
