"""A model that is talked to: answers, stops, scores."""

import json
import shlex
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dpo_lightning.data import world
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.errors import InputError
from dpo_lightning.models.policy import separate_logps
from dpo_lightning.ui.training import training_command
from dpo_lightning.ui.voice import Sampling, Voice, beta_of, check_same_tokens, option, reference_of
from dpo_lightning.ui.votes import Answered, Cast, cast, record
from tests.conftest import RunCli

QUESTION = [{"role": "user", "content": "What does an electrician do?"}]
SHORT = Sampling(temperature=1.0, max_new_tokens=24)


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voice(world.BASE)


def whole(voice: Voice, sampling: Sampling) -> list[int]:
    prompt = voice.ids(voice.text(QUESTION), sampling.max_new_tokens)
    *_, last = voice.stream(prompt, sampling)
    return last.tolist()


def test_greedy_is_transformers_own(voice: Voice) -> None:
    prompt = voice.ids(voice.text(QUESTION), 24)
    tokens = torch.as_tensor(prompt)[None]
    wanted = voice.policy.model.generate(tokens, max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert whole(voice, Sampling(temperature=0, max_new_tokens=24)) == wanted


def test_a_seed_is_an_answer(voice: Voice) -> None:
    drawn = [whole(voice, Sampling(1.0, 1.0, 24, seed)) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(answer) for answer in drawn}) > 1


def test_the_least_share_and_a_low_temperature_are_greedy(voice: Voice) -> None:
    greedy = whole(voice, Sampling(temperature=0, max_new_tokens=24))
    assert whole(voice, Sampling(1.0, 1e-6, 24, 5)) == greedy
    assert whole(voice, Sampling(1e-4, 1.0, 24, 5)) == greedy


def test_an_answer_grows_token_by_token_and_can_be_left(voice: Voice) -> None:
    prompt = voice.ids(voice.text(QUESTION), 24)
    with closing(voice.stream(prompt, SHORT)) as stream:
        first, second = next(stream), next(stream)
    assert second[:-1].tolist() == first.tolist() and len(first) == 1
    assert not voice.lock.locked()  # the next visitor does not wait


def test_who_waits_for_another_s_answer_can_leave(voice: Voice) -> None:
    prompt = voice.ids(voice.text(QUESTION), 24)
    with voice.lock, closing(voice.stream(prompt, SHORT, every=0.05)) as stream:
        assert len(next(stream)) == 0 and len(next(stream)) == 0
        voice.lock.release()  # the other's answer has come to its end
        assert any(len(ids) for ids in stream)
        voice.lock.acquire()


def test_tokens_are_worth_what_separate_forwards_say(voice: Voice) -> None:
    prompt = voice.ids(voice.text(QUESTION), 24)
    answers = tuple(np.array(whole(voice, Sampling(1.0, 1.0, 24, seed))) for seed in (1, 2))
    found = np.concatenate(voice.token_logps(prompt, answers))
    with torch.no_grad():
        wanted = separate_logps(voice.policy.model, [TokenPair(prompt, *answers)])
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_a_prompt_that_does_not_fit_and_an_empty_one_are_refused(voice: Voice) -> None:
    with pytest.raises(InputError, match="longer than the model's context of 96"):
        voice.ids("word " * 90, 24)
    with pytest.raises(InputError, match="empty"):
        voice.ids("", 24)


def test_a_dialogue_has_all_that_was_said(voice: Voice) -> None:
    said = [*QUESTION, {"role": "assistant", "content": " Wires."}, {"role": "user", "content": "And?"}]
    dialogue = "\n\nHuman: What does an electrician do?\n\nAssistant: Wires.\n\nHuman: And?\n\nAssistant:"
    assert voice.text(said, dialogue=True) == dialogue
    assert voice.text(said) == "And?"


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_a_chat_template_has_the_system_prompt_and_all_that_was_said(tmp_path: Path) -> None:
    shutil.copytree(world.FOLDER, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    voice = Voice(str(tmp_path / "model"))
    said = [{"role": "system", "content": "Be kind."}, *QUESTION, {"role": "assistant", "content": "Wires."}]
    asked = [*said, {"role": "user", "content": "And?"}]
    text = "<system> Be kind.\n<user> What does an electrician do?\n<assistant> Wires.\n<user> And?\n<assistant> "
    assert voice.templated and voice.text(asked) == voice.text(asked, dialogue=True) == text
    assert voice.decode(voice.ids(text, 8)) == text
    with pytest.raises(InputError, match=r"chat template of .* refuses these messages: no tools here"):
        voice.text([{"role": "tool", "content": "1"}])


def test_an_adapter_speaks_through_its_base(run_cli: RunCli, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done = run_cli(
        *("fit", "--model.checkpoint", world.BASE, "--data.source", "world:pairs", "--model.lora.r", 4),
        *("--model.lora.merge", "false", "--model.optimizer.lr", 0.05, "--data.max_train_pairs", 64),
        *("--trainer.max_steps", 4, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.limit_val_batches", 0, "--trainer.default_root_dir", tmp_path / "run"),
    )
    assert done.status == 0, done.err
    adapted = Voice(str(tmp_path / "run/version_0/export"))
    assert (tmp_path / "run/version_0/export/adapter_config.json").exists()
    prompt = adapted.ids(adapted.text(QUESTION), 24)
    answers = (np.array([5, 6, 7]), np.array([8, 9]))
    assert not np.allclose(adapted.token_logps(prompt, answers)[0], Voice(world.BASE).token_logps(prompt, answers)[0])
    assert len(whole(adapted, SHORT)) > 0


def test_other_tokenizers_are_refused(voice: Voice, toy: Path) -> None:
    with pytest.raises(InputError, match="different tokenizers"):
        check_same_tokens(voice, Voice(str(toy / "model")))


def test_votes_are_trained_on_and_the_reference_is_found(run_cli: RunCli, tmp_path: Path) -> None:
    votes = tmp_path / "votes.jsonl"
    for number in range(12):
        texts = (f" A baker bakes {number}.", " It depends.")
        answered = Answered(f"What does baker {number} do?", texts, ("a", "b"))
        record(votes, answered, ("first", "second")[number % 2], SHORT, {"beta": 0.1})
    tied = record(votes, answered, "tie", SHORT, {})
    assert cast(votes) == Cast(12, 12) and tied == tmp_path / "votes.ties.jsonl" and cast(tied) == Cast(1, 1)
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    assert rows[1]["chosen"] == " It depends." and rows[1]["chosen_model"] == "b"
    assert rows[1]["chosen_cut"] is False
    done = run_cli(
        *("fit", "--model.checkpoint", world.BASE, "--data.source", votes, "--data.val_fraction", 0.3),
        *("--trainer.max_steps", 2, "--model.loss.beta", 0.25, "--trainer.accelerator", "cpu"),
        *("--trainer.default_root_dir", tmp_path / "run", "--trainer.enable_progress_bar", "false"),
    )
    assert done.status == 0, done.err
    trained = str(tmp_path / "run/version_0/export")
    assert reference_of(trained) == world.BASE and beta_of(trained) == 0.25
    assert reference_of(world.BASE) == world.BASE


def test_an_answer_that_did_not_end_by_itself_says_so(voice: Voice) -> None:
    eos = voice.tokenizer.eos_token_id
    assert voice.cut(np.array([5, eos]), SHORT) == ""
    assert voice.cut(np.array([5] * 24), SHORT) == "cut at 24 tokens"
    assert voice.cut(np.array([5] * 3), SHORT) == "stopped at 3 tokens"


@pytest.mark.parametrize(
    "name", ["~nobody-of-this-name/x", "a" * 300, "a\0b", "world:nothing", "./nothing", "no name/of a/repository"]
)
def test_of_a_model_that_cannot_be_nothing_is_known(name: str) -> None:
    assert option(name, "model", "checkpoint") is None
    assert reference_of(name) == name and beta_of(name) == 0.1


@pytest.mark.parametrize(
    "text", ["7", "model: 7", "model: {checkpoint: 7, loss: {init_args: {beta: lots}}}", "a: [", "\xff"]
)
def test_a_config_of_another_kind_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    assert reference_of(str(tmp_path)) == str(tmp_path) and beta_of(str(tmp_path)) == 0.1


def test_a_vote_is_a_line_of_its_own_even_after_one_that_was_cut_off(tmp_path: Path) -> None:
    votes = tmp_path / "deep" / "votes.jsonl"
    answered = Answered("What?", ("a", "b"), ("p", "r"), (True, False))
    assert cast(votes) == Cast()
    record(votes, answered, "second", SHORT, {})
    votes.write_text(votes.read_text().rstrip("\n"))
    record(votes, answered, "first", SHORT, {})
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    assert [(row["chosen"], row["chosen_cut"]) for row in rows] == [("b", False), ("a", True)]
    assert cast(votes) == Cast(2, 1)


@pytest.mark.parametrize("content", [b"half a li", b'{"question": 1}', b"[1, 2]", b"\xff\xfe"])
def test_a_file_of_something_else_is_no_file_of_votes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "votes.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="is no file of votes"):
        cast(tmp_path / "votes.jsonl")
    with pytest.raises(InputError, match="is no file of votes"):
        cast(tmp_path)


def test_votes_are_trained_on_as_the_model_was_trained(run_cli: RunCli, tmp_path: Path) -> None:
    """The command takes the run's own options, except those of its data."""
    votes = tmp_path / "votes.jsonl"
    for number in range(12):
        answered = Answered(f"What does baker {number} do?", (f" A baker bakes {number}.", " No."), ("a", "b"))
        record(votes, answered, "first", SHORT, {})
    done = run_cli(
        *("fit", "--model.checkpoint", world.BASE, "--data.source", "world:pairs", "--data.max_train_pairs", 64),
        *("--data.max_val_pairs", 16, "--model.loss", "IPO", "--model.loss.beta", 0.7, "--model.optimizer.lr", 3e-4),
        *("--trainer.max_steps", 2, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.default_root_dir", tmp_path / "run"),
    )
    assert done.status == 0, done.err
    exported = tmp_path / "run/version_0/export"
    words = shlex.split(training_command(str(exported), votes, tmp_path / "runs"))
    assert words[:4] == ["python", "-m", "dpo_lightning", "fit"] and words[4:6] == [
        "--config",
        f"{exported}/config.yaml",
    ]
    done = run_cli(*words[3:])
    assert done.status == 0, done.err
    before = yaml.safe_load((exported / "config.yaml").read_text())
    after = yaml.safe_load((tmp_path / "runs/votes/version_0/export/config.yaml").read_text())
    for keys in (("loss",), ("optimizer",)):
        assert before["model"][keys[0]] == after["model"][keys[0]]
    assert after["data"]["source"] == str(votes) and after["model"]["checkpoint"] == str(exported)
    assert after["data"]["max_train_pairs"] is None


def test_an_adapter_is_trained_further_on_votes(tmp_path: Path) -> None:
    shutil.copytree(world.FOLDER, tmp_path / "export")
    (tmp_path / "export/adapter_config.json").write_text("{}")
    about = {"model": {"checkpoint": world.BASE, "lora": {"r": 4}, "tokenizer": None}, "data": {"source": "a.jsonl"}}
    (tmp_path / "export/config.yaml").write_text(yaml.safe_dump(about))
    words = shlex.split(training_command(str(tmp_path / "export"), tmp_path / "votes.jsonl", tmp_path / "runs"))
    assert words[words.index("--model.lora") + 1] == "null"
    assert "--model.tokenizer" not in words


def test_of_a_model_without_a_run_the_command_has_its_beta_alone(tmp_path: Path) -> None:
    command = training_command(world.BASE, tmp_path / "my votes.jsonl", tmp_path / "runs")
    assert "--config" not in command and "--model.loss.beta 0.1" in command
    assert shlex.split(command)[shlex.split(command).index("--data.source") + 1] == str(tmp_path / "my votes.jsonl")
