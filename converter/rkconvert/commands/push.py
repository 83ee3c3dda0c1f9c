"""`rkedge push`: upload a finished bundle to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from rkconvert.commands.options import public_option
from rkconvert.output.publish import Destination, push
from rkconvert.progress import Reporter
from rkruntime.bundle.manifest import open_bundle
from rkruntime.cli.flags import json_option, quiet_option
from rkruntime.cli.options import bundle_argument
from rkruntime.terminal import say, say_json


@click.command("push")
@bundle_argument()
@click.argument("repository")
@public_option()
@json_option()
@quiet_option()
def run(bundle: Path, repository: str, public: bool, as_json: bool, quiet: bool) -> None:
    """Upload a BUNDLE to the REPOSITORY (OWNER/NAME) on the Hugging Face hub.

    Exactly the files in its manifest are uploaded, after their checksums have been verified. The repository must be new
    or empty, or hold exactly this bundle already.
    """
    found = open_bundle(bundle)
    url = push(found, Destination(repository, public), Reporter(quiet))
    if as_json:
        say_json({"url": url, "public": public, "files": [*found.manifest.files]}, indent=None)
    else:
        say(url)
