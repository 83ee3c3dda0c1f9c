// Markdown as it arrives. The daemon parses it (POST /markdown); here its trees become elements, of these kinds only.

import { copyButton, element } from "./dom.js";

// Most characters that the daemon parses at a time.
const MOST = 16384;
// Pause before a growing text is parsed again: at least PAUSE ms, and SHARE times as long as the last parse took.
const PAUSE = 120, SHARE = 4;

const PLAIN = new Set(
  ["p", "blockquote", "ul", "li", "code", "em", "strong", "s", "br", "hr", "thead", "tbody", "tr"],
);
const SPECIAL = {
  ol: ({ start }) => element("ol", { start: start ?? 1 }),
  th: ({ align }) => element("th", { className: align ?? "", scope: "col" }),
  td: ({ align }) => element("td", { className: align ?? "" }),
};

function build(node) {
  if (typeof node === "string") return node;
  const [tag, attributes, ...children] = node;
  const inside = children.map(build);
  if (/^h[1-6]$/.test(tag)) return element("h3", { className: tag }, ...inside);
  if (tag === "a") return link(attributes.href, inside);
  if (tag === "pre") return codeBlock(attributes.language, inside);
  if (tag === "table") return scrolling("Table", element("table", {}, ...inside));
  const made = SPECIAL[tag]?.(attributes) ?? element(PLAIN.has(tag) ? tag : "span");
  made.append(...inside);
  return made;
}

/** Make a link that shows where it leads, whatever its text says; none to this page, whose address can set a key. */
function link(href, inside) {
  const url = URL.canParse(href) && new URL(href);
  if (!["http:", "https:", "mailto:"].includes(url.protocol) || url.host === location.host) return element("span", {}, ...inside);
  const made = element("a", { href, target: "_blank", rel: "noopener noreferrer" }, element("bdi", {}, ...inside));
  const where = url.host || url.pathname;
  if ([href, where].includes(made.textContent)) return made;
  return element("span", {}, made, element("bdi", { className: "host" }, ` (${where})`));
}

function codeBlock(language, inside) {
  const code = element("pre", { tabIndex: 0 }, ...inside);
  code.setAttribute("role", "region");
  code.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  const bar = element("div", { className: "bar" }, element("span", {}, language ?? ""), copyButton(() => code.textContent));
  return element("div", { className: "code" }, bar, code);
}

function scrolling(label, content) {
  const made = element("div", { className: "scrolling", tabIndex: 0 }, content);
  made.setAttribute("role", "region");
  made.setAttribute("aria-label", label);
  return made;
}

/** Find the element of a block in which text that is not parsed yet continues it; null if there is none. */
function openEnd(block) {
  if (block.matches("p, h3, code")) return block;
  if (block.matches(".code")) return block.querySelector("code");
  if (!block.matches("ul, ol, li, blockquote")) return null;
  const { lastChild } = block;
  return (lastChild instanceof Element && openEnd(lastChild)) || (block.matches("li") ? block : null);
}

const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

/** Return the index in `text` at which a line begins. */
function beginning(text, line) {
  const ends = text.matchAll(/\r\n?|\n/g);
  let found = 0;
  for (; line > 0; line--) {
    const { value } = ends.next();
    found = value.index + value[0].length;
  }
  return found;
}

/**
 * A text in a box. New text is shown at once as it is, and as Markdown a moment later. Only the last block is parsed
 * again when the text goes on, so that a long answer takes no more time for each token than a short one.
 */
export class Markdown {
  text = "";
  #box;
  #read;
  #ended;
  #last = 0; // index in the text at which the last block begins
  #seen = 0; // index in the text up to which it is parsed
  #live = []; // elements of the text from #last to #seen
  #tail = document.createTextNode(""); // the text after #seen
  #reading = null;

  /**
   * @param read Returns the blocks of a text.
   * @param ended Called with the text of each block that is complete.
   */
  constructor(box, read, ended = () => {}) {
    this.#box = box;
    this.#read = read;
    this.#ended = ended;
    this.#showRest();
  }

  add(text) {
    this.text += text;
    this.#tail.appendData(text);
    this.#reading ??= this.#follow();
  }

  /** Parse to the end. Where that fails, the text stays as it is. */
  async finish() {
    await this.#reading;
    while (this.text.slice(this.#seen).trim() && (await this.#step()));
    this.#live.forEach((block) => this.#ended(block.textContent));
  }

  async #follow() {
    const began = performance.now();
    await this.#step();
    await pause(Math.max(PAUSE, SHARE * (performance.now() - began)));
    this.#reading = null;
  }

  async #step() {
    const piece = this.text.slice(this.#last, this.#last + MOST).replace(/[\uD800-\uDBFF]$/, "");
    const cut = this.#last + piece.length < this.text.length;
    const blocks = await this.#read(piece).catch(() => null);
    this.#live.forEach((block) => block.remove());
    this.#live = (blocks ?? []).map(({ node }) => build(node));
    this.#box.append(...this.#live);
    // Space at the end is not in the blocks, but may separate two words.
    this.#seen = this.#last + (blocks ? piece.trimEnd().length : 0);
    this.#showRest(this.#live.at(-1));
    if (blocks) this.#close(blocks, piece, cut);
    return blocks !== null;
  }

  /** Drop references to blocks that cannot change any more. */
  #close(blocks, piece, cut) {
    let closed = this.#live.length - 1;
    if (closed > 0) this.#last += beginning(piece, blocks.at(-1).line);
    else if (cut) {
      // A block that is too long continues as a new block.
      this.#last = this.#seen = this.#last + piece.length;
      closed = this.#live.length;
    }
    this.#live.splice(0, Math.max(0, closed)).forEach((block) => this.#ended(block.textContent));
  }

  #showRest(block) {
    const before = this.#tail.parentElement;
    this.#tail.remove();
    if (before?.matches(".plain")) before.remove();
    this.#tail = document.createTextNode(this.text.slice(this.#seen));
    const place = (block && openEnd(block)) ?? this.#box.appendChild(element("p", { className: "plain" }));
    place.append(this.#tail);
  }
}
