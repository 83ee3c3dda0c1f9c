// Drafts: texts that were typed but are not with the daemon yet, by conversation ("" for a new one). They survive a
// reload and a restart of the browser. Each tab has its own; a new tab begins with the one typed last in any tab.

const PLACES = ["sessionStorage", "localStorage"];
const at = (name) => `rkedge.draft.${name}`;

/**
 * text: the field's text.
 * sent, id: a question on its way to the daemon.
 * system: the system prompt of a conversation that the daemon does not have yet.
 */
export function read(name) {
  for (const place of PLACES) {
    try {
      const draft = JSON.parse(window[place].getItem(at(name)));
      if (draft) return draft;
    } catch {
      // Storage is off, or the item is not ours.
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
      // Storage is off or full: the draft then lasts as long as the page.
    }
  }
}
