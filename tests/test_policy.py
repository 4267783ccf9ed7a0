"""The policy in every layout against plain forwards of one sequence each, and what the self-check finds.

Legend: B pairs  N answer tokens  V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertLMHeadModel, PhimoeConfig, PhimoeForCausalLM

from dpo_lightning.data.packing import LAYOUTS, Layout, PreferenceBatch, Span, pack, visible
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.errors import InputError
from dpo_lightning.models import attention
from dpo_lightning.models import policy as module
from dpo_lightning.models.attention import TREES, MaskAttention, TreeAttention
from dpo_lightning.models.policy import Policy, self_check
from dpo_lightning.objective import logps as logps_module
from tests.families import (
    CONTEXT,
    INDEX_WINDOW_FAMILIES,
    PADDED_FAMILIES,
    TREE_FAMILIES,
    VOCABULARY,
    WINDOW,
    tiny_model,
)
from tests.oracles import LENGTHS, ROW_TOKENS, assert_agrees, distance, draw_pairs, flat_gradient, oracle

#: Their attention is their own, so that a mask is what they can be told.
MASKED_FAMILIES = ("gptj", "falcon-rope", "gemma2")
LIBRARY_FAMILIES = [family for family in TREE_FAMILIES if family not in MASKED_FAMILIES]

EAGER = [("gpt2", "eager"), ("llama", "eager"), ("gemma3", "eager"), ("mistral", "eager")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "attention"), [*((family, None) for family in TREE_FAMILIES), *EAGER])
def test_every_layout_equals_separate_forwards_in_value_and_gradient(
    family: str, attention: str | None, layout: Layout
) -> None:
    assert_agrees(tiny_model(family, attn_implementation=attention), layout, oracle(family, attention), share=1e-5)


def by_mask(family: str, layout: Layout, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy that is told by a mask what each token sees, though it may know a quicker way."""
    policy = Policy(tiny_model(family, dtype), layout)
    if isinstance(policy.attention, TreeAttention):
        policy.model.set_attn_implementation("sdpa")
        policy.attention = MaskAttention(policy.model.config, policy.model.dtype)
    return policy


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("family", LIBRARY_FAMILIES)
def test_a_mask_and_spans_agree_in_value_and_gradient(family: str, layout: Layout) -> None:
    masked, running = by_mask(family, layout), Policy(tiny_model(family), layout)
    assert isinstance(running.attention, TreeAttention)
    wanted, found = (
        policy.logps(pack(draw_pairs(), layout, row_tokens=policy.attention.row_tokens)) for policy in (masked, running)
    )
    assert distance(found.token_logps, wanted.token_logps) < 1e-5
    weight = torch.linspace(-1, 1, len(wanted.logps))
    gradients = [
        flat_gradient((logps.logps * weight).sum(), policy.model)
        for logps, policy in ((wanted, masked), (found, running))
    ]
    assert distance(*gradients) < 1e-5


@pytest.mark.parametrize("family", TREE_FAMILIES)
def test_tree_by_tree_where_attention_is_the_librarys(family: str) -> None:
    policy = Policy(tiny_model(family))
    assert str(policy.attention) == ("by a mask" if family in MASKED_FAMILIES else "tree by tree")
    assert isinstance(policy.attention, TreeAttention) == (policy.model.config._attn_implementation == TREES)


@pytest.mark.parametrize("window", [8, 1030])
def test_windows_that_a_model_makes_by_masks_alone_are_not_lost(window: int) -> None:
    """PhiMoE's layers do not say what window they have, and the toy pairs do not outlast a long one."""
    options = {"intermediate_size": 32, "num_local_experts": 2, "num_key_value_heads": 2, "sliding_window": window}
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = PhimoeForCausalLM(PhimoeConfig(max_position_embeddings=4096, **shape, **options)).eval()
    policy = Policy(model, "shared")
    assert str(policy.attention) == "by a mask"
    [reason] = policy.reasons
    assert reason.startswith("shared, tree by tree: ")
    if window > 1024:
        assert reason.endswith("its layers ask for attention windows of all, its config of 1,030")


def test_a_model_that_is_made_where_a_gpu_is_the_default_device_has_toy_pairs() -> None:
    policy = Policy(tiny_model("gpt2"))
    with torch.device("meta"):
        assert len(module.toy_pairs(policy)[0]) == 2


def test_generation_and_what_is_separate_know_nothing_of_trees() -> None:
    policy = Policy(tiny_model("gpt2"))
    assert policy.model.config._attn_implementation == TREES and policy.attn_implementation == "sdpa"
    with module.ordinary_attention(policy.model):
        assert policy.model.config._attn_implementation == "sdpa"
    assert policy.model.config._attn_implementation == TREES
    assert TREES not in str(policy.model.config.to_dict())


def test_a_row_of_all_trees_has_no_padding_and_a_mask_keeps_rows_short() -> None:
    running, masked = Policy(tiny_model("gpt2")), by_mask("gpt2", "shared")
    pairs = draw_pairs()
    one, several = (pack(pairs, "shared", row_tokens=policy.attention.row_tokens) for policy in (running, masked))
    assert one.tokens.shape == (1, sum(map(len, pairs)))
    assert several.tokens.shape[1] == max(map(len, pairs)) and len(several.tokens) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_in_double_precision_the_layouts_agree_to_a_billionth(family: str, layout: Layout) -> None:
    dtype = torch.float64
    assert_agrees(tiny_model(family, dtype), layout, oracle(family, dtype=dtype), share=1e-9)


@pytest.mark.parametrize("family", [*PADDED_FAMILIES, *INDEX_WINDOW_FAMILIES])
def test_padded_rows_suit_the_families_that_have_no_trees(family: str) -> None:
    assert_agrees(tiny_model(family), "padded", oracle(family), share=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TREE_FAMILIES)
def test_auto_gives_trees_the_shared_layout(family: str, dtype: torch.dtype) -> None:
    policy = Policy(tiny_model(family, dtype))
    assert policy.layout == "shared"
    assert [reason.split(":")[0] for reason in policy.reasons] == ["shared, tree by tree"] * (family == "falcon-rope")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", PADDED_FAMILIES)
def test_auto_gives_the_others_padded_rows_and_says_why(family: str, dtype: torch.dtype) -> None:
    policy = Policy(tiny_model(family, dtype))
    assert policy.layout == "padded"
    reasons = [reason for reason in policy.reasons if "tree by tree" not in reason]
    assert [reason[: reason.index(":")].removesuffix(", by a mask") for reason in reasons] == ["shared", "packed"]


@pytest.mark.parametrize("family", PADDED_FAMILIES)
def test_asking_for_trees_where_there_are_none_names_family_and_cure(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(InputError, match=rf"{type(model).__name__} cannot run the layout shared: .*layout padded"):
        Policy(model, "shared")


def test_a_window_of_row_indices_never_gets_the_shared_layout() -> None:
    """GPT-Neo's local layers count back in the row, where the chosen answer stands between prompt and rejected."""
    model = tiny_model("gpt-neo")
    policy = Policy(model)
    assert policy.layout != "shared"
    found = policy.logps(pack(draw_pairs(), policy.layout)).token_logps
    assert distance(found, oracle("gpt-neo").logps) < 1e-5
    with pytest.raises(InputError, match="GPTNeoForCausalLM cannot run the layout shared"):
        Policy(model, "shared")


def test_a_model_that_fits_no_layout_is_not_sent_back_to_the_layouts_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "self_check", lambda policy: "broken")
    with pytest.raises(InputError, match="GPT2LMHeadModel") as caught:
        Policy(tiny_model("gpt2"), "auto")
    assert str(caught.value).count("broken") == 5
    assert "use layout" not in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_in_which_nothing_is_predicted_has_no_log_probability(family: str, layout: Layout) -> None:
    policy = Policy(tiny_model(family), layout)
    found = policy.logps(pack(draw_pairs([(0, 1, 1)]), layout))
    assert found.logps.tolist() == [0, 0] and found.token_logps.shape == (0,)
    assert not flat_gradient(found.logps.sum(), policy).any()


@pytest.mark.parametrize("family", ["phi", "cohere", "granite", "gemma2"])
def test_statistics_are_those_of_the_models_final_logits(family: str) -> None:
    """Final: with Phi's bias, Cohere's and Granite's scale, Gemma-2's soft cap."""
    model, pair = tiny_model(family), draw_pairs([(4, 5, 3)])[0]
    found = Policy(model).logps(pack([pair], "shared"), ("mean_logits",)).statistics["mean_logits"]
    logits = [
        model(torch.tensor([[*pair.prompt, *answer]])).logits[0, len(pair.prompt) - 1 : -1]
        for answer in (pair.chosen, pair.rejected)
    ]
    assert_close(found, torch.cat(logits).mean(-1).detach(), rtol=1e-5, atol=1e-5)


def test_the_readout_leaves_the_model_as_it_was_even_when_it_fails() -> None:
    model = tiny_model("llama")
    policy = Policy(model)
    tokens = torch.arange(5)[None]
    before = model(tokens).logits
    with pytest.raises(RuntimeError):
        policy.readout(torch.zeros(3, 7))  # of a width that the head does not take
    assert torch.equal(model(tokens).logits, before)


# The self-check finds faults


def no_branches(batch: PreferenceBatch, window: int | None = None) -> Tensor:
    """The rejected answer sees the chosen one."""
    return visible(replace(batch, branch=torch.zeros_like(batch.branch)), window)


def no_trees(batch: PreferenceBatch, window: int | None = None) -> Tensor:
    """A tree sees the trees before it in its row."""
    return visible(replace(batch, tree=torch.where(batch.tree < 0, -1, 0)), window)


def no_window(batch: PreferenceBatch, window: int | None = None) -> Tensor:
    return visible(batch)


def wider_window(batch: PreferenceBatch, window: int | None = None) -> Tensor:
    return visible(batch, window and window + 1)


def row_indices(batch: PreferenceBatch) -> Tensor:
    return torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens).contiguous()


def window_of_indices(batch: PreferenceBatch, window: int | None = None) -> Tensor:
    """The sliding window counts back in the row, not in the sequence."""
    return visible(replace(batch, positions=row_indices(batch)), window)


def positions_run_on(batch: PreferenceBatch) -> PreferenceBatch:
    """Positions do not restart in a tree."""
    return replace(batch, positions=row_indices(batch))


def rejected_counts_on_from_chosen(batch: PreferenceBatch) -> PreferenceBatch:
    """Positions restart in a tree, but the rejected answer's follow the chosen one's."""
    (row,) = batch.tree  # the toy is one row without padding
    lengths = [int((row == tree).sum()) for tree in row.unique_consecutive()]
    return replace(batch, positions=torch.cat([torch.arange(length) for length in lengths])[None])


def sources_off_by_one(batch: PreferenceBatch) -> PreferenceBatch:
    """A token is read out where it stands instead of where it is predicted."""
    return replace(batch, source=batch.source + 1)


def rejected_read_from_chosen(batch: PreferenceBatch) -> PreferenceBatch:
    """The first rejected token is predicted by what stands before it in the row: the last chosen token."""
    first = [int((batch.answer == answer).nonzero()[0]) for answer in range(batch.num_pairs, batch.num_answers)]
    source = batch.source.clone()
    source[first] = batch.source[[n + 1 for n in first]] - 1
    return replace(batch, source=source)


def bare_head(policy: Policy, states: Tensor) -> Tensor:
    """The LM head without what the model does to its logits."""
    return policy.model.get_output_embeddings()(states)


def fault_of(policy: Policy, monkeypatch: pytest.MonkeyPatch, target: object, name: str, fault: object) -> str | None:
    """What the self-check says with a fault injected, having passed without it."""
    assert self_check(policy) is None
    monkeypatch.setattr(target, name, fault)
    return self_check(policy)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@dtypes
@pytest.mark.parametrize(
    ("fault", "layout", "families"),
    [
        (no_branches, "shared", ["gpt2", "llama", "gemma3"]),
        (no_trees, "shared", ["gpt2", "llama", "gemma3"]),
        (no_trees, "packed", ["gpt2", "llama", "gemma3"]),
        (no_window, "shared", ["mistral", "qwen2-sliding", "gemma2", "gemma3"]),
        (no_window, "packed", ["mistral", "gemma3"]),
        (wider_window, "shared", ["mistral", "gemma3"]),
        (window_of_indices, "shared", ["mistral", "gemma3"]),
    ],
)
def test_the_self_check_finds_a_wrong_mask(
    fault: Callable[..., Tensor],
    layout: Layout,
    families: list[str],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for family in families:
        policy = by_mask(family, layout, dtype)
        with monkeypatch.context() as patch:
            assert fault_of(policy, patch, attention, "visible", fault) is not None, family


def without_prompts(tree: Span) -> Span:
    """The second answer sees nothing but itself."""
    return tree._replace(prompt=0, first=tree.prompt + tree.first)


def without_branches(tree: Span) -> Span:
    """The second answer sees the first one."""
    return tree._replace(prompt=tree.prompt + tree.first, first=0)


def shorter_prompts(tree: Span) -> Span:
    """The second answer does not see the prompt's last token."""
    return tree._replace(prompt=tree.prompt - 1, first=tree.first + 1)


def one_sequence(tree: Span) -> Span:
    """The answers are one."""
    return tree._replace(first=tree.first + tree.second, second=0)


@dtypes
@pytest.mark.parametrize("fault", [without_prompts, without_branches, shorter_prompts, one_sequence])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_the_self_check_finds_wrong_spans(
    fault: Callable[[Span], Span], family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(tiny_model(family, dtype), "shared")

    def faulty_pack(pairs: Sequence[TokenPair], layout: Layout, *, row_tokens: int) -> PreferenceBatch:
        batch = pack(pairs, layout, row_tokens=row_tokens)
        return replace(batch, trees=tuple(fault(tree) for tree in batch.trees))

    assert fault_of(policy, monkeypatch, module, "pack", faulty_pack) is not None


@dtypes
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_the_self_check_finds_trees_that_see_each_other(
    layout: Layout, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(tiny_model("gpt2", dtype), layout)

    def faulty_pack(pairs: Sequence[TokenPair], layout: Layout, *, row_tokens: int) -> PreferenceBatch:
        batch = pack(pairs, layout, row_tokens=row_tokens)
        first, second, *others = batch.trees
        joint = Span(first.start, sum(first[1:]) + second.prompt, second.first, second.second)
        return replace(batch, trees=(joint, *others))

    assert fault_of(policy, monkeypatch, module, "pack", faulty_pack) is not None


@dtypes
@pytest.mark.parametrize("family", ["mistral", "qwen2-sliding", "gemma3"])
@pytest.mark.parametrize("wider", [1, 100])
def test_the_self_check_finds_spans_with_another_window(
    family: str, wider: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, own = Policy(tiny_model(family, dtype), "shared"), attention.causal_mask

    def widened(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
        return own(queries, keys, None if window is None else window + wider, like)

    assert fault_of(policy, monkeypatch, attention, "causal_mask", widened) is not None


@dtypes
@pytest.mark.parametrize(
    ("fault", "layout", "family"),
    [
        (positions_run_on, "shared", "gpt2"),
        (positions_run_on, "packed", "gpt2"),
        (positions_run_on, "packed", "opt"),
        (rejected_counts_on_from_chosen, "shared", "gpt2"),
        (rejected_counts_on_from_chosen, "shared", "opt"),
        (rejected_counts_on_from_chosen, "shared", "llama"),
        (rejected_counts_on_from_chosen, "shared", "qwen3"),
        (rejected_counts_on_from_chosen, "shared", "olmo2"),
        (sources_off_by_one, "shared", "llama"),
        (sources_off_by_one, "packed", "gpt2"),
        (sources_off_by_one, "padded", "bloom"),
        (rejected_read_from_chosen, "shared", "gpt2"),
        (rejected_read_from_chosen, "shared", "llama"),
    ],
)
def test_the_self_check_finds_a_wrong_position(
    fault: Callable[[PreferenceBatch], PreferenceBatch],
    layout: Layout,
    family: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = Policy(tiny_model(family, dtype), layout)

    def faulty_pack(pairs: Sequence[TokenPair], layout: Layout, *, row_tokens: int) -> PreferenceBatch:
        return fault(pack(pairs, layout, row_tokens=row_tokens))

    assert fault_of(policy, monkeypatch, module, "pack", faulty_pack) is not None


@dtypes
@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2"])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_the_self_check_finds_a_readout_that_is_not_the_models_own(
    family: str, layout: Layout, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(tiny_model(family, dtype), layout)
    assert fault_of(policy, monkeypatch, Policy, "readout", bare_head) is not None


def test_the_self_check_finds_a_leak_that_is_smaller_than_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that only dampens what it should hide moves a token by a millionth of a nat, and always the same way."""
    policy = Policy(tiny_model("gpt2", attn_implementation="eager"), "shared")

    def dampen(attention: MaskAttention, batch: PreferenceBatch, window: int | None) -> Tensor:
        return torch.where(visible(batch, window), 0.0, -13.0)[:, None]

    reason = fault_of(policy, monkeypatch, MaskAttention, "_mask", dampen)
    assert reason is not None and reason.startswith("other tokens, which it must not see")


def test_the_pairs_of_these_tests_outlast_the_windows() -> None:
    """Or a window that is dropped would not show."""
    batch = pack(draw_pairs(), "shared", row_tokens=ROW_TOKENS)
    assert max(prompt for prompt, _, _ in LENGTHS) > 2 * WINDOW
    assert len(batch.tokens) > 1 and batch.tokens.shape[1] > CONTEXT and (batch.tree < 0).any()


def test_a_model_that_sees_the_future_is_refused_in_every_layout() -> None:
    """A BERT with a language-model head takes every input that a padded policy gives, and scores what it sees."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertLMHeadModel(BertConfig(vocab_size=97, **shape)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    with pytest.raises(InputError, match=r"BertLMHeadModel.*padded, by rows: other tokens, which it must not see"):
        Policy(model)


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of some shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten._to_copy and args[0].shape == self.shape:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kept", "casts"), [(2**20, 1), (0, 4)])
def test_under_autocast_the_head_is_cast_once_for_all_logits_that_are_kept(
    kept: int, casts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its gradient back once. Lightning turns off the cache of casts that autocast has."""
    monkeypatch.setattr(logps_module, "KEPT_ELEMENTS", kept * VOCABULARY)
    policy = Policy(tiny_model("llama"))
    batch = pack(draw_pairs(), policy.layout)
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", -(-len(batch.target) // 4) * VOCABULARY)
    head = policy.model.get_output_embeddings().weight
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False), Casts(head.shape) as forward:
        loss = policy.logps(batch).logps.sum()
    with Casts(head.shape) as backward:
        loss.backward()
    assert forward.count == casts
    assert backward.count == (1 if kept else 2 * casts)  # of what is computed again the weights, too
