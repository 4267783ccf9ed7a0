"""An adapter changes nothing until it is trained, can be turned off, and scores the same wherever it is loaded."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dpo_lightning.data.packing import LAYOUTS, Layout, pack
from dpo_lightning.errors import InputError
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.checkpoint import load_config, load_policy
from dpo_lightning.models.policy import Policy, separate_logps
from dpo_lightning.models.reference import AdapterOff
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import Sigmoid
from tests.families import TREE_FAMILIES, tiny_model
from tests.oracles import draw_pairs

Folders = Callable[..., Path]

PAIRS = draw_pairs()


def train(policy: Policy, reference: AdapterOff, steps: int = 3) -> None:
    """Far enough that forgetting the adapter would show."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        batch = pack(PAIRS, policy.layout)
        optimizer.zero_grad()
        Sigmoid()(policy.logps(batch), reference.logps(batch)).mean().backward()
        optimizer.step()


def trained(checkpoint: Path, lora: LoRA | None = LoRA(r=2), **options: Any) -> tuple[Policy, AdapterOff]:
    policy = load_policy(str(checkpoint), lora=lora, **options)
    reference = AdapterOff()
    reference.prepare(policy)
    train(policy, reference)
    return policy, reference


@torch.no_grad()
def scores(policy: Policy | AdapterOff, layout: Layout) -> torch.Tensor:
    found: PairLogps = policy.logps(pack(PAIRS, layout))
    return found.token_logps


@torch.no_grad()
def elsewhere(model: Any) -> torch.Tensor:
    """What a model scores without any of this project's code but one forward an answer."""
    return separate_logps(model.eval(), PAIRS)


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi", "gemma2", "opt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_adapter_changes_nothing_and_training_it_leaves_the_model_as_it_was(
    family: str, layout: Layout, folders: Folders
) -> None:
    assert family in TREE_FAMILIES
    folder = folders(family)
    start = scores(load_policy(str(folder), layout=layout), layout)
    policy = load_policy(str(folder), layout=layout, lora=LoRA(r=2))
    assert torch.equal(scores(policy, layout), start)
    frozen = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    assert frozen and all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    reference = AdapterOff()
    reference.prepare(policy)
    train(policy, reference)
    assert apart(scores(policy, layout), start) > 1e-2
    assert torch.equal(scores(reference, layout), start)
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)


def test_the_reference_has_no_gradient_and_leaves_that_of_the_policy_alone(folders: Folders) -> None:
    """Turning the adapter off, between the policy's forward and its backward, is what takes its gradient away."""
    gradients = []
    for with_reference in (False, True):
        torch.manual_seed(0)  # of the adapter's A
        policy = load_policy(str(folders("llama")), lora=LoRA(r=2), gradient_checkpointing=True)
        reference = AdapterOff()
        reference.prepare(policy)
        batch = pack(PAIRS, policy.layout)
        found = policy.logps(batch)
        if with_reference:
            assert not reference.logps(batch).token_logps.requires_grad
        found.logps.sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
        assert policy.training
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True)) and len(gradients[0]) > 4


def test_dropout_in_the_adapter_is_off_in_the_reference(folders: Folders) -> None:
    policy, reference = trained(folders("llama"), LoRA(r=2, dropout=0.5))
    batch = pack(PAIRS, policy.layout)
    assert not torch.equal(scores(policy, policy.layout), scores(policy, policy.layout))
    assert torch.equal(reference.logps(batch).token_logps, reference.logps(batch).token_logps)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_what_is_exported_merged_or_alone_scores_the_same_elsewhere(
    family: str, folders: Folders, tmp_path: Path
) -> None:
    folder = folders(family)
    policy, reference = trained(folder)
    wanted, before = scores(policy, policy.layout), copy.deepcopy(policy.state_dict())
    policy.model.save_pretrained(tmp_path / "merged", state_dict=policy.adapter.merged())
    policy.adapter.save(tmp_path / "alone")
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not any("lora" in name for name in merged.state_dict())
    alone = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "alone"
    )
    for model in (merged, alone):
        assert apart(elsewhere(model), wanted) < 1e-5
    assert apart(wanted, scores(reference, policy.layout)) > 1e-2
    size = sum(path.stat().st_size for path in (tmp_path / "alone").iterdir())
    assert size < 0.5 * (tmp_path / "merged" / "model.safetensors").stat().st_size


def test_an_adapter_is_trained_further_against_what_it_was(folders: Folders, tmp_path: Path) -> None:
    first, _ = trained(folders("llama"))
    first.adapter.save(tmp_path / "first")
    wanted = scores(first, first.layout)
    assert load_config(str(tmp_path / "first")).model_type == "llama"
    policy = load_policy(str(tmp_path / "first"))
    reference = AdapterOff()
    reference.prepare(policy)
    assert apart(scores(policy, policy.layout), wanted) < 1e-6
    train(policy, reference)
    assert apart(scores(reference, policy.layout), wanted) < 1e-6  # not the bare model, which is further away
    assert apart(scores(policy, policy.layout), wanted) > 1e-2
    policy.adapter.save(tmp_path / "second")
    again = load_policy(str(tmp_path / "second"))
    assert apart(scores(again, again.layout), scores(policy, policy.layout)) < 1e-6
    model = AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=torch.float32)
    assert apart(elsewhere(PeftModel.from_pretrained(model, tmp_path / "second")), scores(policy, policy.layout)) < 1e-5


def test_a_model_is_known_by_what_it_starts_from_with_an_adapter_or_without(folders: Folders, tmp_path: Path) -> None:
    bare = load_policy(str(folders("llama"))).starting_tensors()
    adapted, _ = trained(folders("llama"))
    found = adapted.starting_tensors()
    assert found.keys() == bare.keys() and all(torch.equal(found[name], bare[name]) for name in bare)
    adapted.adapter.save(tmp_path / "adapter")
    further = load_policy(str(tmp_path / "adapter"))
    start = {name: value.clone() for name, value in further.starting_tensors().items()}
    assert start.keys() > bare.keys()
    reference = AdapterOff()
    reference.prepare(further)
    train(further, reference)
    assert all(torch.equal(value, start[name]) for name, value in further.starting_tensors().items())


# What cannot be


def test_an_adapter_of_another_model_is_refused(folders: Folders, tmp_path: Path) -> None:
    policy, _ = trained(folders("llama"))
    policy.adapter.save(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config.read_text())
    for family, options in (("gpt2", {}), ("llama", {"intermediate_size": 48}), ("llama", {"num_hidden_layers": 1})):
        base = tmp_path / f"{family}{len(options)}{options.get('num_hidden_layers', 2)}"
        tiny_model(family, **options).save_pretrained(base)
        config.write_text(json.dumps(said | {"base_model_name_or_path": str(base)}))
        with pytest.raises(InputError, match=r"the adapter does not fit .*base_model_name_or_path"):
            load_policy(str(tmp_path / "adapter"))
    config.write_text(json.dumps(said | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="gone: no such folder"):
        load_policy(str(tmp_path / "adapter"))
    config.write_text(json.dumps(said | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="names no base_model_name_or_path"):
        load_policy(str(tmp_path / "adapter"))
    config.write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json cannot be read"):
        load_policy(str(tmp_path / "adapter"))


def test_two_adapters_are_refused(folders: Folders, tmp_path: Path) -> None:
    policy, _ = trained(folders("llama"))
    policy.adapter.save(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is an adapter, which is trained further; remove model\.lora"):
        load_policy(str(tmp_path / "adapter"), lora=LoRA())


def test_layers_that_are_not_there_are_an_error_that_names_those_that_are(folders: Folders) -> None:
    with pytest.raises(InputError, match=r"target_modules \['q_prj'\].*layers are .*q_proj"):
        load_policy(str(folders("llama")), lora=LoRA(target_modules=["q_prj"]))


def test_one_name_of_layers_is_a_name_and_not_a_pattern(folders: Folders) -> None:
    policy = load_policy(str(folders("llama")), lora=LoRA(r=2, target_modules="q_proj"))
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert names and all(".q_proj.lora_" in name for name in names)
    pattern = load_policy(str(folders("llama")), lora=LoRA(r=2, target_modules=r".*\.[qk]_proj"))
    assert sum(p.requires_grad for p in pattern.parameters()) == 2 * len(names)


def test_an_adapter_that_cannot_be_kept_twice_is_refused_with_its_kind(folders: Folders, tmp_path: Path) -> None:
    policy, _ = trained(folders("llama"))
    policy.adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    with pytest.raises(InputError, match="type LORA with bias 'all' cannot be trained further"):
        load_policy(str(tmp_path))


@pytest.mark.parametrize("options", [{"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_a_number_that_cannot_be_meant_is_an_error_that_names_it(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"model\.lora\.{next(iter(options))} must be"):
        LoRA(**options).check()


def test_a_policy_without_an_adapter_has_none_to_turn_off(folders: Folders) -> None:
    with pytest.raises(InputError, match="the policy has no adapter"):
        AdapterOff().prepare(load_policy(str(folders("llama"))))
