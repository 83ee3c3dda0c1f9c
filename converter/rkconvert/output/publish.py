"""Upload a finished bundle to the Hugging Face hub: private by default, and exactly what its manifest lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha1
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rkconvert.output.bundle_folder import CARD, NOTICE
from rkconvert.progress import QUIET, Reporter
from rkconvert.sources.hub import is_hub_id, limit_answers
from rkconvert.tensors.inputs import FileState
from rkruntime.bundle.manifest import MANIFEST, Bundle, Manifest
from rkruntime.errors import BundleError, HostError, OutputError, RKEdgeError, UsageError
from rkruntime.files import read_regular
from rkruntime.packages import install
from rkruntime.yamltext import MAX_FILE

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

# Files that the hub itself creates with a repository.
_THE_HUBS_OWN: Final = (".gitattributes",)
# Largest file read into memory, in bytes: the hub stores these directly, but larger ones by hash in its object store.
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
    """Raise unless this user may write to the repository, before any work is done.

    Args:
        empty: Whether the repository must not contain files.

    Raises:
        UsageError: The name is malformed or not the user's, or the repository is not public or private as requested.
        OutputError: The repository is not empty.
        HostError: Nobody is logged in, the token cannot write, or the hub cannot be reached.
    """
    with _hub(to) as api:
        found = _find(to, api)
        if empty:
            _refuse_files(to, found)


def _check_person(to: Destination, person: dict[str, Any]) -> None:
    name = str(person["name"])
    names = [name, *(str(group["name"]) for group in person.get("orgs") or ())]
    if to.owner not in names:
        raise UsageError(
            f"The hub knows you as {name}, who cannot write to {to.repo}.",
            hint=f"Name a repository of {' or '.join(names)}, or log in as someone else: hf auth login",
        )
    token = (person.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HostError(f"The token of {name} is read-only.", hint=_LOGIN)


def _find(to: Destination, api: HfApi) -> ModelInfo | None:
    """Return the repository as the hub describes it, or None; see `check_destination` for what it raises."""
    from huggingface_hub.errors import RepositoryNotFoundError

    _check_person(to, api.whoami())
    try:
        found = api.model_info(to.repo, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    _check_visibility(to, found)
    return found


def _check_visibility(to: Destination, found: ModelInfo) -> None:
    if bool(found.private) == to.public:
        there, asked = ("private", "public") if to.public else ("public", "private")
        hint = "Leave --public out" if to.public else "Add --public"
        raise UsageError(
            f"{to.repo} exists and is {there}, but {asked} was asked for. Nothing was uploaded.",
            hint=f"{hint}, or name a new repository.",
        )


def _files_of(found: ModelInfo | None) -> dict[str, RepoSibling]:
    """Return the files of a repository by name, without the hub's own."""
    listed = (found.siblings or ()) if found else ()
    return {item.rfilename: item for item in listed if item.rfilename not in _THE_HUBS_OWN}


def _refuse_files(to: Destination, found: ModelInfo | None) -> None:
    if files := _files_of(found):
        raise OutputError(
            f"{to.repo} already contains files ({next(iter(files))}), and nothing is overwritten.",
            hint="Name a new repository.",
        )


def _is_uploaded(bundle: Bundle, found: ModelInfo | None) -> bool:
    """Whether a repository holds exactly this bundle: an earlier run uploaded it."""
    there = _files_of(found)
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

    A repository that already holds exactly this bundle is left as it is: the answer to an earlier upload may have been
    lost on its way.

    Raises:
        BundleError: A file does not match the manifest or changes meanwhile, or the license notes are missing.
        UsageError, OutputError, HostError: See `check_destination`; or the upload failed.
    """
    _check_licence(bundle)
    with _hub(to) as api:
        found = _find(to, api)
        if _is_uploaded(bundle, found):
            reporter.note(f"note: {to.repo} already has exactly this bundle; nothing was uploaded")
            return f"{api.endpoint}/{to.repo}"
        _refuse_files(to, found)
        bundle.verify(trust_stamps=False)
        reporter.note(f"note: {LICENCE_NOTE.format(name=bundle.manifest.name)}")
        return _upload(bundle, to, api, reporter)


def _upload(bundle: Bundle, to: Destination, api: HfApi, reporter: Reporter) -> str:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if reporter.quiet:
        disable_progress_bars()
    before = {name: FileState.of(bundle.path / name) for name in bundle.manifest.files}
    files = _files(bundle)
    url = str(api.create_repo(to.repo, private=not to.public, exist_ok=True))
    # Somebody else may have created it meanwhile, and an organization's rules may say whether it is public.
    created = api.model_info(to.repo)
    _check_visibility(to, created)
    _refuse_files(to, created)
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
    """Return the manifest and the files that it lists, each verified again; small files as the bytes verified.

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
    sizes = {name: item.size for name, item in _files_of(api.model_info(to.repo, files_metadata=True)).items()}
    wrong = sorted(name for name in sizes.keys() | expected.keys() if sizes.get(name) != expected.get(name))
    if wrong:
        raise HostError(
            f"{to.repo} is not what was uploaded: {wrong[0]} differs.",
            hint="Inspect it on the hub; delete the repository and push again.",
        )


@contextmanager
def _hub(to: Destination) -> Iterator[HfApi]:
    """Provide huggingface_hub's client; its errors are raised as UsageError or HostError, without the token."""
    bad_name = UsageError(f"{to.repo!r} is not a repository name.", hint="Write OWNER/NAME, such as me/my-gemma.")
    if not is_hub_id(to.repo):
        raise bad_name
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
    except ImportError as error:
        raise HostError(
            f"To upload to {to.repo}, huggingface_hub is missing.", hint=install("huggingface_hub")
        ) from error
    try:
        validate_repo_id(to.repo)
    except HFValidationError:
        raise bad_name from None
    token = huggingface_hub.get_token()
    if token is None:
        raise HostError(f"Uploading to {to.repo} requires a login to the hub.", hint=_LOGIN)
    if not (token.isascii() and token.isprintable()):
        raise HostError("The token for the hub has characters that no token has.", hint=_LOGIN)
    limit_answers()
    try:
        yield huggingface_hub.HfApi(token=token)
    except RKEdgeError:
        raise
    except Exception as error:  # Its HTTP client has its own errors, and was a different one before 1.0.
        raise _failure(to, error, token) from None


def _failure(to: Destination, error: Exception, token: str) -> HostError:
    """Return the error to raise for one of huggingface_hub's, or for an answer that it did not expect."""
    said = [item for item in (error, error.__cause__) if item is not None]
    answers = [getattr(item, "response", None) for item in said]
    status = next((answer.status_code for answer in answers if answer is not None), 0)
    what = ": ".join(dict.fromkeys(map(_first_line, said))).replace(token, "(token)")
    if not status and isinstance(error, LookupError | TypeError | AttributeError | JSONDecodeError):
        return HostError(
            f"The hub gave an answer about {to.repo} that huggingface_hub cannot read: {what}",
            hint="Check HF_ENDPOINT, HF_TOKEN and the proxy, if any of them is set; or update huggingface_hub.",
        )
    hints = {401: f"The token is no longer valid. {_LOGIN}", 403: f"The token does not permit this. {_LOGIN}"}
    again = f"Check the network; the converted bundle is kept: `rkedge push BUNDLE {to.repo}`."
    return HostError(f"The hub and {to.repo}: {what}", hint=hints.get(status, again))


def _first_line(error: BaseException) -> str:
    """Return an error's first line, and the next one, too, if the first only announces it."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
