"""Answers from a policy: of the model's own distribution, the same in every batch, whole up to their EOS.

One model is small enough to enumerate: answers of up to three tokens of a vocabulary of four, one of which is EOS.
Their probabilities are known by plain forwards of whole sequences, and frequencies may be four standard errors off.
"""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dpo_lightning.models.generation import generate
from dpo_lightning.models.policy import Policy
from tests.families import CONTEXT, FAMILIES, VOCABULARY, tiny_model

#: The little world that is enumerated: token 0 ends an answer.
FEW, LENGTH = 4, 3
SHORT, LONG = np.array([1], np.int32), np.array([3, 0, 2, 0, 1], np.int32)
LITTLE = SimpleNamespace(eos_token_id=0)

#: Of the families, whose EOS has the id 2; one prompt has a single token, and all but the longest are padded.
TOKENIZER = SimpleNamespace(eos_token_id=2)
PROMPTS = [np.random.default_rng(n).integers(3, VOCABULARY, n, dtype=np.int32) for n in (9, 1, 4, 12, 6)]
KEYS = [(7, number) for number in range(len(PROMPTS))]

#: What draws a sample in another way than from the distribution, or does not take the likeliest token.
OWN_WAYS: list[dict[str, object]] = [
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_p": 0.1},
    {"do_sample": True, "temperature": 0.1},
    {"do_sample": True, "min_p": 0.9},
    {"repetition_penalty": 20.0},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": [0, 1]},
    {"bad_words_ids": [[2]]},
    {"min_new_tokens": LENGTH},
    {"max_length": 2},
    {"num_beams": 3},
    {"eos_token_id": 1},
    {"forced_eos_token_id": 3},
]


@pytest.fixture(scope="module")
def little() -> Policy:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=FEW, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(4)  # so that its answers are not all about as likely
    return Policy(model.eval())


@torch.no_grad()
def chances(policy: Policy, prompt: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every answer with its probability."""
    found = {}
    for ids in itertools.product(range(FEW), repeat=LENGTH):
        answer = ids[: ids.index(0) + 1] if 0 in ids else ids
        logps = policy.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        found[answer] = math.exp(sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return found


@torch.no_grad()
def step_by_step(model: PreTrainedModel, prompt: np.ndarray, most: int) -> list[int]:
    """The likeliest token after the likeliest token, by one unpadded forward each."""
    ids = prompt.tolist()
    while len(ids) - len(prompt) < most and ids[len(prompt) :][-1:] != [TOKENIZER.eos_token_id]:
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def as_lists(answers: list[np.ndarray]) -> list[list[int]]:
    return [answer.tolist() for answer in answers]


# Whose answers they are


def test_samples_come_with_the_models_own_probabilities(little: Policy) -> None:
    """A short and a long prompt in one batch, so that the short one is padded."""
    count = 4000
    keys = [(0, row) for row in range(2 * count)]
    answers = generate(little, LITTLE, [SHORT] * count + [LONG] * count, LENGTH, keys)
    for prompt, drawn in ((SHORT, answers[:count]), (LONG, answers[count:])):
        wanted, seen = chances(little, prompt), Counter(tuple(answer.tolist()) for answer in drawn)
        assert seen.keys() <= wanted.keys()
        for answer, chance in wanted.items():
            error = math.sqrt(chance * (1 - chance) / count)
            assert abs(seen[answer] / count - chance) < 4 * error, (answer, chance, seen[answer])
        # All of them together: chi squared, of mean `free` and variance `2 * free`.
        free = len(wanted) - 1
        squares = sum((seen[answer] - count * chance) ** 2 / (count * chance) for answer, chance in wanted.items())
        assert abs(squares - free) < 4 * math.sqrt(2 * free)


def test_the_last_number_of_a_key_gives_independent_samples(little: Policy) -> None:
    """Two samples of one prompt are the same as often as two draws of one distribution are: sum of p squared."""
    count = 4000
    one, two = (generate(little, LITTLE, [LONG] * count, LENGTH, [(0, row, n) for row in range(count)]) for n in (0, 1))
    same = sum(map(np.array_equal, one, two)) / count
    chance = sum(chance**2 for chance in chances(little, LONG).values())
    assert abs(same - chance) < 4 * math.sqrt(chance * (1 - chance) / count)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_likeliest_token_after_the_likeliest(family: str) -> None:
    policy = Policy(tiny_model(family))
    wanted = [step_by_step(policy.model, prompt, 6) for prompt in PROMPTS]
    assert as_lists(generate(policy, TOKENIZER, PROMPTS, 6)) == wanted


@pytest.mark.parametrize("options", OWN_WAYS, ids=lambda options: "-".join(options))
def test_the_models_own_ways_of_generating_are_ignored_and_kept(little: Policy, options: dict[str, object]) -> None:
    prompts, keys = [SHORT, LONG] * 20, [(3, row) for row in range(40)]
    wanted = [as_lists(generate(little, LITTLE, prompts, LENGTH, chosen)) for chosen in (None, keys)]
    before, own = little.model.generation_config, GenerationConfig(**options)
    said = own.to_dict()
    little.model.generation_config = own
    try:
        found = [as_lists(generate(little, LITTLE, prompts, LENGTH, chosen)) for chosen in (None, keys)]
        assert little.model.generation_config is own
    finally:
        little.model.generation_config = before
    assert found == wanted
    assert own.to_dict() == said


def test_noise_of_training_is_in_no_answer() -> None:
    policy = Policy(tiny_model("gpt2", resid_pdrop=0.5))
    wanted = as_lists(generate(policy, TOKENIZER, PROMPTS, 6, KEYS))
    assert as_lists(generate(policy.train(), TOKENIZER, PROMPTS, 6, KEYS)) == wanted


# What is left as it was


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_mode_and_generation_config_are_those_from_before_even_after_a_failure(training: bool, fails: bool) -> None:
    policy = Policy(tiny_model("gpt2"))
    policy.train(training)
    own = policy.model.generation_config
    if fails:
        with pytest.raises(IndexError):
            generate(policy, TOKENIZER, [np.array([VOCABULARY])], 2)
    else:
        generate(policy, TOKENIZER, PROMPTS, 2, KEYS)
    assert policy.model.generation_config is own
    assert {part.training for part in policy.modules()} == {training}


def test_samples_neither_draw_from_the_global_generator_nor_depend_on_it(little: Policy) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = generate(little, LITTLE, [SHORT] * 20, LENGTH, [(0, row) for row in range(20)])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = generate(little, LITTLE, [SHORT] * 20, LENGTH, [(0, row) for row in range(20)])
    assert as_lists(one) == as_lists(two)


# The same in every batch


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2-sliding", "gemma3", "falcon-alibi", "mamba"])
def test_a_prompts_sample_is_the_same_alone_among_others_and_in_any_order(family: str) -> None:
    """In 64-bit."""
    policy = Policy(tiny_model(family, torch.float64))
    together = as_lists(generate(policy, TOKENIZER, PROMPTS, 8, KEYS))
    assert together == [
        *as_lists(generate(policy, TOKENIZER, PROMPTS[:2], 8, KEYS[:2])),
        *as_lists(generate(policy, TOKENIZER, PROMPTS[2:], 8, KEYS[2:])),
    ]
    backwards = as_lists(generate(policy, TOKENIZER, PROMPTS[::-1], 8, KEYS[::-1]))
    assert together == backwards[::-1]
    assert together[1:2] == as_lists(generate(policy, TOKENIZER, PROMPTS[1:2], 8, KEYS[1:2]))
    assert len(set(map(tuple, together))) == len(PROMPTS)


def test_scores_that_are_no_numbers_are_an_error_and_no_answer() -> None:
    """Bloom's eager attention casts the mask of padded prompts to 32-bit, where its lowest number is -inf."""
    policy = Policy(tiny_model("bloom", torch.float64))
    with pytest.raises(ValueError, match="no numbers"):
        generate(policy, TOKENIZER, PROMPTS, 8, KEYS)
    assert generate(policy, TOKENIZER, PROMPTS[:1], 8, KEYS[:1])  # nothing is padded


def test_other_keys_give_other_samples() -> None:
    policy = Policy(tiny_model("llama"))
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)]
    answers = as_lists(generate(policy, TOKENIZER, PROMPTS[:1] * len(keys), 8, keys))
    assert len(set(map(tuple, answers))) == len(keys)


# Where an answer ends


@pytest.mark.parametrize("sampled", [True, False])
def test_an_answer_ends_with_its_first_eos_or_is_cut_off_at_the_longest_length(little: Policy, sampled: bool) -> None:
    """Some answers end early, while others of the batch go on; prompts may have EOS in them, as GPT-2's do."""
    prompts = [np.array(ids) for ids in itertools.product(range(FEW), repeat=3)]
    answers = as_lists(generate(little, LITTLE, prompts, 5, [(5, n) for n in range(len(prompts))] if sampled else None))
    for answer in answers:
        assert 0 not in answer[:-1]
        assert answer[-1] == 0 or len(answer) == 5
    ends = {(len(answer) == 5, answer[-1] == 0) for answer in answers}
    assert {(False, True), (True, False)} <= ends  # both do happen


def test_an_answer_that_may_be_shorter_is_the_start_of_the_longer_one(little: Policy) -> None:
    prompts, keys = [SHORT, LONG] * 20, [(2, row) for row in range(40)]
    long = as_lists(generate(little, LITTLE, prompts, 6, keys))
    for most in (1, 2, 4):
        assert as_lists(generate(little, LITTLE, prompts, most, keys)) == [answer[:most] for answer in long]
    assert max(map(len, long)) == 6


# What does not fit


def test_a_prompt_and_answer_longer_than_the_context_are_refused_with_the_numbers() -> None:
    policy = Policy(tiny_model("gpt2"))
    prompts = [np.full(3, 5), np.full(25, 5)]
    with pytest.raises(ValueError, match=rf"\b25\b.*\b8\b.*\b{CONTEXT}\b"):
        generate(policy, TOKENIZER, prompts, 8)
    answers = generate(policy, TOKENIZER, prompts, CONTEXT - 25, [(0, 0), (0, 1)])
    assert all(len(answer) == 7 or answer[-1] == 2 for answer in answers)


def test_a_model_without_a_limit_answers_any_prompt() -> None:
    policy = Policy(tiny_model("bloom"))
    prompt = np.random.default_rng(1).integers(3, VOCABULARY, 2 * CONTEXT)
    assert as_lists(generate(policy, TOKENIZER, [prompt], 4)) == [step_by_step(policy.model, prompt, 4)]
