// Where questions are typed: the field, its draft, its buttons, and messages about problems.

import { byId, element } from "./dom.js";
import * as drafts from "./drafts.js";

const field = byId("text");
let slot = "";
let draft = {};

export const typed = () => field.value;

/** Show the draft of a conversation; returns the draft's system prompt. */
export function useDraft(name) {
  slot = name;
  draft = drafts.read(name);
  set(draft.text ?? "");
  return draft.system ?? "";
}

/** Put a question that was on its way back into the field, unless the daemon's last answer, `number`, is to it. */
export function settleDraft(number = "") {
  const { sent, id } = draft;
  giveBack(id === number ? "" : sent);
}

export function set(text) {
  field.value = text;
  fit();
  keep();
}

/** Note that a text is on its way: it leaves the field, but stays in the draft. */
export function sending(text, id) {
  Object.assign(draft, { sent: text, id });
  set(field.value.trim() === text ? "" : field.value);
}

/** Note that the question on its way has arrived at the daemon, in the conversation `name`. */
export function arrived(before, name) {
  drafts.keep(before, {});
  if (slot !== before) return;
  slot = name;
  draft = {};
  keep();
}

/** Put a question that was on its way back into the field, before what has been typed since. */
export function giveBack(text) {
  draft = { system: draft.system };
  set(join(text, field.value));
}

export function keepSystem(text) {
  draft.system = text;
  keep();
}

const join = (...texts) => texts.filter(Boolean).join("\n\n");

/** Show a problem, with buttons for what can be done about it; without a message, hide it. */
export function problem(message = "", ...buttons) {
  const box = byId("problem");
  box.hidden = !message;
  box.replaceChildren(element("p", {}, message), ...buttons);
}

export function busy(writing) {
  const refocus = [document.body, byId("stop"), byId("send")].includes(document.activeElement);
  byId("send").hidden = writing;
  byId("stop").hidden = !writing;
  byId("system").disabled = byId("instructed").disabled = writing;
  if (refocus && !writing) field.focus();
}

/** Call `send` with each text that is submitted, and `stop` to end its answer. */
export function listen(send, stop) {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) send(field.value.trim());
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("form").requestSubmit();
  });
  field.addEventListener("input", () => { fit(); keep(); });
  byId("stop").addEventListener("click", stop);
  byId("chat").addEventListener("keydown", (event) => event.key === "Escape" && stop());
}

function keep() {
  drafts.keep(slot, { ...draft, text: field.value });
}

function fit() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}
