"""`python -m dpo_lightning VERB ...`: a table of verbs, each imported only when it is called."""

import sys
from importlib import import_module

from dpo_lightning.heap import start_anew

#: verb -> (module with a `main()`, what it does)
VERBS: dict[str, tuple[str, str]] = {
    "fit": ("dpo_lightning.training.cli", "train a policy, validate it, export it and draw its curves"),
    "validate": ("dpo_lightning.training.cli", "the validation figures of a checkpoint"),
    "test": ("dpo_lightning.training.cli", "sample from a checkpoint's policy and compare it with the reference"),
    "precompute": ("dpo_lightning.commands.precompute", "the reference's log-probabilities on disk, for many runs"),
    "inspect": ("dpo_lightning.commands.inspect", "what is in the data, what will be cut, what looks wrong"),
    "sweep": (
        "dpo_lightning.commands.sweep",
        "many runs, of a grid or a search: table, figure, best config",
    ),
    "chat": ("dpo_lightning.commands.chat", "a page: talk to a model, see what training changed, vote"),
    "world": ("dpo_lightning.commands.world", "make the built-in world's tokenizer, model and pairs anew"),
    "export": ("dpo_lightning.commands.export", "a checkpoint's policy as a Hugging Face folder"),
}


def usage() -> str:
    """What `--help` prints; it imports neither torch nor lightning."""
    verbs = "\n".join(f"  {verb:10} {what}" for verb, (_, what) in VERBS.items())
    return f"""usage: python -m dpo_lightning VERB [--config FILE ...] [--key value ...]

Direct Preference Optimization on PyTorch Lightning.

verbs:
{verbs}

python -m dpo_lightning VERB --help lists a verb's keys."""


def main() -> int:
    """Dispatch on the first word; returns the exit status."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb not in VERBS:
        print(f"error: there is no verb {verb!r}; expected one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    from dpo_lightning.errors import InputError

    try:
        import_module(VERBS[verb][0]).main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:
        start_anew()
    sys.exit(main())
