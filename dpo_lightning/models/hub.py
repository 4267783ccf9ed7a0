"""From a folder to a repository of the Hugging Face Hub: access looked at before any work, one commit for all files."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from dpo_lightning.errors import InputError
from dpo_lightning.models.card import CURVES

#: Files of an earlier push that would be a second model beside the new one, if the new one has no such files.
STALE = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors|adapter_config\.json"
    rf"|chat_template\.jinja|{re.escape(CURVES)}"
)

#: Where the hub looks for TensorBoard's files, which it then shows.
LOGS = "runs"

#: What is raised where a connection breaks off, by huggingface_hub's own client or below it.
UNREACHED = (OSError, HTTPError)

#: How often an upload is begun, and seconds between a try and the next one; what arrived before is not sent again.
TRIES, WAIT = 3, 5.0


def check_access(repository: str, private: bool | None, card: Callable[[], str] | None = None) -> str:
    """Create the repository if need be, and see that it may be written to, before any work is done for it.

    Args:
        repository: as USER/NAME, or NAME alone, which is the token's owner's.
        private: who may see it, if it is created; null is the owner's default.
        card: gives a README.md of the metadata that it will have, once it is known that there is a hub.

    Returns:
        its full name.

    Raises:
        InputError: without a token, with one that the hub refuses or that may not write there, for a name that is none,
            for a repository that others can see though a private one was asked for, for a card that the hub does not
            take, and without a connection.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError("push_to_hub needs the hub, but HF_HUB_OFFLINE is set; unset it, or leave out push_to_hub")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"push_to_hub {repository} is no name of a repository: {plain(error)}") from None
    token = get_token()
    if token is None:
        raise InputError(
            "push_to_hub needs an access token, and there is none; make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens, then run `hf auth login` or set HF_TOKEN"
        )
    if not (token.isascii() and token.isprintable()):
        raise InputError("the access token has characters that no token has; copy it again, whole, into HF_TOKEN")
    api = HfApi()
    with in_words("the hub does not accept the access token; `hf auth login` or HF_TOKEN gives it another", 401, 403):
        owner = api.whoami()["name"]
    if card is not None:
        check_card(card())
    name = repository if "/" in repository else f"{owner}/{repository}"
    refused = f"the access token, of {owner}, may not write to {name}; take a token or a name that may"
    with in_words(refused, 401, 403, 404):
        api.create_repo(name, private=private, exist_ok=True)
        api.auth_check(name, write=True)
        found = api.repo_info(name)
    if private is not None and bool(found.private) != private:
        raise InputError(
            f"{name} is there already and is {'private' if found.private else 'public'}, but private is "
            f"{str(private).lower()}; change it on {constants.ENDPOINT}/{name}/settings, or leave out private"
        )
    return name


def check_card(card: str) -> None:
    """Raises InputError if the hub does not take a card's metadata, such as a licence that it does not know."""
    address = f"{constants.ENDPOINT}/api/validate-yaml"
    with in_words("the hub looks at no model card"):
        answer = get_session().post(address, json={"content": card, "repoType": "model"}, headers=build_hf_headers())
        if answer.status_code == 400:
            faults = "; ".join(str(fault.get("message")) for fault in answer.json().get("errors", []))
            raise InputError(f"the hub does not take the model card: {faults}; change license, or what it names")
        hf_raise_for_status(answer)


def push(folder: Path, repository: str, message: str, again: str, logs: Mapping[str, Path] | None = None) -> str:
    """Upload a folder in one commit, so that the repository is never half of a model; again it is an update.

    An upload that breaks off is begun again; what had arrived is not sent a second time.

    Args:
        folder: an export.
        repository: as `check_access` gave it.
        message: of the commit.
        again: the command that a person may try later.
        logs: TensorBoard's files that go along, by their places below `runs`.

    Returns:
        the address.

    Raises:
        InputError: if it cannot be uploaded, with what to do then.
    """
    api = HfApi()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files |= {f"{LOGS}/{place}": path for place, path in (logs or {}).items()}
    before = None
    for attempt in range(1, TRIES + 1):
        try:
            there = api.repo_info(repository)
            before = before or there.sha
            if there.sha != before:  # the commit was made, and only its answer was lost
                break
            names = [file.rfilename for file in there.siblings or []]
            stale = [name for name in names if name not in files and STALE.fullmatch(name)]
            operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
            deletions = [CommitOperationDelete(name) for name in stale]
            api.create_commit(repository, [*operations, *deletions], commit_message=message)
            break
        # RuntimeError: in which the client wraps what cut a large file; ValueError: of a card that the hub refuses.
        except (*UNREACHED, RuntimeError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            if attempt == TRIES or refused(cause):
                raise InputError(
                    f"the upload to {repository} failed ({plain(cause)}); {folder} is whole, push it with `{again}`"
                ) from error
            print(f"The upload broke off ({plain(cause)}); it is begun again.", flush=True)
            time.sleep(WAIT)
    return f"{constants.ENDPOINT}/{repository}"


def refused(error: BaseException) -> bool:
    """Whether the hub has said no, which it will say again."""
    if not isinstance(error, HfHubHTTPError):
        return isinstance(error, ValueError)
    return 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 409, 429)


@contextmanager
def in_words(sentence: str, *statuses: int) -> Iterator[None]:
    """Raises InputError for what goes wrong with the hub.

    Args:
        sentence: what an answer of one of `statuses` means.
    """
    try:
        yield
    except InputError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code in statuses:
            raise InputError(f"{sentence} ({plain(error)})") from error
        raise InputError(f"the hub, {constants.ENDPOINT}, answers: {plain(error)}") from error
    except UNREACHED as error:
        raise InputError(f"the hub, {constants.ENDPOINT}, cannot be reached: {plain(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{constants.ENDPOINT} does not answer as a hub does ({plain(error)}); is HF_ENDPOINT right?"
        ) from error


def plain(error: BaseException) -> str:
    """What an error says, on one line, without the access token."""
    said = " ".join(str(error).split()) or type(error).__name__
    token = get_token()
    return said.replace(token, "***") if token else said
