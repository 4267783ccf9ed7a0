"""From a folder to a repository, over a real connection to a hub on loopback, with the hub's own client."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data import world
from dpo_lightning.errors import InputError
from dpo_lightning.models import export as exporting
from dpo_lightning.models import hub
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.card import Provenance, card, license_of
from dpo_lightning.models.checkpoint import load_policy, load_tokenizer
from dpo_lightning.models.export import export
from dpo_lightning.models.hub import check_access, push
from dpo_lightning.training.publication import Publication
from tests.conftest import RunCli
from tests.hub_server import TOKEN, Handler, Hub, Repository

AGAIN = "push me again"
CONFIG = {"model": {"checkpoint": world.BASE}, "data": {"source": "world:pairs"}}


@pytest.fixture
def folder(toy: Path, tmp_path: Path) -> Path:
    """An export of the toy."""
    return exported(toy, tmp_path / "export")


def exported(toy: Path, place: Path, **options: object) -> Path:
    about = Provenance("a policy", CONFIG, "Sigmoid(beta=0.1)", True, {"val/loss": 0.5})
    name = str(toy / "model")
    export(load_policy(name, layout="padded"), load_tokenizer(name), place, about, **options)
    return place


def environment(served: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """That of a new process, with nothing but this hub and an empty cache."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    found |= {"HF_ENDPOINT": served.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return found | ({"HF_TOKEN": token} if token else {})


# Access


def test_a_repository_is_made_and_named_in_full(served: Hub) -> None:
    assert check_access("policy", True) == "somebody/policy"
    assert served.repositories["somebody/policy"].private
    assert check_access("somebody/other", None) == "somebody/other"
    assert not served.repositories["somebody/other"].private
    assert check_access("somebody/policy", True) == "somebody/policy"


def test_who_may_see_a_repository_is_not_changed_in_silence(served: Hub) -> None:
    check_access("policy", False)
    with pytest.raises(InputError, match="is there already and is public, but private is true"):
        check_access("policy", True)


def test_without_a_token_one_is_told_how_to_get_one(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        check_access("somebody/policy", None)
    assert not served.seen


def test_a_token_that_is_refused_is_not_told(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherSecret")
    with pytest.raises(InputError, match="does not accept the access token") as caught:
        check_access("somebody/policy", None)
    assert "hf_AnotherSecret" not in str(caught.value)


@pytest.mark.parametrize("there", [False, True], ids=["absent", "there"])
def test_a_name_without_permission_is_refused(served: Hub, there: bool) -> None:
    """Of a repository that is there `create_repo` says nothing."""
    served.tokens["other"] = "other"
    if there:
        served.repositories["other/policy"] = Repository()
    with pytest.raises(InputError, match="of somebody, may not write to other/policy"):
        check_access("other/policy", None)


def test_an_organization_that_lets_one_write_is_no_other_case(served: Hub) -> None:
    served.organizations["lab"] = ["somebody"]
    assert check_access("lab/policy", None) == "lab/policy"


@pytest.mark.parametrize("name", ["a/b/c", "some body/x", "-x/y", "somebody/x.git", ""])
def test_a_name_that_is_none_is_refused_without_asking(served: Hub, name: str) -> None:
    with pytest.raises(InputError, match="no name of a repository"):
        check_access(name, None)
    assert not served.seen


def test_a_hub_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, served: Hub) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"http://127.0.0.1:9, cannot be reached"):
        check_access("somebody/policy", None)


def test_offline_nothing_is_tried(monkeypatch: pytest.MonkeyPatch, served: Hub) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_access("somebody/policy", None)
    assert not served.seen


def test_a_token_that_may_only_read_is_refused(served: Hub) -> None:
    served.repositories["somebody/policy"] = Repository(private=True)
    served.read_only.add(TOKEN)
    for name in ("policy", "another"):
        with pytest.raises(InputError, match=f"may not write to somebody/{name}"):
            check_access(name, None)


@pytest.mark.parametrize("token", ["hf_abc\N{HORIZONTAL ELLIPSIS}", "hf_a\tb"])
def test_a_token_that_was_copied_in_part_is_refused_without_asking(
    served: Hub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(InputError, match="characters that no token has") as caught:
        check_access("somebody/policy", None)
    assert not served.seen and token not in str(caught.value)


def test_what_is_no_hub_is_said(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page to log in, as of a hotel's network."""
    monkeypatch.setattr(Handler, "whoami", lambda self, _: self.answer(b"<html>Welcome</html>"))
    monkeypatch.setattr("tests.hub_server.ROUTES", ((r"/api/whoami-v2", Handler.whoami),))
    with pytest.raises(InputError, match="does not answer as a hub does"):
        check_access("somebody/policy", None)


def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_made(served: Hub) -> None:
    with pytest.raises(InputError, match='does not take the model card: "license" must be one of'):
        check_access("somebody/policy", None, lambda: "---\nlicense: none-of-the-hubs\n---\n")
    assert not served.repositories


def test_a_hub_in_trouble_is_said(served: Hub) -> None:
    served.faults["/api/whoami-v2"] = 500
    with pytest.raises(InputError, match="answers: "):
        check_access("somebody/policy", None)


# Pushing


def test_what_is_pushed_is_the_folder(served: Hub, folder: Path, tmp_path: Path) -> None:
    logs = tmp_path / "version_3" / "events.out.tfevents.1.host"
    logs.parent.mkdir()
    logs.write_bytes(b"figures")
    name = check_access("policy", None)
    assert push(folder, name, "one", AGAIN, {"tiny-3/events.1": logs}) == f"{served.address}/somebody/policy"
    files = served.repositories[name].files
    assert {path: content for path, content in files.items() if not path.startswith("runs/")} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert files["runs/tiny-3/events.1"] == b"figures"
    assert {"model.safetensors", "tokenizer.json", "config.json", "generation_config.json", "README.md"} <= set(files)


def test_a_second_push_is_an_update_in_one_commit_without_the_first_one_s_weights(
    served: Hub, folder: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = check_access("policy", None)
    monkeypatch.setattr(exporting, "SHARD", "20KB")
    sharded = exported(toy, tmp_path / "sharded")
    push(sharded, name, "sharded", AGAIN)
    first = served.repositories[name].files
    assert len([path for path in first if path.endswith(".safetensors")]) > 1
    own = dict.fromkeys(("notes.md", "gguf/model.safetensors", "my-adapter.safetensors"), b"somebody's own")
    served.repositories[name].files.update(own)
    push(folder, name, "whole", AGAIN)
    assert len(served.repositories[name].commits) == 3  # an empty one, and one for each push
    files = served.repositories[name].files
    assert [path for path in files if "safetensors" in path and path not in own] == ["model.safetensors"]
    assert all(files[path] == own[path] for path in own)


def test_what_an_earlier_adapter_left_goes(served: Hub, folder: Path) -> None:
    name = check_access("policy", None)
    stale = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "reward_curves.png")
    served.repositories[name].files.update(dict.fromkeys(stale, b"old"))
    push(folder, name, "one", AGAIN)
    assert not {*stale} & {*served.repositories[name].files}


@pytest.mark.parametrize("status", [408, 409, 429, 503])
def test_what_may_pass_is_tried_again(served: Hub, folder: Path, status: int) -> None:
    name = check_access("policy", None)
    served.fleeting[f"/api/models/{name}/commit"] = status
    push(folder, name, "one", AGAIN)
    assert not served.fleeting and served.repositories[name].files


def test_a_no_is_not_asked_for_twice(served: Hub, folder: Path) -> None:
    name = check_access("policy", None)
    served.faults[f"/api/models/{name}/commit"] = 403
    with pytest.raises(InputError, match="failed") as caught:
        push(folder, name, "one", AGAIN)
    assert served.seen.count(f"POST /api/models/{name}/commit/main") == 1
    assert TOKEN not in str(caught.value) and "Bearer ***" in str(caught.value)  # which the server told


def test_a_commit_whose_answer_is_lost_is_not_made_again(served: Hub, folder: Path) -> None:
    name = check_access("policy", None)
    served.lost = 1
    push(folder, name, "one", AGAIN)
    assert len(served.repositories[name].commits) == 2


def test_an_upload_that_is_cut_in_the_middle_is_repeated(
    served: Hub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = check_access("policy", None)
    served.cut = 8  # more often than huggingface_hub itself tries
    shorten_backoff(monkeypatch)
    push(folder, name, "one", AGAIN)
    assert served.cut == 0 and served.uploads > 8
    assert served.repositories[name].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "it is begun again" in capsys.readouterr().out


def test_a_commit_that_fails_is_repeated_without_the_large_files(
    served: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = check_access("policy", None)
    served.faults[f"/api/models/{name}/commit"] = 503
    shorten_backoff(monkeypatch)
    with pytest.raises(InputError, match=rf"{folder} is whole, push it with `push me again`"):
        push(folder, name, "one", AGAIN)
    assert not served.repositories[name].files and served.uploads == 1
    del served.faults[f"/api/models/{name}/commit"]
    push(folder, name, "one", AGAIN)
    assert served.repositories[name].files and served.uploads == 1


def test_a_card_that_the_hub_refuses_is_not_tried_again(served: Hub, toy: Path, tmp_path: Path) -> None:
    about = Provenance("a policy", CONFIG, "Sigmoid(beta=0.1)", True, license={"license": "none-of-the-hubs"})
    name = str(toy / "model")
    export(load_policy(name, layout="padded"), load_tokenizer(name), tmp_path / "export", about)
    repository = check_access("policy", None)
    with pytest.raises(InputError, match='"license" must be one of'):
        push(tmp_path / "export", repository, "one", AGAIN)
    assert served.seen.count("POST /api/validate-yaml") == 1


def shorten_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own waiting between its tries."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


# What is exported


def test_a_large_model_is_several_files_and_loads(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exporting.SHARD == "5GB"
    monkeypatch.setattr(exporting, "SHARD", "20KB")
    place = exported(toy, tmp_path / "sharded")
    index = json.loads((place / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one, other = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in (place, toy / "model"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_s_export_tells_what_it_is(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    done = run_cli("fit", *toy_words, "--trainer.max_steps", 3, "--license", "apache-2.0")
    assert done.status == 0, done.err
    run = tmp_path / "runs" / "version_0"
    found = ModelCard.load(run / "export" / "README.md")
    text = found.content
    assert found.data.license == "apache-2.0" and "dpo" in found.data.tags
    assert {result.metric_type for result in found.data.eval_results} >= {"val/loss", "val/rewards/accuracies"}
    assert "python -m dpo_lightning fit --model.checkpoint" in text and "--license apache-2.0" in text
    assert "| optimizer | AdamW, learning rate 0.001 |" in text
    assert "| batch | 4 pairs (4 x 1 accumulated x 1 devices) |" in text and "| optimizer steps | 3 |" in text
    assert "![Curves of the run](reward_curves.png)" in text
    assert (run / "export" / "reward_curves.png").read_bytes() == (run / "reward_curves.png").read_bytes()
    assert yaml.safe_load((run / "export" / "config.yaml").read_text())["license"] == "apache-2.0"
    assert str(tmp_path) not in text and str(toy_words[1]) not in text

    again = tmp_path / "again"
    done = run_cli("export", "--ckpt_path", run / "checkpoints/last.ckpt", "--output_dir", again)
    assert done.status == 0, done.err
    other = ModelCard.load(again / "README.md")
    assert other.data.license is None  # the toy's own card says nothing
    assert "That of the base model" in other.content and "python -m dpo_lightning fit" in other.content
    assert {path.name for path in again.iterdir()} == {path.name for path in (run / "export").iterdir()}


@pytest.mark.parametrize(
    ("readme", "wanted"),
    [
        ("---\ntitle: My model: the best\n---\n", {}),
        ("---\n1: 2\nlicense: mit\n---\n", {}),
        ("no card at all", {}),
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.org\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "https://example.org"},
        ),
    ],
)
def test_a_base_model_s_card_gives_its_licence_and_can_spoil_nothing(
    tmp_path: Path, readme: str, wanted: dict[str, str]
) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert license_of(str(tmp_path), ask=False) == wanted


def test_a_licence_of_the_hub_s_is_only_asked_for_where_one_pushes(served: Hub) -> None:
    served.repositories["somebody/base"] = Repository(commits=[{"README.md": b"---\nlicense: mit\n---\n"}])
    assert license_of("somebody/base", ask=False) == {} and not served.seen
    assert license_of("somebody/base", ask=True) == {"license": "mit"}


def test_a_licence_of_another_name_and_bars_in_tables_are_written_so(toy: Path, tmp_path: Path) -> None:
    known = {"license": "other", "license_name": "mine", "license_link": "https://example.org"}
    config = {**CONFIG, "model": {"checkpoint": world.BASE, "lora": {"r": 4, "target_modules": "c_attn|c_fc"}}}
    about = Provenance("a policy", config, "Sigmoid(beta=0.1)", True, license=known)
    text = str(card(about, longest=8, templated=False, curves=False, adapter=False))
    assert "[mine](https://example.org)" in text and "license_link: https://example.org" in text
    assert r"target_modules c_attn\|c_fc" in text


def test_figures_are_of_what_was_validated_on() -> None:
    config = {**CONFIG, "data": {"source": "me/pairs", "val_source": "data/val.jsonl", "val_split": None}}
    about = Provenance("a policy", config, "Sigmoid(beta=0.1)", True, {"val/loss": 0.5})
    found = card(about, longest=8, templated=False, curves=False, adapter=False)
    assert {result.dataset_name for result in found.data.eval_results} == {"val.jsonl"}
    assert found.data.datasets == ["me/pairs"] and "On `val.jsonl`:" in str(found)


@pytest.mark.parametrize("templated", [False, True], ids=["plain", "chat template"])
def test_the_card_s_program_runs(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], templated: bool
) -> None:
    """On a machine where the place is a folder."""
    model, tokenizer = load_policy(str(toy / "model"), layout="padded"), load_tokenizer(str(toy / "model"))
    if templated:
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    export(model, tokenizer, tmp_path / "export", Provenance("a policy", CONFIG, "Sigmoid(beta=0.1)", True))
    text = (tmp_path / "export" / "README.md").read_text()
    program = re.search("```python\n(.*?)```", text, re.DOTALL)[1].replace(
        "path/to/this/folder", str(tmp_path / "export")
    )
    assert ("apply_chat_template" in program) == templated
    capsys.readouterr()
    exec(program, {})
    assert capsys.readouterr().out.strip()


# The command line


def test_a_fit_pushes_and_a_new_process_loads_the_same_scores(
    served: Hub, toy_words: list[str], tmp_path: Path
) -> None:
    words = [*toy_words, "--trainer.max_steps", "2", "--push_to_hub", "policy", "--private", "true"]
    words += ["--model.loss.beta", "0.25"]
    command = [sys.executable, "-m", "dpo_lightning", "fit", *words, "--push_logs", "true"]
    done = subprocess.run(
        command, env=environment(served, tmp_path / "home"), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"On the hub: {served.address}/somebody/policy" in done.stdout
    repository = served.repositories["somebody/policy"]
    assert repository.private and any(path.startswith("runs/runs-version_0/events.out") for path in repository.files)
    run = tmp_path / "runs" / "version_0"
    everything = [done.stdout, done.stderr, *repository.messages]
    everything += [file.read_bytes().decode(errors="ignore") for file in run.rglob("*") if file.is_file()]
    assert not any(TOKEN in text for text in everything)
    assert 'from_pretrained("somebody/policy")' in repository.files["README.md"].decode()

    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        "torch.save(model(torch.tensor([[1, 2, 3, 4]])).logits, sys.argv[2])\n"
        "from dpo_lightning.ui.voice import Voice, beta_of, reference_of\n"
        "assert Voice(sys.argv[1]).policy.model.config.vocab_size == model.config.vocab_size\n"
        "print(beta_of(sys.argv[1]), reference_of(sys.argv[1]))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program, "somebody/policy", str(tmp_path / "logits.pt")],
        **{"env": environment(served, tmp_path / "other home"), "capture_output": True, "text": True, "timeout": 300},
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == ["0.25", toy_words[1]]  # the page knows what it was trained with and from
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    AutoTokenizer.from_pretrained(run / "export")
    with torch.no_grad():
        wanted = model(torch.tensor([[1, 2, 3, 4]])).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)
    assert load_file(run / "export" / "model.safetensors")


@pytest.mark.parametrize("verb", ["fit", "export"])
def test_what_may_not_be_pushed_is_refused_before_any_work(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, served: Hub, verb: str
) -> None:
    if verb == "export":
        assert run_cli("fit", *toy_words, "--trainer.max_steps", 1).status == 0
        last = tmp_path / "runs/version_0/checkpoints/last.ckpt"
        words = ["--ckpt_path", last, "--output_dir", tmp_path / "out"]
    else:
        words = toy_words
    done = run_cli(verb, *words, "--push_to_hub", "other/policy")
    assert done.status == 2 and "may not write to other/policy" in done.err[-1]
    assert TOKEN not in done.out + "".join(done.err)
    assert not (tmp_path / "out").exists() and (verb == "export" or not (tmp_path / "runs").exists())


def test_an_exported_config_makes_the_model_again_anywhere_and_pushes_nothing(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that went on from another, with an option of two lines and a secret."""
    lora = '{r: 4,\n target_modules: ".*(c_attn|c_fc)"}'
    words = [*toy_words, "--model.lora", lora, "--model.lr_scheduler", "constant"]
    assert run_cli("fit", *words, "--trainer.max_steps", 2).status == 0
    pushing = ["--push_to_hub", "policy", "--push_logs", "true", "--private", "false"]
    done = run_cli("fit", *words, "--trainer.max_steps", 4, "--ckpt_path", "last", *pushing)
    assert done.status == 0, done.err
    export = tmp_path / "runs/version_1/export"
    text = (export / "README.md").read_text()
    assert text.count("python -m dpo_lightning fit --model.checkpoint") == 2  # both runs'
    assert "target_modules: " in text
    monkeypatch.chdir(export)
    seen = len(served.repositories["somebody/policy"].commits)
    done = run_cli("fit", "--config", "config.yaml", "--trainer.default_root_dir", tmp_path / "again")
    assert done.status == 0, done.err
    one, two = (load_file(folder / "model.safetensors") for folder in (export, tmp_path / "again/version_0/export"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(served.repositories["somebody/policy"].commits) == seen

    # The run's own config still pushes, unless that is switched off as a whole.
    config = tmp_path / "runs/version_1/config.yaml"
    last = ["--ckpt_path", tmp_path / "runs/version_1/checkpoints/last.ckpt", "--trainer.max_steps", 5]
    done = run_cli("fit", "--config", config, *last, "--push_to_hub", "null")
    assert done.status == 0, done.err
    assert len(served.repositories["somebody/policy"].commits) == seen
    done = run_cli("export", *last[:2], "--output_dir", tmp_path / "out")
    assert done.status == 0, done.err


def test_what_is_of_no_use_on_the_hub_is_refused_and_makes_no_repository(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, served: Hub
) -> None:
    words = [*toy_words, "--push_to_hub", "policy"]
    for wrong, said in (
        (["--model.lora.r", 4, "--model.lora.merge", "false"], "is not on the hub; export the merged model"),
        (["--trainer.fast_dev_run", "true"], "is a trial, which is not for the hub"),
        (["--license", "none-of-the-hubs"], "does not take the model card"),
        (["--model.pair_ledger", "true", "--trainer.limit_val_batches", 0], "model.pair_ledger keeps validation pairs"),
    ):
        done = run_cli("fit", *words, *wrong)
        assert done.status == 2 and said in done.err[-1]
        assert not served.repositories and not (tmp_path / "runs").exists()


def test_an_adapter_of_a_model_of_the_hub_s_is_pushed_alone(served: Hub, toy: Path, tmp_path: Path) -> None:
    config = {"model": {"checkpoint": "somebody/base", "lora": {"r": 4, "merge": False}}, "data": {"source": "a/b"}}
    name = Publication(push_to_hub="policy").check(config, adapter=True).push_to_hub
    policy = load_policy(str(toy / "model"), layout="padded", lora=LoRA(r=4))
    about = Provenance("a policy", config, "Sigmoid(beta=0.1)", True, repository=name)
    export(policy, load_tokenizer(str(toy / "model")), tmp_path / "export", about, adapter_only=True)
    push(tmp_path / "export", name, "one", AGAIN)
    text = served.repositories[name].files["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("somebody/base"), "somebody/policy")' in text
    assert "library_name: peft" in text and "adapter_model.safetensors" in served.repositories[name].files


def test_options_of_the_hub_that_would_do_nothing_are_refused(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path
) -> None:
    for words in (["--private", "true"], ["--push_logs", "true"]):
        done = run_cli("fit", *toy_words, *words)
        assert done.status == 2 and "nothing is pushed; set push_to_hub" in done.err[-1]
        done = run_cli("export", "--ckpt_path", "none", "--output_dir", "none", *words)
        assert done.status == 2 and "nothing is pushed; set push_to_hub" in done.err[-1]
    done = run_cli("validate", *toy_words, "--push_to_hub", "somebody/policy")
    assert done.status == 2 and "validate exports nothing" in done.err[-1]
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_upload_fails_keeps_what_it_has(
    run_cli: RunCli, toy_words: list[str], tmp_path: Path, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_backoff(monkeypatch)
    served.faults["/api/models/somebody/policy/commit"] = 503
    words = [*toy_words, "--trainer.max_steps", 1, "--trainer.enable_checkpointing", "false"]
    done = run_cli("fit", *words, "--push_to_hub", "somebody/policy")
    export = tmp_path / "runs/version_0/export"
    assert done.status == 2 and f"push it with `hf upload somebody/policy {export}`" in done.err[-1]
    assert (export / "model.safetensors").exists()


def test_a_sweep_pushes_nothing(run_cli: RunCli, toy_words: list[str], tmp_path: Path) -> None:
    """Its runs would all go to one repository."""
    names = dict(zip(toy_words[::2], toy_words[1::2], strict=True))
    config = {"model": {"checkpoint": names["--model.checkpoint"]}, "data": {"source": names["--data.source"]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "push_to_hub": "somebody/policy"}))
    (tmp_path / "grid.yaml").write_text("search: {test: false}\nmodel.loss.beta: [0.1, 0.2]\n")
    words = ["--config", tmp_path / "config.yaml", "--grid", tmp_path / "grid.yaml", "--output_dir", tmp_path / "out"]
    done = run_cli("sweep", *words)
    assert done.status == 2 and "push_to_hub is given, but a sweep's runs would all go to one" in done.err[-1]
    assert not (tmp_path / "out" / "runs").exists()
