"""A source that changes while it is read ends the work, whatever reads it and however it changes."""

from __future__ import annotations
