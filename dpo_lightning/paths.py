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
        path.lstat()  # a name may be too long to ask for, or have a character that none may have
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, RuntimeError, ValueError) as error:
        short = str(text) if len(str(text)) <= 60 else f"{str(text)[:60]}..."
        why = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise InputError(f"{short}: there can be no file or folder of this name ({why}); write another") from error
    return path
