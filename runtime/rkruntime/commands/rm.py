"""`rkedge rm`: remove a bundle."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import click

from rkruntime.cli.options import bundle_argument
from rkruntime.errors import BundleError, RKEdgeError, UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import say


def _is_served(path: Path) -> bool:
    """Whether the user's daemon in the background was started with this bundle."""
    from rkruntime.background import Background

    background = Background()
    if not background.runs:
        return False
    with suppress(RKEdgeError):
        bundle = background.settings.bundle
        return bundle is not None and os.path.realpath(bundle) == os.path.realpath(path)
    return False


@click.command("rm")
@bundle_argument()
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def run(bundle: Path, yes: bool) -> None:
    """Remove a BUNDLE, a folder or its name, after a question.

    Exactly what its manifest lists is removed. Other files in the folder stay, and so does all that links lead to.
    """
    from rkruntime.bundle.manifest import open_bundle
    from rkruntime.bundle.removal import remove_bundle

    path = bundle.absolute()
    shown = one_line(str(path))
    try:
        opened = open_bundle(path)
    except BundleError as error:
        hint = "Only bundles are removed. What else is in the way is yours to remove, with rm."
        raise BundleError(error.message, hint=hint) from error
    if _is_served(path):
        say("The daemon of `rkedge up` has it loaded, and answers with it until `rkedge down`.", err=True)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{path} was not removed: there is nobody to ask.", hint="Say --yes.")
        if not click.confirm(f"Remove {shown} ({opened.manifest.size_bytes / 1e6:,.1f} MB)?"):
            say("Nothing was removed.")
            return
    if left := remove_bundle(opened):
        say(f"Removed the bundle. {shown} still holds what is not part of it: {one_line(', '.join(left))}.")
    else:
        say(f"Removed {shown}.")
