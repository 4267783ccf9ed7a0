"""Whether the hub can be asked for a model: once, and not for the 20 s and more in which a download asks again."""

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from dpo_lightning.errors import InputError

#: What each model of the hub has.
FILE = "config.json"


def is_cached(repository: str) -> bool:
    """Whether a model of the hub is in the cache, its configuration at least."""
    try:
        return isinstance(try_to_load_from_cache(repository, FILE), str)
    except ValueError:  # no name of a repository
        return False


def answers(repository: str) -> bool:
    """Whether the hub says anything when it is asked for a model, even that there is none."""
    try:
        get_hf_file_metadata(hf_hub_url(repository, FILE))
    except (HfHubHTTPError, ValueError):
        return True
    except (OSError, HTTPError):
        return False
    return True


def check_reachable(repository: str) -> None:
    """Raises InputError where a model is not in the cache, and the hub does not answer."""
    if not is_cached(repository) and not answers(repository):
        raise InputError(
            f"{repository}: there is no such folder, and the hub, which may have a model of this name, cannot be "
            "reached; check the name and the network"
        )
