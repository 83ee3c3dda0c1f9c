"""Pages of HTML from the templates beside the modules that fill them."""

from __future__ import annotations

from collections.abc import Callable

import jinja2

from rkruntime.printable import printable


def page_template(package: str, **filters: Callable[..., object]) -> jinja2.Template:
    """The page.html.jinja of a package.

    What is put into it is escaped, and has no control characters; a name that it does not get is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= filters
    return environment.get_template("page.html.jinja")
