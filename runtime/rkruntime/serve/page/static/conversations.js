// The list of conversations that the daemon keeps for this user.

import { daemon } from "./api.js";
import { ask, button, byId, element } from "./dom.js";

const DAY = 86400e3;
const time = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const date = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });

// What the list shows: unless something changes, it is left alone, so that it keeps the keyboard's focus.
let shown = "";

export const address = (name) => `#chat=${encodeURIComponent(name)}`;

/** Ask the daemon for the list, and show it. */
export async function refresh(current, removed) {
  const known = await daemon.list();
  const now = JSON.stringify([known, current]);
  if (now === shown) return;
  shown = now;
  byId("none").hidden = known.length > 0;
  byId("conversations").replaceChildren(...known.map((one) => entry(one, one.name === current, removed)));
}

function entry({ name, title, changed }, isCurrent, removed) {
  const moment = new Date(changed * 1000);
  const when = (Date.now() - moment < DAY ? time : date).format(moment);
  const shown = title || name;
  const details = element("small", { className: "quiet" }, `${when} · ${name}`);
  const link = element("a", { href: address(name) }, element("bdi", {}, shown), details);
  if (isCurrent) link.ariaCurrent = "page";
  const remove = button("×", async () => {
    const dialog = byId("delete-dialog");
    dialog.querySelector("p").textContent = `“${shown}” will be gone from the daemon, for good.`;
    if ((await ask(dialog)) !== null) await removed(name);
  });
  remove.ariaLabel = `Delete “${shown}”`;
  return element("li", {}, link, remove);
}

/** Make a name for a new conversation from its first words, valid for `rkedge chat --session`, and not in `tried`. */
export async function freeName(question, tried) {
  const plain = question.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const words = plain.match(/[a-z0-9]+/g) ?? ["chat"];
  const start = words.join("-").slice(0, 40).replace(/-$/, "");
  const taken = new Set([...tried, ...(await daemon.list()).map(({ name }) => name)]);
  for (let count = 1; ; count++) {
    const name = count > 1 ? `${start}-${count}` : start;
    if (!taken.has(name)) return name;
  }
}
