// What was typed and is not with the daemon yet: it outlives a reload, and the browser. By conversation; "" is the one to
// come. Each tab has its own, and a new one begins with what was typed last in any.

const PLACES = ["sessionStorage", "localStorage"];
const at = (name) => `rkedge.draft.${name}`;

/**
 * text: what is in the field.
 * sent, id: a question on its way.
 * system: the system prompt of a conversation that is not kept yet.
 */
export function read(name) {
  for (const place of PLACES) {
    try {
      const draft = JSON.parse(window[place].getItem(at(name)));
      if (draft) return draft;
    } catch {
      // Storage is off, or somebody else's text is in it.
    }
  }
  return {};
}

export function keep(name, draft) {
  const whole = draft.text || draft.sent || draft.system;
  for (const place of PLACES) {
    try {
      if (whole) window[place].setItem(at(name), JSON.stringify(draft));
      else window[place].removeItem(at(name));
    } catch {
      // Storage is off or full: then the draft lasts as long as the page.
    }
  }
}
