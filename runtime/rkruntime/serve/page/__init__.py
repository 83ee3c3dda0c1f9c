"""The chat page: what the browser loads, and the Markdown of answers read for it."""
