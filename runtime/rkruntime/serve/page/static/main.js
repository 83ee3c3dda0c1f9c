// The chat: one conversation at a time, which the daemon keeps under its name.

import { daemon } from "./api.js";
import { watch } from "./board.js";
import * as composer from "./composer.js";
import { address, freeName, refresh } from "./conversations.js";
import { ask, button, byId, element } from "./dom.js";
import { Answer, showQuestion } from "./turns.js";

const QUESTIONS = {
  demo: ["What is the RK3588?", "Does the chat need the internet?", "What is quantization?"],
  other: ["What is an NPU good at?", "Explain recursion with a short example in Python.", "Write a short poem about the sea."],
};
const SAME = "Word for word the same: with the daemon's settings for sampling, this model does not vary its answers.";

// Codes of the daemon's errors.
const CHANGED = "session_changed", GONE = "session_not_found";

/** A conversation. Changes to it after another one was opened do not affect what is shown. */
class Chat {
  known = Promise.resolve(true); // resolves to whether it is known what the daemon has of it
  kept = false; // whether the daemon has any of it
  system = "";
  number = ""; // the last answer's id, by which it can be continued and replaced
  question = ""; // the last question
  answer = null; // the last answer
  drop = false; // whether the oldest turns may be forgotten to make room
  pending = {}; // the last question that was sent, with its id
  made = false; // whether the daemon was given a system prompt before the first question

  constructor(name) {
    this.name = name;
  }
}

let chat = new Chat(null);
// AbortController that ends the current answer; null if there is none.
let running = null;

// --- opening a conversation

const named = () => new URLSearchParams(location.hash.slice(1)).get("chat");

async function open(name) {
  running?.abort();
  idle();
  const own = (chat = new Chat(name));
  byId("turns").replaceChildren();
  composer.problem();
  if (byId("side").matches(":popover-open")) byId("side").hidePopover();
  const system = composer.useDraft(name ?? "");
  if (name === null) {
    own.system = system;
    composer.settleDraft();
  } else await (own.known = load(own));
  if (own !== chat) return;
  arrange();
  list();
}

/** Show what the daemon has of a conversation; returns whether that is known. */
async function load(own) {
  try {
    const data = await daemon.read(own.name);
    if (own !== chat) return false;
    own.kept = true;
    own.system = data.system;
    own.number = data.number ?? "";
    show(data);
    composer.settleDraft(own.number);
    return true;
  } catch (error) {
    if (own === chat) composer.problem(error.message, button("Try again", () => open(own.name)), ...elsewhere(error));
    return false;
  }
}

function show({ messages, broken }) {
  const answers = [];
  for (const { role, content } of messages) {
    if (role === "user") showQuestion((chat.question = content));
    else {
      answers.push(addAnswer());
      chat.answer.add(content);
    }
  }
  if (broken) chat.answer.ended("This answer was interrupted.");
  chat.answer?.offer({ again: chat.number, onward: broken });
  answers.forEach((answer) => answer.whole());
}

/** Show the parts of the page that depend on whether there are turns and a system prompt. */
function arrange() {
  byId("opening").hidden = byId("turns").childElementCount > 0;
  byId("instructed").hidden = !chat.system;
  byId("instructed").textContent = `System prompt: ${chat.system}`;
}

async function list() {
  try {
    await refresh(chat.name, remove);
  } catch {
    // The line at the top says what is wrong.
  }
}

async function remove(name) {
  try {
    if (name === chat.name) running?.abort();
    await daemon.remove(name);
  } catch (error) {
    if (error.code !== GONE) return composer.problem(error.message);
  }
  if (name === chat.name) startNew();
  else list();
}

function startNew() {
  if (location.hash) history.pushState(null, "", location.pathname);
  open(null);
  byId("text").focus();
}

// --- questions and answers

const fresh = () => [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

function addAnswer() {
  const answer = new Answer({ again: regenerate, onward: resume });
  byId("turns").append(answer.box);
  chat.answer?.offer({});
  chat.answer = answer;
  return answer;
}

/**
 * Write an answer from the daemon's events. Returns the error because of which it is not complete, or null.
 * @param begun Called at the first text, or at the end without one.
 */
async function write(answer, events, begun = () => {}) {
  const control = (running = new AbortController());
  let failure = null, emulated = false, waits = true, reason = "";
  composer.problem();
  composer.busy(true);
  answer.busy = true;
  answer.offer({});
  answer.ended();
  try {
    for await (const event of events(control.signal)) {
      if (event.type === "begin") {
        emulated = event.emulated;
        event.notes.forEach((note) => answer.note(note));
      } else {
        if (waits) begun();
        waits = false;
        if (event.type === "text") answer.add(event.text);
        else ({ reason } = event), answer.measured(event, emulated);
      }
    }
    if (!answer.text) reason = "The model said nothing.";
    answer.ended(reason === "length" ? "The limit of tokens was reached." : reason === "stop" ? "" : reason);
  } catch (error) {
    failure = error;
    if (!waits || answer.text) answer.ended(stopped(error) ? "Stopped." : error.message);
  }
  answer.busy = false;
  answer.offer({ again: true, onward: failure && failure.code !== GONE });
  if (running === control) idle();
  await answer.whole();
  return failure;
}

function idle() {
  running = null;
  composer.busy(false);
}

const stopped = (error) => error.name === "AbortError";

async function send(text) {
  const asked = chat;
  // Until then, it is not known which answer the question follows.
  if (!(await asked.known) || running || asked !== chat) return;
  const own = chat, before = { question: chat.question, answer: chat.answer, number: chat.number };
  // If the daemon already has this question under the same id, it replaces its answer.
  const again = own.pending.text === text, id = again ? own.pending.id : fresh();
  if (!own.kept && !again) own.name = null;
  own.pending = { text, id };
  const slot = own.kept ? own.name : "";
  let begun = false;
  composer.sending(text, id);
  const question = showQuestion((own.question = text)), answer = addAnswer();
  arrange();
  const failure = await write(
    answer,
    (signal) => askIn(own, { content: text, id, drop_oldest: own.drop }, signal),
    () => {
      begun = true;
      Object.assign(own, { kept: true, number: id, pending: {} });
      composer.arrived(slot, own.name);
      if (own === chat) history.replaceState(null, "", address(own.name));
    },
  );
  if (begun) return list();
  question.remove();
  answer.box.remove();
  Object.assign(own, before);
  if (!own.kept && own.made) await daemon.remove(own.name).catch(() => {});
  own.made = false;
  if (own === chat) giveBack(text, failure);
}

/** Ask, beginning a conversation if necessary. The daemon refuses if its copy differs from what is shown here. */
async function* askIn(own, question, signal) {
  if (own.kept) return yield* daemon.ask(own.name, { ...question, after: own.number || undefined }, signal);
  for (const tried = new Set(); ; own.name = null) {
    own.name ??= await freeName(question.content, tried);
    try {
      if (own.system) await daemon.change(own.name, { system: own.system, after: "" });
      own.made = Boolean(own.system);
      return yield* daemon.ask(own.name, { ...question, after: "" }, signal);
    } catch (error) {
      if (error.code !== CHANGED) throw error;
      own.made = false;
      tried.add(own.name); // somebody else has begun a conversation of that name meanwhile
    }
  }
}

/** Return buttons for what can be done about a conversation that another tab or somebody else has changed. */
function elsewhere({ code }) {
  if (code === CHANGED) return [button("Show it", () => open(chat.name))];
  return code === GONE ? [button("Ask in a new chat", move)] : [];
}

function giveBack(text, failure) {
  arrange();
  chat.answer?.offer({ again: chat.number });
  composer.giveBack(text);
  if (stopped(failure)) return;
  const full = failure.code === "context_length_exceeded" && chat.answer && !chat.drop;
  composer.problem(
    failure.message,
    ...(full ? [button("Forget the oldest turns and send", forget), button("Ask in a new chat", move)] : []),
    ...(failure.code === CHANGED ? [button("Send anyway", insist)] : []),
    ...elsewhere(failure),
  );
}

function insist() {
  chat.number = "";
  byId("form").requestSubmit();
}

function forget() {
  chat.drop = true;
  byId("form").requestSubmit();
}

function move() {
  const text = composer.typed();
  composer.set("");
  startNew();
  composer.giveBack(text);
}

async function regenerate(earlier) {
  const own = chat, { question, number } = own, onward = !earlier.continue.hidden;
  const answer = new Answer({ again: regenerate, onward: resume });
  earlier.box.after(answer.box);
  earlier.offer({});
  const events = (signal) => daemon.ask(own.name, { content: question, id: number, after: number, drop_oldest: own.drop }, signal);
  let begun = false;
  const failure = await write(answer, events, () => {
    begun = true;
    own.answer = answer;
    answer.replaces(earlier);
  });
  if (begun) {
    if (!failure && answer.text === earlier.text) answer.note(SAME);
    return list();
  }
  answer.box.remove();
  earlier.offer({ again: true, onward });
  if (own === chat && !stopped(failure)) composer.problem(failure.message, ...elsewhere(failure));
}

async function resume(answer) {
  const own = chat;
  const received = { id: own.number, received: [...answer.text].length };
  await write(answer, (signal) => daemon.resume(own.name, received, signal));
  list();
}

// --- system prompt

async function instruct(text = chat.system) {
  const own = chat, given = (await ask(byId("system-dialog"), text))?.trim();
  if (given === undefined || given === own.system) return;
  try {
    if (own.kept) await daemon.change(own.name, { system: given, after: own.number || undefined });
  } catch (error) {
    return composer.problem(error.message, button("Try again", () => instruct(given)), ...elsewhere(error));
  }
  own.system = given;
  if (!own.kept) composer.keepSystem(given);
  else if (!own.answer?.continue.hidden) {
    // An answer that was begun under another system prompt is neither continued nor replaced.
    own.number = "";
    own.answer?.offer({});
  }
  arrange();
}

// --- the page

function privacy({ user, emulated }) {
  const place = emulated ? "the computer that runs this model" : "the board that runs this model";
  const whose = user === "network" ? "Everybody who can open this page shares them." : "Nobody else's page shows them.";
  return `Your words go to ${place}, and nowhere else. Conversations are kept there; you can delete them at any time. ${whose}`;
}

watch((status) => {
  byId("private").textContent = privacy(status);
  const questions = status.model.startsWith("demo") ? QUESTIONS.demo : QUESTIONS.other;
  if (byId("questions").childElementCount) return;
  byId("questions").append(...questions.map((question) => element("li", {}, button(question, () => send(question)))));
});
composer.listen(send, () => running?.abort());
byId("new").addEventListener("click", startNew);
for (const id of ["system", "instructed"]) byId(id).addEventListener("click", () => instruct());
addEventListener("popstate", () => open(named()));
addEventListener("focus", list);
matchMedia("(min-width: 60rem)").addEventListener("change", () => byId("side").matches(":popover-open") && byId("side").hidePopover());
open(named());
