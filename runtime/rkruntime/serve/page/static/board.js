// The line at the top: which model there is, and how its board is.

import { daemon, keepKey, Refused } from "./api.js";
import { ask, byId } from "./dom.js";

const EVERY = 5000;

/** Look now, and again and again. `shown` is told the model's name and whether it is emulated. */
export async function watch(shown) {
  if (!document.hidden) await look(shown);
  setTimeout(watch, EVERY, shown);
}

async function look(shown) {
  const line = byId("board");
  try {
    const status = await daemon.status();
    byId("model").textContent = document.title = status.model;
    byId("emulated").hidden = !status.emulated;
    line.textContent = summary(status);
    line.title = status.failure ?? "";
    shown(status);
  } catch (error) {
    line.textContent = error instanceof Refused ? error.message : "the daemon does not answer";
    if (error.status === 401 && !byId("key-dialog").open) {
      const key = await ask(byId("key-dialog"));
      if (key) {
        keepKey(key);
        location.reload();
      }
    }
  }
}

function summary({ state, release, queue, temperatures, npu_load }) {
  const degrees = Object.values(temperatures), load = Object.values(npu_load);
  const parts = [
    state,
    release && `runtime ${release}`,
    queue.waiting && `${queue.waiting} waiting`,
    degrees.length && `${Math.round(Math.max(...degrees))} °C`,
    load.length && `NPU ${load.map((share) => `${Math.round(share * 100)} %`).join(" ")}`,
  ];
  return parts.filter(Boolean).join(" · ");
}
