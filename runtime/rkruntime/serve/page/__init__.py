"""The chat page: the files that the browser loads, and the parser for the Markdown of answers."""
