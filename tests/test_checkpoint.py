"""From a folder to a policy: weights, precision, no noise, and what is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_lightning.data.packing import LAYOUTS, Layout, pack
from dpo_lightning.errors import InputError
from dpo_lightning.models.checkpoint import load_policy, noise_restored
from dpo_lightning.models.policy import Policy
from tests.families import (
    VOCABULARY,
    tiny_model,
)
from tests.oracles import (
    distance,
    dpo,
    draw_pairs,
    flat_gradient,
    oracle,
    plain_logps,
)


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
    with noise_restored(policy):
        policy.model.save_pretrained(tmp_path / "export")
        assert found() == rates
    assert found() == dict.fromkeys(rates, 0.0)
    saved = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {name: saved[name] for name in rates} == rates
    with pytest.raises(KeyboardInterrupt), noise_restored(policy):
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    family: str, layout: Layout, folders: Callable[..., Path]
) -> None:
    gradients, counts = [], []
    for enabled in (False, True):
        policy = load_policy(str(folders(family)), layout=layout, gradient_checkpointing=enabled).train()
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
