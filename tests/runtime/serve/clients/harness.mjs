// For a program with somebody's client: what came of each call goes to standard output, as JSON.
export const URL = process.env.URL;
export const QUESTION = "What is the RK3588?";
export const LONG = "word ".repeat(6000);
export const TALK = [{ role: "user", content: QUESTION }];
export const TOOL = {
  type: "function",
  function: { name: "light", description: "Turns a light on.", parameters: { type: "object", properties: {} } },
};
export const PIXEL =
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const seen = {};

// An exception counts as what a person reads whose program prints it.
export async function tried(name, ask) {
  try {
    seen[name] = await ask();
  } catch (error) {
    seen[name] = { error: String(error.message), kind: error.name };
  }
}

export async function joined(parts, text) {
  let all = "";
  for await (const part of parts) all += text(part) ?? "";
  return all;
}

process.on("exit", () => console.log(JSON.stringify(seen)));
