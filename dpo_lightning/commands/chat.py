"""`chat`: the page where one talks to a model, sees what training changed and collects preferences."""

import errno
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import auto_cli

from dpo_lightning.data import world
from dpo_lightning.errors import InputError

PAGE = Path(__file__).parents[1] / "ui" / "app.py"


def chat(
    model: str = world.BASE,
    reference: str | None = None,
    runs: Path = Path("runs"),
    votes: Path = Path("votes.jsonl"),
    data: str = world.PAIRS,
    port: int = 8501,
    address: str = "127.0.0.1",
) -> None:
    """Open the page; it ends with Ctrl-C.

    Args:
        model: the folder or hub id of the model to talk to.
        reference: what it is compared with. Default: what its training started from, by its config.yaml.
        runs: the folder whose runs are offered.
        votes: the file that votes are appended to, which `fit` takes as `data.source`.
        data: the source that is looked at first, as `data.source` of a fit.
        port: where the page is served.
        address: who may see it: 127.0.0.1 this machine alone, 0.0.0.0 everyone who reaches it.
    """
    if find_spec("streamlit") is None:
        raise InputError("the page needs streamlit; install it with `pip install dpo-lightning[ui]`")
    from dpo_lightning.models.checkpoint import load_config

    for name in filter(None, (model, reference)):
        load_config(name)
    check_place(address, port)
    words = ["-m", "streamlit", "run", str(PAGE), "--server.port", str(port), "--server.address", address]
    options = {"model": model, "reference": reference, "runs": runs, "votes": votes, "data": data}
    told = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    sys.stdout.flush()
    # In this process's place: who ends it ends the server.
    os.execv(sys.executable, [sys.executable, *words, "--", *told])


def check_place(address: str, port: int) -> None:
    """Raises InputError unless a page can be served there."""
    if not 0 < port < 65536:
        raise InputError(f"--port {port}: ports are numbered from 1 to 65535")
    try:
        [(family, kind, _, _, place), *_] = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = port + 1 if port < 65535 else port - 1
            raise InputError(f"port {port} of {address} is taken; give another, such as --port {free}") from error
        if error.errno == errno.EACCES:
            raise InputError(
                f"port {port} is not open to this user; give one above 1023, such as --port 8501"
            ) from error
        raise InputError(
            f"--address {address}: this machine has no such address ({error}); give 127.0.0.1 or 0.0.0.0"
        ) from error


def main() -> None:
    """Run the verb of the command line."""
    auto_cli(chat, args=sys.argv[2:], as_positional=False)
