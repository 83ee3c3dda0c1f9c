// The line at the top: the model's name, and the state of its board.

import { daemon, keepKey, Refused } from "./api.js";
import { ask, byId } from "./dom.js";

const EVERY = 5000;

/** Show the daemon's status now and every EVERY ms. `shown` is called with each status. */
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
