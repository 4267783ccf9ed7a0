"""The house: six rooms, one direction of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_lightning

PACKAGE = Path(dpo_lightning.__file__).parent

#: Rooms, each of which may import from those before it, and the modules of a room, likewise.
ROOMS: dict[str, tuple[str, ...]] = {
    "objective": ("logps", "divergences", "preference", "transport", "likelihoods", "sums", "losses", "metrics"),
    "data": (
        *("world", "oracle", "preference", "conversations", "rankings", "formats", "chat", "sources"),
        *("tails", "words", "tokenization"),
        *("compiler", "splits", "batching", "mixing", "packing", "pairs", "streams", "tables"),
        *("checks", "datamodule", "findings", "characters", "token_checks", "inspection", "advice"),
    ),
    "models": (
        *(
            "adapters",
            "varlen",
            "products",
            "attention",
            "layers",
            "recomputation",
            "policy",
            "reach",
            "checkpoint",
            "generation",
            "narrowing",
            "reference",
        ),
        *("sharding", "cache", "cached", "card", "export", "hub"),
    ),
    "training": (
        "options",
        "allocator",
        "curves",
        "comparison",
        "diagnosis",
        "start",
        "window",
        "memory",
        "footprint",
        "schedule",
        "module",
        "memory_check",
        "samples",
        "callbacks",
        "publication",
        "pair_ledger",
        "sharded",
        "world",
        "cli",
    ),
    "commands": (
        *("export", "world"),
        *("points", "grid", "preflight", "runs", "pool", "proposals", "tpe", "pictures", "outcome", "sweep"),
        *("report", "inspect", "precompute", "chat"),
    ),
    "ui": ("options", "voice", "training", "look", "models", "votes", "chat", "compare", "runs", "data", "app"),
}
ORDER = [f"dpo_lightning.{room}.{module}" for room, modules in ROOMS.items() for module in modules]


def imports(path: Path) -> set[str]:
    """The dpo_lightning modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            room = str(node.module).removeprefix("dpo_lightning.")  # `from dpo_lightning.data import world`
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if room in ROOMS else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("dpo_lightning")}


def test_every_module_is_named_in_the_order() -> None:
    found = {
        f"dpo_lightning.{path.parent.name}.{path.stem}"
        for room in ROOMS
        for path in (PACKAGE / room).glob("*.py")
        if path.stem != "__init__"
    }
    assert found == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_before_it(module: str) -> None:
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    allowed = {*ORDER[: ORDER.index(module)], "dpo_lightning.errors", "dpo_lightning.paths"}
    assert imports(path) <= allowed


def test_the_objective_room_imports_nothing_but_torch_and_torchmetrics() -> None:
    for path in (PACKAGE / "objective").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in {name.partition(".")[0] for name in names}:
                assert top in {"torch", "torchmetrics", "dpo_lightning"} | sys.stdlib_module_names, (path, top)


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import runpy, sys; sys.argv = ['dpo_lightning', '--help']\n"
        "try: runpy.run_module('dpo_lightning', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert "fit" in done.stdout and "validate" in done.stdout
