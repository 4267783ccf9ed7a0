"""Which models the page talks to: loaded once for all its visitors, chosen in the sidebar."""

from dataclasses import dataclass
from pathlib import Path

import streamlit as st
from transformers import PreTrainedConfig

from dpo_lightning.data import world
from dpo_lightning.errors import InputError
from dpo_lightning.models.checkpoint import context_length, is_hub_id, load_config, located
from dpo_lightning.models.reach import check_reachable
from dpo_lightning.paths import path_of
from dpo_lightning.ui.options import Options
from dpo_lightning.ui.voice import CONTEXT, Message, Sampling, Voice, option, reference_of

#: Models that stay loaded; the one that was asked for longest ago goes first.
KEPT = 3


@dataclass(frozen=True)
class Chosen:
    """What the sidebar says: two models by name, how answers are drawn, and how the policy is addressed."""

    policy: str
    reference: str
    sampling: Sampling
    system: str
    dialogue: bool

    @property
    def longest(self) -> int:
        """Tokens that an answer may have."""
        return self.sampling.max_new_tokens

    @property
    def system_message(self) -> list[Message]:
        """The system prompt as the first message, if there is one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def remark(self, policy: Voice) -> str:
        """What the policy does not do with what was chosen; nothing if it does it all."""
        if policy.templated or self.dialogue:
            return ""
        alone = "each question stands alone, without what was said before"
        return f"This model has no chat template: {alone}{', and without the system prompt' if self.system else ''}."


def voice(name: str) -> Voice:
    """The model of a name, loaded if it is not yet, or is not what it was.

    Raises:
        InputError: if there is none, or none any more.
    """
    config_of(name)
    return loaded(name, state_of(name))


def config_of(name: str) -> PreTrainedConfig:
    """A model's configuration, without waiting for a hub that does not answer.

    Raises:
        InputError: if there is no such model.
    """
    if is_hub_id(name):
        check_reachable(name)
    return load_config(name)


@st.cache_resource(max_entries=KEPT, show_spinner="Loading the model ...")
def loaded(name: str, state: tuple[tuple[str, int, int], ...]) -> Voice:
    """The model of a name, once for each state of its files."""
    found = Voice(name)
    print(f"Loaded {name}", flush=True)
    return found


def state_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of a folder's files: other files are another model. Empty for a hub id."""
    folder = path_of(located(name))
    if not folder.is_dir():
        return ()
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def exports(runs: Path) -> list[str]:
    """Models that the runs of a folder have exported, the latest first."""
    found = [config.parent for config in runs.rglob("export/config.json")] if runs.is_dir() else []
    return [str(folder) for folder in sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)]


def choose(options: Options, runs: Path) -> Chosen:
    """The sidebar. What is chosen stays until it is changed; the model is part of the address.

    Args:
        options: of the command line.
        runs: the folder whose exports are offered.
    """
    with st.sidebar:
        names = list(dict.fromkeys([options.model, *exports(runs), world.BASE]))
        policy = st.selectbox(
            "Model",
            names,
            accept_new_options=True,
            help="A folder in Hugging Face format or a hub id; type any other.",
            key="model",
            bind="query-params",
        )
        policy = (policy or options.model).strip()
        known = options.reference if options.reference and policy == options.model else reference_of(policy)
        others = list(dict.fromkeys([known, world.BASE, *names]))
        reference = st.selectbox(
            "Reference",
            others,
            accept_new_options=True,
            help="What it is compared with: what training started from.",
            key=f"reference of {policy}",
            persist_state="session",
        )
        temperature = st.slider("Temperature", 0.0, 2.0, 0.7, 0.05, help="0 takes the likeliest token each time.")
        top_p = st.slider("Top-p", 0.05, 1.0, 1.0, 0.05, help="Drawn from the likeliest tokens of this share.")
        context = context_of(policy)
        longest = st.number_input(
            "Longest answer, in tokens",
            1,
            context - 1,
            min(256, context // 2),
            key=f"length {policy}",
            persist_state="session",
            help=f"The model reads {context:,} tokens, question and answer together.",
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, help="The same seed and prompt give the same answer.")
        system = st.text_area("System prompt", "", placeholder="None", height=68)
        dialogue = st.toggle(
            "Human and Assistant",
            is_dialogue(policy),
            key=f"dialogue {policy}",
            persist_state="session",
            help="For a model without a chat template: write the prompt as Anthropic's HH data does, with the history. "
            "Without it each question stands alone.",
        )
    sampling = Sampling(temperature, top_p, int(longest), int(seed))
    return Chosen(policy, (reference or known).strip(), sampling, system.strip(), dialogue)


def context_of(name: str) -> int:
    """Tokens that a model reads; 512 where there is no such model."""
    try:
        return max(2, context_length(config_of(name)) or CONTEXT)
    except InputError:
        return 512


def is_dialogue(name: str) -> bool:
    """Whether a model was trained on HH data, by the names of its sources."""
    source = option(name, "data", "source") or ""
    return any(part in str(source).lower() for part in ("rm-static", "rm-single-context", "hh-rlhf", "hh-helpful"))
