"""Pages of HTML from the templates beside the modules that fill them."""

from __future__ import annotations

from collections.abc import Callable

import jinja2

from rkruntime.printable import printable


def page_template(package: str, **filters: Callable[..., object]) -> jinja2.Template:
    """Load the page.html.jinja of a package.

    Values put into it are escaped, and lose control characters; a name without a value is an error.
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
