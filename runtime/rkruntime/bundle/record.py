"""Records that a bundle keeps as JSON, each with a schema. They are untrusted, like the rest of a bundle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

from rkruntime.errors import BundleError
from rkruntime.schema import Length, build

_Kind = TypeVar("_Kind", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base class of records. The default of `schema` is the only value that this release reads."""

    schema: Annotated[str, Length(64)] = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the contents as JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"schema": plain.pop("schema"), **plain}

    @classmethod
    def from_json(cls: type[_Kind], data: bytes, where: object) -> _Kind:
        """Parse and check a file.

        Raises:
            BundleError: The record is invalid; the message names `where` it is and the key that is wrong.
        """
        try:
            plain = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where} is not JSON: {str(error)[:200]}.") from error
        found = plain.get("schema") if isinstance(plain, dict) else type(plain).__name__
        if found != cls.schema:
            raise BundleError(
                f"{where} has the schema {str(found)[:80]!r}; this release reads {cls.schema!r}.",
                hint="Use the release of rkedge that made this bundle, or convert it again.",
            )
        made = build(cls, plain, lambda what: BundleError(f"{where}: {what}."))
        if problem := made.problem():
            raise BundleError(f"{where}: {problem}.")
        return made

    def problem(self) -> str:
        """Say what is wrong beyond the types of single fields; empty if nothing is."""
        return ""
