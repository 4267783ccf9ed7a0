"""The page where one talks to the policy."""

from contextlib import closing
from dataclasses import dataclass

import streamlit as st

from dpo_lightning.errors import InputError
from dpo_lightning.ui.look import EVERY, WAITING, as_plain, said, show, small
from dpo_lightning.ui.models import Chosen, voice
from dpo_lightning.ui.voice import Message, Voice

#: Where a visit keeps what was said, the answer that is coming, the field, and a question that was refused and why.
HISTORY, PARTIAL, QUESTION, REFUSED = "chat history", "chat partial", "chat question", "chat refused"


@dataclass(frozen=True)
class Said:
    """A question or an answer.

    Attributes:
        role: user or assistant.
        content: the text.
        model: whose answer it is.
        cut: how it ended, if not by itself.
    """

    role: str
    content: str
    model: str = ""
    cut: str = ""

    @property
    def message(self) -> Message:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content}


def page(chosen: Chosen) -> None:
    """History, question, and the answer as it comes."""
    state = st.session_state
    history: list[Said] = state.setdefault(HISTORY, [])
    keep_partial()
    title, clear = st.columns([5, 1], vertical_alignment="center")
    title.header("Chat", anchor=False)
    policy = voice(chosen.policy)
    if clear.button("Clear", width="stretch", disabled=not history):
        history.clear()
        st.rerun()
    show(small(f"You are talking to {chosen.policy}"))
    if remark := chosen.remark(policy):
        st.caption(remark)
    for message in history:
        bubble(message, chosen.policy)
    question, why = state.pop(REFUSED, ("", ""))
    if question:
        state[QUESTION] = question  # back into the field
        st.error(as_plain(why))
    question = st.chat_input("Ask something", key=QUESTION)
    if question is None:
        return
    if not question.strip():
        st.warning("The question is empty; write something.")
        return
    asked = Said("user", question)
    try:
        messages = [message.message for message in (*history, asked)]
        prompt = policy.ids(policy.text([*chosen.system_message, *messages], chosen.dialogue), chosen.longest)
    except InputError as error:
        state[REFUSED] = (question, str(error))
        st.rerun()
    history.append(asked)
    bubble(asked, chosen.policy)
    answer(policy, prompt, chosen)
    keep_partial()
    st.rerun()


def answer(policy: Voice, prompt, chosen: Chosen) -> None:
    """The answer as it comes; what has come is kept for `keep_partial` wherever it ends."""
    state = st.session_state
    with st.chat_message("assistant", avatar=":material/smart_toy:"):
        place = st.empty()
        with st.empty():
            st.button("Stop", icon=":material/stop:", key=f"stop {len(state[HISTORY])}")
            state[PARTIAL] = Said("assistant", "", policy.name, "stopped before it began")
            with closing(policy.stream(prompt, chosen.sampling, EVERY)) as stream:  # closed where Stop ends this visit
                for ids in stream:
                    if not len(ids):
                        place.html(WAITING)
                        continue
                    text = policy.decode(ids)
                    state[PARTIAL] = Said("assistant", text, policy.name, policy.cut(ids, chosen.sampling))
                    place.html(said(text.lstrip()))


def keep_partial() -> None:
    """Make what was answered a part of the history, whole or stopped."""
    partial = st.session_state.pop(PARTIAL, None)
    if partial is not None:
        st.session_state[HISTORY].append(partial)


def bubble(message: Said, policy: str) -> None:
    """One message, as it was written; under an answer how it was cut, and whose it is if not the policy's."""
    avatar = ":material/person:" if message.role == "user" else ":material/smart_toy:"
    with st.chat_message(message.role, avatar=avatar):
        show(said(message.content.strip()) if message.content.strip() else small("(nothing)"))
        remarks = [message.cut, message.model if message.model != policy else ""]
        if any(remarks):
            show(small(", ".join(filter(None, remarks))))
