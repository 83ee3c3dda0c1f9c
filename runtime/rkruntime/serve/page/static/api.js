// The page's requests to the daemon.

const KEY = "rkedge.key";

/** Keep the key that somebody has typed. Links give none: whoever made the link could read what is said with its key. */
export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** A response of the daemon that refuses a request. */
export class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
  }
}

async function request(method, path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The daemon does not answer. Is it running, and is the tunnel to it open?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new Refused(response.status, error ?? { message: `The daemon answered with the status ${response.status}.` });
}

async function call(method, path, body) {
  return (await request(method, path, body)).json();
}

/** Yield the events of an answer: JSON, one on each line. */
async function* events(path, body, signal) {
  const response = await request("POST", path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true }; // treated as an end that comes too early
    });
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.type === "error") throw new Refused(200, event.error);
      yield event;
      if (event.type === "done") return;
    }
  }
  throw new Error("The connection broke before the end of the answer.");
}

const at = (name) => `/sessions/${encodeURIComponent(name)}`;

export const daemon = {
  status: async () => {
    const { error, ...status } = await call("GET", "/status");
    return { ...status, failure: error };
  },
  blocks: async (text) => (await call("POST", "/markdown", { text })).blocks,
  list: async () => (await call("GET", "/sessions")).sessions,
  read: (name) => call("GET", at(name)),
  change: (name, change) => call("PUT", at(name), change),
  remove: (name) => call("DELETE", at(name)),
  ask: (name, question, signal) => events(`${at(name)}/messages`, question, signal),
  resume: (name, received, signal) => events(`${at(name)}/resume`, received, signal),
};
