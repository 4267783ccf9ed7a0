"""The page where policy and reference answer side by side, are scored by each other, and voted on."""

import random
import shlex
from contextlib import closing
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import streamlit as st

from dpo_lightning.data.inspection import pieces
from dpo_lightning.errors import InputError
from dpo_lightning.ui.look import legend, said, shaded, show
from dpo_lightning.ui.models import Chosen, voice
from dpo_lightning.ui.voice import Sampling, Voice, beta_of, check_same_tokens, learning_rate_of
from dpo_lightning.ui.votes import Answered, count, record

COMPARED = "compared"

#: Seconds in which another click is heard even while a model answers somebody else.
EVERY = 0.5

NAMES = ("policy", "reference")


@dataclass
class Compared:
    """A prompt, an answer of each model, and what both think of each answer.

    Attributes:
        answered: the texts, the policy's first.
        ids: of each answer.
        logps: by model, by answer: log-probability of each token.
        beta: what rewards are multiplied with.
        order: which answer stands left, and which right.
        blind: whether whose they are is hidden until the vote.
        sampling: how they were drawn.
        voted: where the vote went; None before it.
    """

    answered: Answered
    pieces: tuple[list[str], list[str]]
    logps: list[list[np.ndarray]]
    beta: float
    order: tuple[int, int]
    blind: bool
    sampling: Sampling
    voted: Path | None = None


def page(chosen: Chosen, votes: Path, runs: Path) -> None:
    """Prompt, both answers, what they are worth, and the vote.

    Args:
        chosen: both models.
        votes: the file that votes go to.
        runs: the folder that a run on these votes goes into.
    """
    st.header("Compare", anchor=False)
    policy = voice(chosen.policy)
    try:
        reference = voice(chosen.reference)
        check_same_tokens(policy, reference)
    except InputError as error:
        raise InputError(f"{error}. Choose another reference in the sidebar.") from error
    if chosen.policy == chosen.reference:
        st.caption("The policy is the reference itself: its second answer is drawn with the next seed.")
    with st.form("compare", border=False):
        question = st.text_area("Prompt", placeholder="What does an electrician do?", height=80)
        left, right = st.columns([1, 3], vertical_alignment="center")
        asked = left.form_submit_button("Answer", type="primary", width="stretch")
        blind = right.checkbox("Blind: shuffled, and whose they are is told after the vote")
    if asked and not question.strip():
        st.warning("The prompt is empty; write something.")
        return
    if asked:
        st.session_state.pop(COMPARED, None)
        st.session_state[COMPARED] = ask(policy, reference, question, chosen, blind)
        st.rerun()
    compared: Compared | None = st.session_state.get(COMPARED)
    if compared is not None:
        answers(compared)
        vote(compared, votes, runs)


def ask(policy: Voice, reference: Voice, question: str, chosen: Chosen, blind: bool) -> Compared:
    """Both models answer, in two columns, and score both answers."""
    system = [{"role": "system", "content": chosen.system}] if chosen.system else []
    text = policy.text([*system, {"role": "user", "content": question}], chosen.dialogue)
    prompt = policy.ids(text, chosen.sampling.max_new_tokens)
    order = (0, 1) if not blind or random.random() < 0.5 else (1, 0)
    places = dict(zip(order, (column.empty() for column in st.columns(2)), strict=True))
    same = chosen.policy == chosen.reference
    seeds = (chosen.sampling.seed, chosen.sampling.seed + same)
    ids = []
    for number, model in enumerate((policy, reference)):
        answer = np.array([], dtype=np.int64)
        with closing(model.stream(prompt, replace(chosen.sampling, seed=seeds[number]), EVERY)) as stream:
            for answer in stream:
                places[number].html(said(model.decode(answer)))
        ids.append(answer)
    logps = [model.token_logps(prompt, (ids[0], ids[1])) for model in (policy, reference)]
    texts = (policy.decode(ids[0]), policy.decode(ids[1]))
    spelled = (pieces(policy.tokenizer, ids[0].tolist()), pieces(policy.tokenizer, ids[1].tolist()))
    answered = Answered(text, texts, (chosen.policy, chosen.reference))
    return Compared(answered, spelled, logps, beta_of(chosen.policy), order, blind, chosen.sampling)


def answers(compared: Compared) -> None:
    """Both answers; whose they are and what they are worth, unless that is still hidden."""
    hidden = compared.blind and compared.voted is None
    rewards = [
        compared.beta * (policy - reference) for policy, reference in zip(*compared.logps, strict=True)
    ]  # per answer [L]
    strongest = max((float(np.abs(reward).max()) for reward in rewards if len(reward)), default=0.0)
    show(said(compared.answered.prompt))
    for place, (column, number) in enumerate(zip(st.columns(2), compared.order, strict=True)):
        with column.container(border=True):
            name = f"Answer {'AB'[place]}"
            st.markdown(f"**{name}**" if hidden else f"**{name}: {NAMES[number]}**")
            if hidden:
                show(said(compared.answered.answers[number]))
                continue
            show(f'<div class="dpo-small">{escape(compared.answered.models[number])}</div>')
            show(shaded(compared.pieces[number], rewards[number].tolist(), strongest))
            figures = [model[number].sum() for model in compared.logps]
            show(
                '<div class="dpo-small">log-probability: '
                f"policy {figures[0]:.2f}, reference {figures[1]:.2f} nats<br>"
                f"implicit reward: {rewards[number].sum():+.3f}, beta {compared.beta:g}</div>"
            )
    if not hidden:
        show(legend())


def vote(compared: Compared, votes: Path, runs: Path) -> None:
    """Three buttons, once; then where the vote went and how to train on it."""
    if compared.voted is not None:
        cast = count(votes)
        st.success(f"Written to {compared.voted}. {cast:,} {'vote' if cast == 1 else 'votes'} to train on so far.")
        st.code(training_command(compared, votes, runs), language="bash", wrap_lines=True)
        return
    if compared.answered.answers[0] == compared.answered.answers[1]:
        st.info("Both answers are the same, so there is nothing to prefer. Take another seed or a higher temperature.")
        return
    choices = (("A is better", "first"), ("Tie", "tie"), ("B is better", "second"))
    for column, (label, verdict) in zip(st.columns(3), choices, strict=True):
        if column.button(label, width="stretch"):
            better = verdict
            if verdict != "tie":
                better = ("first", "second")[compared.order[0 if verdict == "first" else 1]]
            about = {"beta": compared.beta, "blind": compared.blind}
            compared.voted = record(votes, compared.answered, better, compared.sampling, about)
            st.rerun()


def training_command(compared: Compared, votes: Path, runs: Path) -> str:
    """A fit of the policy on the votes, as it was trained before: by its config.yaml, as far as that says."""
    policy = compared.answered.models[0]
    options = {
        "model.checkpoint": policy,
        "model.loss.beta": f"{compared.beta:g}",
        "model.optimizer.lr": learning_rate_of(policy),
        "data.source": votes,
        "data.val_fraction": 0.2,
        "trainer.default_root_dir": runs / "votes",
    }
    given = [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    return shlex.join(["python", "-m", "dpo_lightning", "fit", *given])
