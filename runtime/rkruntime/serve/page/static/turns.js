// Questions and answers as they are shown.

import { daemon } from "./api.js";
import { button, byId, copyButton, element, speak } from "./dom.js";
import { Markdown } from "./markdown.js";

const number = (value, digits = 0) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const duration = (seconds) => (seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${number(seconds, 1)} s`);

const talk = byId("talk");
// Whether the end is in view: it then stays in view when the talk grows, until the user scrolls up.
let following = true, before = 0;
talk.addEventListener("scroll", () => {
  const near = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
  if (near || talk.scrollTop < before) following = near;
  before = talk.scrollTop;
});
new ResizeObserver(() => following && showEnd()).observe(byId("turns"));

/** Show the end of the talk, and follow it. */
export function showEnd() {
  following = true;
  talk.scrollTop = talk.scrollHeight;
}

export function showQuestion(text) {
  const box = element("article", { className: "message user" }, element("h2", { className: "unseen" }, "You"));
  box.append(element("div", { className: "said", dir: "auto" }, text));
  byId("turns").append(box);
  showEnd();
  return box;
}

/** An answer: its text, figures, notes and buttons. */
export class Answer {
  /**
   * @param again Called to have the question answered once more.
   * @param onward Called to have an interrupted answer continued.
   */
  constructor({ again, onward }) {
    const body = element("div", { className: "said", dir: "auto" });
    this.notes = element("div", { className: "notes quiet" });
    this.figures = element("ul", { className: "figures quiet" });
    this.figures.setAttribute("aria-label", "Figures");
    this.continue = button("Continue", () => onward(this));
    this.reason = element("p");
    this.again = button("Regenerate", () => again(this));
    const copied = copyButton(() => this.text);
    const tools = element("div", { className: "tools" }, copied, this.again);
    const ending = element("div", { className: "reason quiet" }, this.reason, this.continue);
    const title = element("h2", { className: "unseen" }, "Answer");
    this.box = element("article", { className: "message assistant" }, title, this.notes, body, ending, this.figures, tools);
    this.markdown = new Markdown(body, daemon.blocks, (text) => this.spoken && speak(text));
    this.offer({});
  }

  get text() {
    return this.markdown.text;
  }

  /** Whether the answer is still being written. */
  set busy(busy) {
    this.box.classList.toggle("busy", busy);
    if (busy) this.box.ariaBusy = this.spoken = true;
  }

  /** Show or hide the buttons other than the one for copying. */
  offer({ again = false, onward = false }) {
    this.again.hidden = !again;
    this.continue.hidden = !onward;
  }

  add(text) {
    this.markdown.add(text);
  }

  note(text) {
    this.notes.append(element("p", {}, text));
  }

  /** Show why the answer is not complete; nothing if it is. */
  ended(reason = "") {
    this.reason.textContent = reason;
    if (reason) speak(reason);
  }

  /** Wait until the whole answer is shown as Markdown. */
  async whole() {
    await this.markdown.finish();
    this.box.ariaBusy = false;
  }

  measured(done, emulated) {
    const speed = done.tokens_per_s && `${number(done.tokens_per_s, 1)} tokens/s${emulated ? " (emulated)" : ""}`;
    const parts = [
      done.tokens !== undefined && `${number(done.tokens)} ${done.tokens === 1 ? "token" : "tokens"}`,
      speed,
      done.first_token_s !== undefined && `first token after ${duration(done.first_token_s)}`,
      done.reused_tokens > 0 && `${number(done.reused_tokens)} of ${number(done.prompt_tokens)} prompt tokens from the cache`,
    ];
    this.figures.replaceChildren(...parts.filter(Boolean).map((part) => element("li", {}, part)));
  }

  /** Take the place of an earlier answer, which stays within reach as long as the page is open. */
  replaces(earlier) {
    earlier.offer({});
    earlier.box.replaceWith(this.box);
    const details = element("details", { className: "earlier" }, element("summary", {}, "Earlier answer"), earlier.box);
    this.notes.after(details);
  }
}
