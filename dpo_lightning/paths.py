"""Paths as people type them."""

from pathlib import Path

from dpo_lightning.errors import InputError


def path_of(text: str | Path) -> Path:
    """The path of a text; `~` is a home folder.

    Raises:
        InputError: if the text cannot be the name of a file or folder.
    """
    try:
        path = Path(text).expanduser()
        path.exists()  # a name may be too long to ask for
    except (OSError, RuntimeError, ValueError) as error:
        short = str(text) if len(str(text)) <= 60 else f"{str(text)[:60]}..."
        raise InputError(f"{short}: there can be no file or folder of this name ({error}); write another") from error
    return path
