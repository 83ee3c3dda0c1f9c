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

/** A conversation. What is written into it after another one was opened changes nothing that is shown. */
class Chat {
  kept = false; // whether the daemon has any of it
  system = "";
  number = ""; // the last answer's id, by which it can be continued and replaced
  question = ""; // the last one
  answer = null; // the last one
  drop = false; // whether the oldest turns may be forgotten to make room
  pending = {}; // the last question that was sent, with its id

  constructor(name) {
    this.name = name;
  }
}

let chat = new Chat(null);
// Ends the answer that is being written; null if none is.
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
  if (name === null) chat.system = composer.useDraft("");
  else await load(own);
  if (own !== chat) return;
  arrange();
  list();
}

async function load(own) {
  try {
    const data = await daemon.read(own.name);
    if (own !== chat) return;
    own.kept = true;
    own.system = data.system;
    own.number = data.number ?? "";
    show(data);
  } catch (error) {
    if (own === chat) composer.problem(error.message, button("Try again", () => open(own.name)));
  }
  if (own === chat) composer.useDraft(own.name, own.number);
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

/** Show what the conversation has and what it lacks. */
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
    if (error.code !== "session_not_found") return composer.problem(error.message);
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
 * Have an answer written from the events that the daemon sends. Returns why it is not whole, or null.
 * @param begun Called with its first text.
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
  answer.offer({ again: true, onward: failure && failure.code !== "session_not_found" });
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
  if (running) return;
  const own = chat, before = { question: chat.question, answer: chat.answer, number: chat.number };
  // The daemon replaces what it may have of the same question under the same id.
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
  if (!own.kept && own.name && own.system) await daemon.remove(own.name).catch(() => {});
  if (own === chat) giveBack(text, failure);
}

/** Ask, in a conversation that may have to be begun. */
async function* askIn(own, question, signal) {
  own.name ??= await freeName(question.content);
  if (!own.kept && own.system) await daemon.change(own.name, { system: own.system });
  yield* daemon.ask(own.name, question, signal);
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
  );
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
  const own = chat, { question, number } = own;
  const answer = new Answer({ again: regenerate, onward: resume });
  earlier.box.after(answer.box);
  earlier.offer({});
  const events = (signal) => daemon.ask(own.name, { content: question, id: number, drop_oldest: own.drop }, signal);
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
  earlier.offer({ again: true });
  if (own === chat && !stopped(failure)) composer.problem(failure.message);
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
    if (own.kept) await daemon.change(own.name, { system: given });
  } catch (error) {
    return composer.problem(error.message, button("Try again", () => instruct(given)));
  }
  own.system = given;
  if (!own.kept) composer.keepSystem(given);
  else if (!own.answer?.continue.hidden) {
    // An answer that was begun under another one is neither continued nor replaced.
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
