"""Upload a finished bundle to the Hugging Face hub: private by default, and exactly what its manifest lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rkconvert.output.bundle_folder import CARD, NOTICE
from rkconvert.progress import QUIET, Reporter
from rkconvert.sources.hub import is_hub_id
from rkconvert.tensors.inputs import FileState
from rkruntime.bundle.manifest import MANIFEST, Bundle, Manifest
from rkruntime.errors import BundleError, HostError, OutputError, RKEdgeError, UsageError
from rkruntime.files import read_regular
from rkruntime.packages import install
from rkruntime.yamltext import MAX_FILE

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoSibling

# The hub itself creates these with a repository.
_THE_HUBS_OWN: Final = (".gitattributes",)
# The hub stores smaller files directly; larger ones go to its object store by hash.
_IN_MEMORY: Final = 10 << 20
_LOGIN: Final = "Create a token with write access at https://huggingface.co/settings/tokens, then `hf auth login`."
LICENCE_NOTE: Final = (
    "{name} is derived from Gemma: whoever receives it must also receive the Gemma Terms of Use, and be bound by them"
    " (https://ai.google.dev/gemma/terms). Its " + f"{CARD} and {NOTICE} say so."
)


@dataclass(frozen=True)
class Destination:
    """A model repository, `OWNER/NAME`, created if it does not exist."""

    repo: str
    public: bool = False

    @property
    def owner(self) -> str:
        """The user or organization."""
        return self.repo.partition("/")[0]


def check_destination(to: Destination, *, empty: bool = True) -> None:
    """Raise unless this user may write there, before any work is done.

    Args:
        empty: Whether it must not contain files.

    Raises:
        UsageError: The name is malformed or not the user's, or the repository is not public or private as requested.
        OutputError: The repository is not empty.
        HostError: Nobody is logged in, the token cannot write, or the hub cannot be reached.
    """
    if not is_hub_id(to.repo):
        raise UsageError(f"{to.repo!r} is not a repository name.", hint="Write OWNER/NAME, such as me/my-gemma.")
    with _hub(to.repo) as api:
        person = api.whoami()
        _check_person(to, person)
        _check_repository(to, api, empty)


def _check_person(to: Destination, person: dict[str, Any]) -> None:
    name = str(person.get("name"))
    names = [name, *(str(group.get("name")) for group in person.get("orgs") or ())]
    if to.owner not in names:
        raise UsageError(
            f"The hub knows you as {name}, who cannot write to {to.repo}.",
            hint=f"Name a repository of {' or '.join(names)}, or log in as someone else: hf auth login",
        )
    token = (person.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HostError(f"The token of {name} is read-only.", hint=_LOGIN)


def _check_repository(to: Destination, api: HfApi, empty: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(to.repo)
    except RepositoryNotFoundError:
        return
    if bool(found.private) == to.public:
        there, asked = ("private", "public") if to.public else ("public", "private")
        hint = "Leave --public out" if to.public else "Add --public"
        raise UsageError(
            f"{to.repo} exists and is {there}, but {asked} was asked for.", hint=f"{hint}, or name a new repository."
        )
    there_already = [item.rfilename for item in found.siblings or () if item.rfilename not in _THE_HUBS_OWN]
    if there_already and empty:
        raise OutputError(
            f"{to.repo} already contains files ({there_already[0]}), and nothing is overwritten.",
            hint="Name a new repository.",
        )


def is_uploaded(bundle: Bundle, to: Destination) -> bool:
    """Whether the repository holds exactly this bundle: an earlier run uploaded it. Raises as `push` does."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with _hub(to.repo) as api:
        try:
            listed = api.model_info(to.repo, files_metadata=True).siblings or ()
        except RepositoryNotFoundError:
            return False
    there = {item.rfilename: item for item in listed if item.rfilename not in _THE_HUBS_OWN}
    if there.keys() != {*bundle.manifest.files, MANIFEST}:
        return False
    bundle.verify(trust_stamps=False)
    return all(_holds(there[file.path_in_repo], file) for file in _files(bundle))


def _holds(there: RepoSibling, file: CommitOperationAdd) -> bool:
    """Whether a file on the hub has these bytes, by the hash that it is stored under."""
    if there.lfs is not None:
        return there.lfs.sha256 == file.upload_info.sha256.hex()
    data = file.path_or_fileobj
    if not isinstance(data, bytes):
        return False
    return there.blob_id == sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def push(bundle: Bundle, to: Destination, reporter: Reporter = QUIET) -> str:
    """Upload a bundle in one commit, and verify the hub's list against the manifest; returns the repository's URL.

    Raises:
        BundleError: A file does not match the manifest or changes meanwhile, or the licence notes are missing.
        UsageError, OutputError, HostError: See `check_destination`; or the upload failed.
    """
    check_destination(to)
    _check_licence(bundle)
    bundle.verify(trust_stamps=False)
    reporter.note(f"note: {LICENCE_NOTE.format(name=bundle.manifest.name)}")
    with _hub(to.repo) as api:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if reporter.quiet:
            disable_progress_bars()
        before = {name: FileState.of(bundle.path / name) for name in bundle.manifest.files}
        files = _files(bundle)
        url = str(api.create_repo(to.repo, private=not to.public, exist_ok=True))
        message = f"Upload {bundle.manifest.name} ({bundle.manifest.created_by})"
        api.create_commit(to.repo, files, commit_message=message)
        _compare({file.path_in_repo: file.upload_info.size for file in files}, to, api)
    for file in files:
        name = file.path_in_repo
        if not isinstance(file.path_or_fileobj, bytes) and FileState.of(bundle.path / name) != before[name]:
            raise BundleError(
                f"{bundle.path / name} changed while it was uploaded, so {to.repo} may contain something else.",
                hint="Delete the repository on the hub, then push again.",
            )
    return url


def _files(bundle: Bundle) -> list[CommitOperationAdd]:
    """The manifest and the files that it lists, each verified again; small files as the bytes verified.

    The folder is not locked: a verified path may be another file, or a link, by the time the client reads it.
    """
    from huggingface_hub import CommitOperationAdd

    try:
        files = []
        for name, record in bundle.manifest.files.items():
            path = bundle.path / name
            small = record.size <= _IN_MEMORY
            file = CommitOperationAdd(name, read_regular(path, record.size) if small else path)
            if file.upload_info.sha256.hex() != record.sha256:
                raise _changed(path)
            files.append(file)
        manifest = read_regular(bundle.path / MANIFEST, MAX_FILE)
        if Manifest.from_yaml(manifest.decode()) != bundle.manifest:
            raise _changed(bundle.path / MANIFEST)
    except (OSError, UnicodeDecodeError) as error:
        raise _changed(bundle.path) from error
    return [*files, CommitOperationAdd(MANIFEST, manifest)]


def _changed(path: Path) -> BundleError:
    return BundleError(f"{path} changed after it was verified. Nothing was uploaded.", hint="Convert again, then push.")


def _check_licence(bundle: Bundle) -> None:
    for name in (CARD, NOTICE):
        if name not in bundle.manifest.files:
            raise BundleError(
                f"The bundle {bundle.path} has no {name}, which informs others about Gemma's terms of use.",
                hint="Convert it again with this release of rkedge.",
            )


def _compare(expected: Mapping[str, int], to: Destination, api: HfApi) -> None:
    """Raise HostError unless the hub lists exactly these files with these sizes."""
    listed = api.model_info(to.repo, files_metadata=True).siblings or ()
    sizes = {item.rfilename: item.size for item in listed if item.rfilename not in _THE_HUBS_OWN}
    wrong = sorted(name for name in sizes.keys() | expected.keys() if sizes.get(name) != expected.get(name))
    if wrong:
        raise HostError(
            f"{to.repo} is not what was uploaded: {wrong[0]} differs.",
            hint="Inspect it on the hub; delete the repository and push again.",
        )


@contextmanager
def _hub(repo: str) -> Iterator[HfApi]:
    """Provide huggingface_hub's client; its errors are raised as HostError, without the token."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise HostError(f"To upload to {repo}, huggingface_hub is missing.", hint=install("huggingface_hub")) from error
    token = huggingface_hub.get_token()
    if token is None:
        raise HostError(f"Uploading to {repo} requires a login to the hub.", hint=_LOGIN)
    try:
        yield huggingface_hub.HfApi(token=token)
    except RKEdgeError:
        raise
    except Exception as error:  # Its HTTP client has its own errors, and was a different one before 1.0.
        said = [item for item in (error, error.__cause__) if item is not None]
        answers = [getattr(item, "response", None) for item in said]
        status = next((answer.status_code for answer in answers if answer is not None), 0)
        what = ": ".join(str(item).strip().partition("\n")[0] or type(item).__name__ for item in said)
        hints = {401: f"The token is no longer valid. {_LOGIN}", 403: f"The token does not permit this. {_LOGIN}"}
        hint = hints.get(status, "Check the network; the converted bundle is kept: `rkedge push BUNDLE OWNER/NAME`.")
        raise HostError(f"The hub and {repo}: {what.replace(token, '(token)')}", hint=hint) from None
