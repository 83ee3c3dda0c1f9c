// Small helpers for elements.

export const byId = (id) => document.getElementById(id);

/** Make an element with properties and children; strings become text, never markup. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function button(label, pressed) {
  const made = element("button", { type: "button" }, label);
  made.addEventListener("click", pressed);
  return made;
}

/** Make a button that copies the result of `text`. */
export function copyButton(text) {
  const made = button("Copy", async () => {
    const copied = await copy(text());
    made.textContent = copied ? "Copied" : "Not copied";
    speak(copied ? "Copied." : "The browser did not let it be copied.");
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
  return made;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without the clipboard API, as on pages that are neither local nor encrypted, only the old way is left.
    const field = element("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    return copied;
  }
}

/** Have a screen reader say a text. */
export function speak(text) {
  const log = byId("spoken");
  log.append(element("p", {}, text));
  if (log.childElementCount > 9) log.firstChild.remove();
}

/** Show a dialog; resolves to its first field's value when it is submitted, or to null. */
export function ask(dialog, value = "") {
  const form = dialog.querySelector("form");
  const field = form.querySelector("textarea, input");
  if (field) field.value = value;
  dialog.showModal();
  return new Promise((resolve) => {
    const done = new AbortController();
    const end = (result) => {
      done.abort();
      dialog.close();
      resolve(result);
    };
    const { signal } = done;
    form.addEventListener("submit", (event) => { event.preventDefault(); end(field?.value ?? ""); }, { signal });
    form.querySelector("[value=cancel]")?.addEventListener("click", () => end(null), { signal });
    dialog.addEventListener("close", () => end(null), { signal });
  });
}
