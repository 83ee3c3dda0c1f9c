// What was typed and is not with the daemon yet: it outlives a reload. By conversation; "" is the one to come.

const at = (name) => `rkedge.draft.${name}`;

/**
 * text: what is in the field.
 * sent, id: a question on its way.
 * system: the system prompt of a conversation that is not kept yet.
 */
export function read(name) {
  try {
    return JSON.parse(localStorage.getItem(at(name))) ?? {};
  } catch {
    return {};
  }
}

export function keep(name, draft) {
  try {
    if (draft.text || draft.sent || draft.system) localStorage.setItem(at(name), JSON.stringify(draft));
    else localStorage.removeItem(at(name));
  } catch {
    // Storage is off or full: then the draft lasts as long as the page.
  }
}
