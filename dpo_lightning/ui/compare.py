"""The page where policy and reference answer side by side, are scored by each other, and voted on."""

import random
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import streamlit as st

from dpo_lightning.data.inspection import pieces
from dpo_lightning.errors import InputError
from dpo_lightning.ui.look import END, EVERY, WAITING, legend, said, shaded, show, small
from dpo_lightning.ui.models import Chosen, voice
from dpo_lightning.ui.training import FEWEST, training_command
from dpo_lightning.ui.voice import Sampling, Voice, beta_of, check_same_tokens
from dpo_lightning.ui.votes import Answered, cast, record

#: Where a visit keeps the comparison that stands there, the one that is being answered, and the prompt's field.
COMPARED, ASKING, PROMPT = "compared", "compare asking", "compare prompt"

NAMES = ("policy", "reference")


@dataclass
class Asking:
    """A prompt and what has come of both answers.

    Attributes:
        question: the prompt as it was written.
        prompt: as the models read it.
        models: the policy's name and the reference's.
        sampling: how answers are drawn, by model.
        order: which answer stands left, and which right.
        turns: who answers first; not told by `order`, since who watches would know whose answer grows first.
        blind: whether whose they are is hidden until the vote.
        ids: of each answer, as far as it has come.
    """

    question: str
    prompt: str
    models: tuple[str, str]
    sampling: tuple[Sampling, Sampling]
    order: tuple[int, int] = (0, 1)
    turns: tuple[int, int] = (0, 1)
    blind: bool = False
    ids: list[np.ndarray] = field(default_factory=lambda: [np.array([], dtype=np.int64)] * 2)


@dataclass
class Compared:
    """A prompt, an answer of each model, and what both think of each answer.

    Attributes:
        asked: the prompt, and how it was asked.
        answered: the texts, the policy's first.
        pieces: the text of each token, by answer.
        cuts: how an answer ended, if not by itself.
        logps: by model, by answer: log-probability of each token.
        beta: what rewards are multiplied with.
        voted: where the vote went; None before it.
    """

    asked: Asking
    answered: Answered
    pieces: tuple[list[str], list[str]]
    cuts: tuple[str, str]
    logps: list[list[np.ndarray]]
    beta: float
    voted: Path | None = None

    @property
    def hidden(self) -> bool:
        """Whether whose answers they are is not told yet."""
        return self.asked.blind and self.voted is None


def page(chosen: Chosen, votes: Path, runs: Path) -> None:
    """Prompt, both answers, what they are worth, and the vote.

    Args:
        chosen: both models.
        votes: the file that votes go to.
        runs: the folder that a run on these votes goes into.
    """
    state = st.session_state
    st.header("Compare", anchor=False)
    policy = voice(chosen.policy)
    try:
        reference = voice(chosen.reference)
        check_same_tokens(policy, reference)
    except InputError as error:
        raise InputError(f"{error}. Choose another reference in the sidebar.") from error
    if chosen.policy == chosen.reference:
        st.caption("The policy is the reference itself: its second answer is drawn with the next seed.")
    if remark := chosen.remark(policy):
        st.caption(remark)
    with st.form("compare", border=False):
        question = st.text_area(
            "Prompt", placeholder="What does an electrician do?", height=80, key=PROMPT, persist_state="session"
        )
        left, right = st.columns([1, 3], vertical_alignment="center")
        asked = left.form_submit_button("Answer", type="primary", width="stretch")
        blind = right.checkbox(
            "Blind: shuffled, and whose they are is told after the vote", key="compare blind", persist_state="session"
        )
    if asked and not question.strip():
        st.warning("The prompt is empty; write something.")
    elif asked:
        asking = ask(policy, question, chosen, blind)  # raises before anything is lost
        state[ASKING] = asking
        stream(asking, (policy, reference))
        st.rerun()
    if (asking := state.pop(ASKING, None)) is not None:
        if all(map(len, asking.ids)):
            state[COMPARED] = scored(asking)
        else:
            st.info("Stopped before both had answered.")
    compared: Compared | None = state.get(COMPARED)
    if compared is not None:
        answers(compared)
        vote(compared, votes, runs)


def ask(policy: Voice, question: str, chosen: Chosen, blind: bool) -> Asking:
    """A comparison that can be answered.

    Raises:
        InputError: if the prompt does not fit.
    """
    text = policy.text([*chosen.system_message, {"role": "user", "content": question}], chosen.dialogue)
    policy.ids(text, chosen.longest)
    same = chosen.policy == chosen.reference
    second = replace(chosen.sampling, seed=chosen.sampling.seed + same)
    asking = Asking(question, text, (chosen.policy, chosen.reference), (chosen.sampling, second))
    if blind:
        order, turns = (tuple(random.sample((0, 1), 2)) for _ in range(2))
        asking = replace(asking, order=order, turns=turns, blind=True)
    return asking


def stream(asking: Asking, voices: tuple[Voice, Voice]) -> None:
    """Both models answer, in two columns; what has come is kept in `asking` wherever it ends."""
    show(said(asking.question))
    places = {}
    for place, (column, number) in enumerate(zip(st.columns(2), asking.order, strict=True)):
        with column.container(border=True):
            title(asking, place, number, asking.blind)
            places[number] = st.empty()
    with st.empty():
        st.button("Stop", icon=":material/stop:", key="stop comparing")
        for number in asking.turns:
            prompt = voices[number].ids(asking.prompt, asking.sampling[number].max_new_tokens)
            with closing(voices[number].stream(prompt, asking.sampling[number], EVERY)) as coming:
                for ids in coming:
                    if not len(ids):
                        places[number].html(WAITING)
                        continue
                    asking.ids[number] = ids
                    places[number].html(said(voices[number].decode(ids)))


def scored(asking: Asking) -> Compared:
    """Both models score both answers."""
    voices = [voice(name) for name in asking.models]
    policy = voices[0]
    prompt = policy.ids(asking.prompt, max(map(len, asking.ids)))
    first, second = asking.ids
    logps = [model.token_logps(prompt, (first, second)) for model in voices]
    texts = (policy.decode(first), policy.decode(second))
    cuts = tuple(policy.cut(ids, sampling) for ids, sampling in zip(asking.ids, asking.sampling, strict=True))
    spelled = tuple(spell(policy, ids) for ids in asking.ids)
    answered = Answered(asking.prompt, texts, asking.models, tuple(map(bool, cuts)))
    return Compared(asking, answered, spelled, cuts, logps, beta_of(asking.models[0]))


def spell(model: Voice, ids: np.ndarray) -> list[str]:
    """The text of each token; EOS as a sign."""
    spelled = pieces(model.tokenizer, ids.tolist())
    if len(ids) and ids[-1] == model.tokenizer.eos_token_id:
        spelled[-1] = f" {END}"
    return spelled


def title(asking: Asking, place: int, number: int, hidden: bool) -> None:
    """Over an answer: its letter, and whose it is unless that is still hidden."""
    name = f"Answer {'AB'[place]}"
    st.markdown(f"**{name}**" if hidden else f"**{name}: {NAMES[number]}**")
    if not hidden:
        show(small(asking.models[number]))


def answers(compared: Compared) -> None:
    """Both answers; whose they are and what they are worth, unless that is still hidden."""
    rewards = [
        compared.beta * (policy - reference) for policy, reference in zip(*compared.logps, strict=True)
    ]  # per answer [L]
    strongest = max((float(np.abs(reward).max()) for reward in rewards if len(reward)), default=0.0)
    show(said(compared.asked.question))
    if compared.answered.prompt != compared.asked.question:
        with st.expander("As the models read it"):
            show(said(compared.answered.prompt))
    for place, (column, number) in enumerate(zip(st.columns(2), compared.asked.order, strict=True)):
        with column.container(border=True):
            title(compared.asked, place, number, compared.hidden)
            if compared.hidden:
                show(said(compared.answered.answers[number]))
            else:
                show(shaded(compared.pieces[number], rewards[number].tolist(), strongest))
            if compared.cuts[number]:
                show(small(compared.cuts[number]))
            if not compared.hidden:
                policy, reference = (model[number].sum() for model in compared.logps)
                show(small(f"log-probability: policy {policy:.2f}, reference {reference:.2f} nats"))
                show(small(f"implicit reward: {rewards[number].sum():+.3f}, beta {compared.beta:g}"))
    if not compared.hidden:
        show(legend())


def vote(compared: Compared, votes: Path, runs: Path) -> None:
    """Three buttons, once; then where the vote went and how to train on it."""
    so_far = cast(votes)  # raises before a vote is lost in a file of something else
    if compared.voted is not None:
        s = "" if so_far.votes == 1 else "s"
        st.success(f"Written to {compared.voted}. {so_far.votes:,} vote{s} to train on so far.")
        if so_far.prompts < FEWEST:
            st.info("Vote on another prompt, too: a fit needs one to train and one to validate on.")
        else:
            command = training_command(compared.answered.models[0], votes, runs)
            st.code(command, language="bash", wrap_lines=True)
        return
    if compared.answered.answers[0] == compared.answered.answers[1]:
        st.info("Both answers are the same, so there is nothing to prefer. Take another seed or a higher temperature.")
        return
    if any(compared.answered.cut):
        st.warning(
            "An answer did not come to its own end. A model that is trained on it learns to end there; ask for longer "
            "answers before you vote."
        )
    choices = (("A is better", "first"), ("Tie", "tie"), ("B is better", "second"))
    for column, (label, verdict) in zip(st.columns(3), choices, strict=True):
        if column.button(label, width="stretch"):
            better = verdict
            if verdict != "tie":
                better = ("first", "second")[compared.asked.order[0 if verdict == "first" else 1]]
            about = {"beta": compared.beta, "blind": compared.asked.blind}
            compared.voted = record(votes, compared.answered, better, compared.asked.sampling[0], about)
            st.rerun()
