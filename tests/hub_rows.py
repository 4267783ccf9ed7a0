"""Rows with the columns of the data sets themselves, and the format of each.

In every row the question is `WHY`, the preferred answer `GOOD` and the other one, where there is one, `BAD`.
"""

from typing import Any

from dpo_lightning.data.conversations import chat_answers, chats, instructions, messages, messages_and_texts, sharegpt
from dpo_lightning.data.formats import answers, dialogues, triples
from dpo_lightning.data.preference import Format
from dpo_lightning.data.rankings import arena, best_worst, helpsteer3, safe_rlhf, shp, stack_exchange

Row = dict[str, Any]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
WHY, GOOD, BAD = "Why is the sky blue?", "Short waves scatter more.", "Because."


def turn(role: str, content: object, **more: object) -> Row:
    return {"role": role, "content": content, **more}


def chat(answer: str) -> list[Row]:
    return [turn("user", WHY), turn("assistant", answer)]


def said(who: str, text: str) -> Row:
    return {"from": who, "value": text}


def parts(answer: str) -> list[Row]:
    return [
        turn(role, [{"type": "text", "text": text, "image": None, "mimeType": None}])
        for role, text in (("user", WHY), ("assistant", answer))
    ]


def graded(answer: str, score: float, critique: str | None = None) -> Row:
    """A completion of UltraFeedback."""
    ratings = {"helpfulness": {"Rating": "4", "Rationale": "r", "Type": ["1"]}, "honesty": None}
    about = {"model": "m", "principle": "helpfulness", "custom_system_prompt": "s", "annotations": ratings}
    return about | {"response": answer, "critique": critique, "overall_score": score, "fine-grained_score": None}


PAIR = {"chosen": chat(GOOD), "rejected": chat(BAD)}
SCORES = {"score_chosen": 8.5, "score_rejected": 3.0}
NECTAR = [{"answer": a, "model": "m", "rank": rank} for a, rank in ((BAD, 3.0), (GOOD, 1.0), ("Dust.", 2.0))]

#: Data set -> a row of it, and its format.
HUB: dict[str, tuple[Row, Format]] = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": WHY, "prompt_id": "f0e3"} | PAIR | {"messages": chat(GOOD)} | SCORES,
        messages,
    ),
    "trl-lib/ultrafeedback_binarized": (PAIR | SCORES, messages),
    "an explicit prompt of messages": (
        {"prompt": [turn("user", WHY)], "chosen": [turn("assistant", GOOD)], "rejected": [turn("assistant", BAD)]},
        messages,
    ),
    "a prompt of messages and answers in text": (
        {"prompt": [turn("user", WHY)], "chosen": GOOD, "rejected": BAD},
        messages_and_texts,
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {"source": "Dove", "conversation": [{"input": WHY, "output": GOOD}], "original_response": GOOD}
        | {"generation_prompt": ["a"], "raw_generation_responses": ["b"], "new_generations": ["c"], "prompt": WHY}
        | PAIR
        | {"rating_chosen": 5, "rating_rejected": 2, "chosen_model": "m", "rejected_model": "n"},
        messages,
    ),
    "mlabonne/orpo-dpo-mix-40k": ({"source": "s"} | PAIR | {"prompt": WHY, "question": WHY}, messages),
    "hiyouga/DPO-En-Zh-20k": (
        {"conversations": [said("human", WHY)], "chosen": said("gpt", GOOD), "rejected": said("gpt", BAD)},
        sharegpt,
    ),
    "Dahoas/rm-static": ({"prompt": WHY, "response": GOOD, "chosen": GOOD, "rejected": BAD}, triples),
    "Intel/orca_dpo_pairs": ({"system": "Explain.", "question": WHY, "chosen": GOOD, "rejected": BAD}, instructions),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {"system": "", "input": WHY, "chosen": GOOD, "rejected": BAD, "generations": [GOOD, BAD], "order": ["a", "b"]}
        | {"labelling_model": "m", "labelling_prompt": chat("x"), "rating": [9.0, 8.0], "status": "tie"}
        | {"original_chosen": GOOD, "chosen_score": 9.0, "in_gsm8k_train": False},
        instructions,
    ),
    "Anthropic/hh-rlhf": (
        {"chosen": f"{HUMAN} {WHY}{ASSISTANT}{GOOD}", "rejected": f"{HUMAN} {WHY}{ASSISTANT}{BAD}"},
        dialogues,
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        {"prompt": WHY, "response_0": BAD, "response_1": GOOD, "prompt_source": "p", "response_0_source": "Alpaca-7B"}
        | {"is_response_0_safe": True, "response_0_harm_category": {"Violence": False}, "response_0_severity_level": 0}
        | {"better_response_id": 1, "safer_response_id": 0, "response_0_sha256": "76fb"},
        safe_rlhf,
    ),
    "stanfordnlp/SHP": (
        {"post_id": "h", "domain": "askacademia_train", "upvote_ratio": 0.99, "history": WHY, "score_A": 52}
        | {"human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "seconds_difference": 9.0, "score_ratio": 2.0},
        shp,
    ),
    "lvwerra/stack-exchange-paired": (
        {"qid": 3, "question": WHY, "date": "2010", "metadata": ["u"], "response_j": GOOD, "response_k": BAD},
        stack_exchange,
    ),
    "nvidia/HelpSteer3": (
        {"domain": "general", "language": "english", "context": [turn("user", WHY)], "response1": BAD}
        | {"response2": GOOD, "overall_preference": 2, "individual_preference": [{"score": 2, "reasoning": "r"}]},
        helpsteer3,
    ),
    "lmsys/chatbot_arena_conversations": (
        {"question_id": "58", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena_user_973"}
        | {"conversation_a": chat(BAD), "conversation_b": chat(GOOD), "turn": 1, "anony": True, "tstamp": 1.6e9},
        arena,
    ),
    "lmarena-ai/arena-human-preference-140k": (
        {"id": "x", "model_a": "m", "model_b": "n", "winner": "model_a", "conversation_a": parts(GOOD)}
        | {"conversation_b": parts(BAD), "full_conversation": [{"user": turn("user", WHY)}], "is_code": False},
        arena,
    ),
    "openbmb/UltraFeedback": (
        {"source": "evol_instruct", "instruction": WHY, "models": ["a", "b", "c"], "correct_answers": ["None"]}
        | {"completions": [graded("Dust.", 5.0), graded(BAD, 1.0, "Poor."), graded(GOOD, 8.5)]},
        best_worst,
    ),
    "berkeley-nest/Nectar": (
        {"prompt": f"{HUMAN} {WHY}{ASSISTANT} ", "answers": NECTAR, "turns": 1, "num_responses": 3}
        | {"source": ["sharegpt"], "good_natured": True},
        best_worst,
    ),
    "prompt, responses, scores": ({"prompt": WHY, "responses": [BAD, GOOD], "scores": [-1.5, 0]}, best_worst),
    "HuggingFaceH4/ultrachat_200k": ({"prompt": WHY, "prompt_id": "f0", "messages": chat(GOOD)}, chats),
    "teknium/OpenHermes-2.5": (
        {"conversations": [said("system", "s"), said("human", WHY), said("gpt", GOOD)], "source": None, "views": 3.0},
        chats,
    ),
    "trl-lib/Capybara": ({"source": "Airoboros", "messages": chat(GOOD), "num_turns": 1}, chats),
    "a prompt and a completion of messages": (
        {"prompt": [turn("user", WHY)], "completion": [turn("assistant", GOOD)]},
        chat_answers,
    ),
    "a prompt and an answer": ({"prompt": WHY, "answer": GOOD, "source": "s"}, answers),
}
