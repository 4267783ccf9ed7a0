"""The page where one talks to the policy."""

from contextlib import closing

import streamlit as st

from dpo_lightning.ui.look import said, show
from dpo_lightning.ui.models import Chosen, voice
from dpo_lightning.ui.voice import Message

#: Seconds in which Stop is heard even while the model answers somebody else.
EVERY = 0.5

WAITING = '<div class="dpo-small">The model is busy with another question ...</div>'

HISTORY, PARTIAL = "chat history", "chat partial"


def page(chosen: Chosen) -> None:
    """History, question, and the answer as it comes."""
    state = st.session_state
    history: list[Message] = state.setdefault(HISTORY, [])
    keep_partial()
    title, clear = st.columns([5, 1], vertical_alignment="center")
    title.header("Chat", anchor=False)
    policy = voice(chosen.policy)
    if clear.button("Clear", width="stretch", disabled=not history):
        history.clear()
        st.rerun()
    if chosen.system and not policy.templated and not chosen.dialogue:
        st.caption("This model has no chat template, so the system prompt is not used.")
    elif not policy.templated and not chosen.dialogue:
        st.caption("This model has no chat template: each question stands alone, without what was said before.")
    if not history:
        show(f'<div class="dpo-small">You are talking to {said(chosen.policy)}</div>')
    for message in history:
        bubble(message)
    question = st.chat_input("Ask something")
    if question is None:
        return
    if not question.strip():
        st.warning("The question is empty; write something.")
        return
    asked = {"role": "user", "content": question}
    bubble(asked)
    system = [{"role": "system", "content": chosen.system}] if chosen.system else []
    prompt = policy.ids(
        policy.text([*system, *history, asked], chosen.dialogue), chosen.sampling.max_new_tokens
    )  # raises before the question is part of the history
    history.append(asked)
    with st.chat_message("assistant", avatar=":material/smart_toy:"):
        place = st.empty()
        with st.empty():
            st.button("Stop", icon=":material/stop:", key=f"stop {len(history)}")
            state[PARTIAL] = ""
            with closing(policy.stream(prompt, chosen.sampling, EVERY)) as stream:  # closed where Stop ends this visit
                for ids in stream:
                    state[PARTIAL] = policy.decode(ids)
                    place.html(said(state[PARTIAL].lstrip()) if len(ids) else WAITING)
    keep_partial()
    st.rerun()


def keep_partial() -> None:
    """Make what was answered a part of the history, whole or stopped."""
    partial = st.session_state.pop(PARTIAL, None)
    if partial is not None:
        st.session_state[HISTORY].append({"role": "assistant", "content": partial})


def bubble(message: Message) -> None:
    """One message, as it was written."""
    avatar = ":material/person:" if message["role"] == "user" else ":material/smart_toy:"
    with st.chat_message(message["role"], avatar=avatar):
        show(said(message["content"].strip()) if message["content"] else '<div class="dpo-small">(nothing)</div>')
