"""The policy in every layout against plain forwards of one sequence each, and what the self-check and loading refuse.

Legend: B pairs  N answer tokens  V vocabulary
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from dpo_lightning.data.packing import LAYOUTS, Layout, PreferenceBatch, pack, visible
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.errors import InputError
from dpo_lightning.models import policy as module
from dpo_lightning.models.checkpoint import dropout_restored, load_policy
from dpo_lightning.models.policy import Policy, TreeAttention, self_check
from dpo_lightning.models.reference import FrozenModel
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import Sigmoid
from tests.families import (
    CONTEXT,
    INDEX_WINDOW_FAMILIES,
    PADDED_FAMILIES,
    TREE_FAMILIES,
    VOCABULARY,
    WINDOW,
    tiny_model,
)

BETA = 0.5

#: Prompt, chosen, rejected: longer than the windows, one-token answers, an empty prompt, a prompt of one token.
LENGTHS = [(9, 7, 3), (6, 1, 8), (0, 4, 2), (1, 5, 1), (12, 6, 6)]

#: Several trees a row, several rows, padding, and rows longer than the model's context.
ROW_TOKENS = CONTEXT + 16


def draw_pairs(lengths: Sequence[tuple[int, int, int]] = LENGTHS) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    return [TokenPair(*(rng.integers(0, VOCABULARY, length, dtype=np.int32) for length in item)) for item in lengths]


def plain_logps(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> list[Tensor]:
    """The oracle: one forward an answer, no mask, no padding; token log-probabilities by answer, chosen first."""
    answers = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    logps = []
    for prompt, answer in answers:
        tokens = torch.tensor([*prompt.tolist(), *answer.tolist()])
        scores = torch.log_softmax(model(input_ids=tokens[None]).logits[0], -1)  # [T, V]
        scored = range(max(len(prompt), 1), len(tokens))
        logps.append(torch.stack([scores[i - 1, tokens[i]] for i in scored]))
    return logps


def plain_dpo(logps: Sequence[Tensor], reference: Tensor) -> Tensor:
    """The DPO loss of Rafailov et al. 2023, eq. 7, written out; `reference` `[2 * B]` are constants."""
    ratios = torch.stack([tokens.sum() for tokens in logps]) - reference
    chosen, rejected = ratios.chunk(2)
    return torch.log1p(torch.exp(-BETA * (chosen - rejected))).mean()


def dpo(found: PairLogps, reference: Tensor) -> Tensor:
    """The same loss by the package."""
    constant = PairLogps(reference, torch.arange(len(reference)), found.num_pairs, found.num_answers)
    return Sigmoid(BETA)(found, constant).mean()


def flat_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """The gradient of all parameters as one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


@dataclass(frozen=True)
class Oracle:
    """What plain forwards give: `logps` `[N]`, and the `gradient` of the DPO loss against `reference` `[2 * B]`."""

    logps: Tensor
    reference: Tensor
    gradient: Tensor


@cache
def oracle(family: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Oracle:
    model = tiny_model(family, dtype, attention)
    logps = plain_logps(model, draw_pairs())
    # So near the policy that every pair's sigmoid has a slope.
    reference = torch.stack([tokens.sum().detach() for tokens in logps]) + torch.linspace(-1, 1, len(logps))
    gradient = flat_gradient(plain_dpo(logps, reference), model)
    return Oracle(torch.cat(logps).detach(), reference, gradient)


def assert_agrees(model: PreTrainedModel, layout: Layout, wanted: Oracle, share: float) -> None:
    """Log-probabilities and the gradient of a DPO loss differ from the oracle's by no more than `share` of it."""
    found = Policy(model, layout).logps(pack(draw_pairs(), layout, row_tokens=ROW_TOKENS))
    assert distance(found.token_logps, wanted.logps) < share
    assert distance(flat_gradient(dpo(found, wanted.reference), model), wanted.gradient) < share


EAGER = [("gpt2", "eager"), ("llama", "eager"), ("gemma3", "eager"), ("mistral", "eager")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "attention"), [*((family, None) for family in TREE_FAMILIES), *EAGER])
def test_every_layout_equals_separate_forwards_in_value_and_gradient(
    family: str, attention: str | None, layout: Layout
) -> None:
    assert_agrees(tiny_model(family, attn_implementation=attention), layout, oracle(family, attention), share=1e-5)


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
    assert policy.layout == "shared" and policy.reasons == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", PADDED_FAMILIES)
def test_auto_gives_the_others_padded_rows_and_says_why(family: str, dtype: torch.dtype) -> None:
    policy = Policy(tiny_model(family, dtype))
    assert policy.layout == "padded"
    assert [reason.split(":")[0] for reason in policy.reasons] == ["shared", "packed"]


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
    assert str(caught.value).count("broken") == 3
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
        policy = Policy(tiny_model(family, dtype), layout)
        with monkeypatch.context() as patch:
            assert fault_of(policy, patch, module, "visible", fault) is not None, family


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

    def dampen(attention: TreeAttention, batch: PreferenceBatch, window: int | None) -> Tensor:
        return torch.where(visible(batch, window), 0.0, -13.0)[:, None]

    reason = fault_of(policy, monkeypatch, TreeAttention, "_mask", dampen)
    assert reason is not None and reason.startswith("other chosen tokens move the rejected")


# Loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny model of a family, with options, and gives its folder; the same one for the same question."""

    def folder(family: str, **options: object) -> Path:
        path = root / (family + "".join(f"-{name}-{value}" for name, value in options.items()))
        if not path.exists():
            tiny_model(family, **options).save_pretrained(path)
        return path

    root = tmp_path_factory.mktemp("models")
    return folder


@pytest.fixture
def broken(folders: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a good folder, to be broken."""
    return Path(shutil.copytree(folders("llama"), tmp_path / "broken-llama"))


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


NOISE = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "gpt-neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "bloom": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "mixtral": {"router_jitter_noise": 0.5},
}


@pytest.mark.parametrize(("family", "noise"), NOISE.items(), ids=NOISE)
def test_a_loaded_policy_in_training_mode_has_no_noise(
    family: str, noise: dict[str, float], folders: Callable[..., Path]
) -> None:
    pairs = draw_pairs()
    noisy = tiny_model(family, **noise)
    with torch.no_grad():
        wanted = torch.cat(plain_logps(noisy, pairs))
        first, second = (torch.cat(plain_logps(noisy.train(), pairs)) for _ in range(2))
        assert not torch.equal(first, second)  # the family does have noise
        policy = load_policy(str(folders(family, **noise))).train()
        assert distance(policy.logps(pack(pairs, policy.layout)).token_logps, wanted) < 1e-5


def test_dropout_is_restored_for_the_export_and_only_there(folders: Callable[..., Path], tmp_path: Path) -> None:
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3}
    policy = load_policy(str(folders("gpt2", **rates)))
    config = policy.model.config

    def found() -> dict[str, float]:
        return {name: getattr(config, name) for name in rates}

    assert found() == dict.fromkeys(rates, 0.0)
    with dropout_restored(policy):
        policy.model.save_pretrained(tmp_path / "export")
        assert found() == rates
    assert found() == dict.fromkeys(rates, 0.0)
    saved = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {name: saved[name] for name in rates} == rates
    with pytest.raises(KeyboardInterrupt), dropout_restored(policy):
        raise KeyboardInterrupt
    assert found() == dict.fromkeys(rates, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_the_checkpoints_in_torchs_default_dtype(
    dtype: torch.dtype, folders: Callable[..., Path], default_dtype: None
) -> None:
    folder = folders("llama")
    wanted = dict(tiny_model("llama").named_parameters())
    torch.set_default_dtype(dtype)
    policy = load_policy(str(folder))
    found = dict(policy.model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert parameter.dtype == dtype and parameter.requires_grad
        assert torch.equal(parameter, wanted[name].to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_policy_takes_the_layout_and_the_attention_it_is_told(
    layout: Layout, folders: Callable[..., Path]
) -> None:
    policy = load_policy(str(folders("llama")), layout=layout, attn_implementation="eager")
    assert policy.layout == layout and policy.model.config._attn_implementation == "eager"


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_half_the_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def with_a_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def with_another_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY + 1}))


def with_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def with_an_unknown_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))


def with_an_encoder_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        (without_config, "config.json"),
        (without_weights, "model.safetensors"),
        (without_a_tensor, "lack 1 tensor.*model.layers.1.mlp.up_proj.weight"),
        (with_half_the_weights, ""),
        (with_a_git_lfs_pointer, ""),
        (with_another_vocabulary, ""),
        (with_broken_config, "config"),
        (with_an_unknown_family, "no_such_family"),
        (with_an_encoder_decoder, "causal"),
    ],
)
def test_a_broken_folder_is_refused_by_name(breakage: Callable[[Path], None], expected: str, broken: Path) -> None:
    breakage(broken)
    with pytest.raises(InputError, match=f"(?s)broken-llama.*{expected}"):
        load_policy(str(broken))


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "no/such/folder"])
def test_a_folder_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: no such folder"):
        load_policy(name)


def test_a_file_is_not_a_folder(folders: Callable[..., Path]) -> None:
    weights = folders("llama") / "model.safetensors"
    with pytest.raises(InputError, match=r"model\.safetensors: no such folder"):
        load_policy(str(weights))


def mlp_runs(policy: Policy) -> list[int]:
    """Grows by one each time that the first layer's MLP is run."""
    mlp = next(part for name, part in policy.named_modules() if name.endswith("mlp"))
    runs: list[int] = []
    mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(family: str, folders: Callable[..., Path]) -> None:
    gradients, counts = [], []
    for enabled in (False, True):
        policy = load_policy(str(folders(family)), gradient_checkpointing=enabled).train()
        runs = mlp_runs(policy)
        found = policy.logps(pack(draw_pairs(), policy.layout))
        gradients.append(flat_gradient(dpo(found, oracle(family).reference), policy))
        counts.append(len(runs))
    assert counts == [1, 2]
    for gradient in gradients:
        assert distance(gradient, oracle(family).gradient) < 1e-5


def test_gradient_checkpointing_is_at_work_in_the_mode_that_a_policy_is_handed_over_in(
    folders: Callable[..., Path],
) -> None:
    """Lightning leaves a module in the mode that it finds it in, and transformers checkpoints in training mode only."""
    policy = load_policy(str(folders("llama")), gradient_checkpointing=True)
    runs = mlp_runs(policy)
    policy.logps(pack(draw_pairs(), policy.layout)).logps.sum().backward()
    assert len(runs) == 2


# The frozen reference


class Trained(nn.Module):
    """A policy and its reference side by side, as in the training module."""

    def __init__(self, policy: Policy, reference: FrozenModel) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        reference.prepare(policy)


@pytest.fixture
def trained() -> Trained:
    """With dropout, so that a reference that leaves evaluation mode shows."""
    policy = Policy(tiny_model("gpt2", resid_pdrop=0.5))
    return Trained(policy.train(), FrozenModel())


def test_a_frozen_copy_scores_as_the_policy_did_at_the_start_whatever_comes(trained: Trained) -> None:
    batch = pack(draw_pairs(), "shared")
    wanted = oracle("gpt2").logps
    trained.train()
    with torch.no_grad():
        for parameter in trained.policy.parameters():
            parameter.mul_(1.5)
    found = trained.reference.logps(batch)
    assert distance(found.token_logps, wanted) < 1e-5
    assert not found.token_logps.requires_grad
    assert torch.equal(trained.reference.logps(batch).token_logps, found.token_logps)
    assert distance(trained.policy.eval().logps(batch).token_logps, wanted) > 1e-2  # the policy did move


def test_the_reference_gets_no_gradient_and_offers_no_parameter_to_train(trained: Trained) -> None:
    batch = pack(draw_pairs(), "shared")
    Sigmoid()(trained.policy.logps(batch), trained.reference.logps(batch)).mean().backward()
    assert any(p.grad is not None for p in trained.policy.parameters())
    assert all(p.grad is None and not p.requires_grad for p in trained.reference.parameters())
    assert all(p.requires_grad for p in trained.policy.parameters())


def test_the_reference_is_in_no_checkpoint(trained: Trained) -> None:
    names = set(trained.state_dict())
    assert names == {f"policy.{name}" for name in trained.policy.state_dict()} and names
    assert trained.reference.state_dict() == {}


def test_the_reference_stays_in_evaluation_mode(trained: Trained) -> None:
    assert not any(part.training for part in trained.reference.model.modules())
    trained.train()
    assert all(part.training for part in trained.policy.modules())
    assert not any(part.training for part in trained.reference.modules())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_checkpoint_can_be_the_reference(layout: Layout, folders: Callable[..., Path]) -> None:
    other = folders("mistral")
    trained = Trained(Policy(tiny_model("gpt2"), layout), FrozenModel(str(other)))
    found = trained.reference.logps(pack(draw_pairs(), layout)).token_logps
    assert distance(found, oracle("mistral").logps) < 1e-5
    assert trained.reference.model.layout == layout
    assert not any(name.startswith("reference") for name in trained.state_dict())


def test_a_reference_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path / "nowhere")):
        FrozenModel(str(tmp_path / "nowhere")).prepare(Policy(tiny_model("gpt2")))


def test_the_pairs_of_these_tests_outlast_the_windows() -> None:
    """Or a window that is dropped would not show."""
    batch = pack(draw_pairs(), "shared", row_tokens=ROW_TOKENS)
    assert max(prompt for prompt, _, _ in LENGTHS) > 2 * WINDOW
    assert len(batch.tokens) > 1 and batch.tokens.shape[1] > CONTEXT and (batch.tree < 0).any()
