"""Every command of the README and every config runs, on the toy in place of what would be downloaded."""

import re
import shlex
import shutil
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from dpo_lightning.commands.grid import read_grid
from dpo_lightning.commands.points import configured
from dpo_lightning.objective import losses
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.preference import PreferenceLoss, RatioLoss
from dpo_lightning.training.options import read_config, subclasses
from tests.conftest import RunCli
from tests.e2e import processes
from tests.hub_server import Hub

ROOT = Path(__file__).parents[1]
#: All but `chat`, which ends with Ctrl-C: tests/e2e/test_page_chat.py runs that.
COMMANDS = re.findall(r"^python -m dpo_lightning (?!chat)(.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
#: Configs that are laid over another, on several ranks: how they are started.
RANKS: dict[str, processes.Environment | None] = {
    "ddp.yaml": None,
    "fsdp.yaml": None,
    "multinode.yaml": lambda node: {"NODE_RANK": str(node)},
}
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if path.name not in RANKS)


DOCS = (ROOT / "docs" / "losses.md").read_text()


def test_the_page_of_losses_has_every_loss_and_every_shared_field() -> None:
    known = {loss.__name__ for loss in subclasses(PreferenceLoss) if loss.__module__.startswith("dpo_lightning.")}
    known -= {"LikelihoodLoss", "RatioLoss", "WholeStepLoss"}  # abstract
    first = [line.split("|")[1] for line in DOCS.splitlines() if line.startswith("| `")]
    listed = {name for cell in first for name in re.findall("`(.*?)`", cell)}
    assert listed == known | {field.name for field in fields(RatioLoss)} - {"beta"}


def test_the_page_of_losses_has_a_config_that_runs_and_an_example_that_is_a_loss(
    run_cli: RunCli, toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "mpo.yaml").write_text(re.search("```yaml\n(.*?)```", DOCS, re.DOTALL)[1])
    words = ["--trainer.default_root_dir", tmp_path / "runs"]
    done = run_cli("fit", "--config", tmp_path / "mpo.yaml", *small(toy), *words)
    assert done.status == 0, done.err
    assert "0.8 Sigmoid(beta=0.1" in "".join(done.err)
    code = "".join(f"from {module} import *\n" for module in ("dataclasses", "torch", losses.__name__))
    names: dict[str, type] = {"__name__": "my_module"}
    exec(code + re.search("```python\n(.*?)```", DOCS, re.DOTALL)[1], names)
    pair = PairLogps(torch.tensor([-1.0, -4.0]), torch.tensor([0, 1]), num_pairs=1, num_answers=2)
    reference = PairLogps(torch.tensor([-2.0, -2.0]), torch.tensor([0, 1]), num_pairs=1, num_answers=2)
    assert names["Quadratic"](beta=0.5)(pair, reference).tolist() == [0.25]


@pytest.fixture
def elsewhere(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the configs and the files that the README speaks of."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(toy / "pairs.jsonl", tmp_path / "pairs.jsonl")
    (tmp_path / "mine.yaml").write_text("data: {num_workers: 0}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(toy: Path) -> list[object]:
    """Options that make any config small and local."""
    words = ["--model.checkpoint", toy / "model", "--data.source", toy / "pairs.jsonl", "--trainer.accelerator", "cpu"]
    return [*words, "--trainer.max_steps", 2, "--trainer.enable_progress_bar", "false"]


def test_the_readme_has_commands() -> None:
    assert {command.split()[0] for command in COMMANDS} == {
        *("fit", "validate", "test", "sweep", "export", "inspect"),
    }


def test_every_command_of_the_readme_runs(run_cli: RunCli, elsewhere: Path, toy: Path, served: Hub) -> None:
    """In the README's order: later ones go on from what earlier ones left."""
    for command in COMMANDS:
        words = shlex.split(command.replace("USER/", "somebody/"))
        if "--help" in words:
            assert "--data.source" in run_cli(*words).out
            continue
        if words[0] == "sweep":
            continue  # below
        if words[0] == "export":
            assert run_cli(*words).status == 0
            assert (elsewhere / words[words.index("--output_dir") + 1] / "model.safetensors").exists()
            continue
        options = small(toy)
        if RANKS.keys() & {Path(word).name for word in words}:
            continue  # below
        if words[0] == "inspect":
            done = run_cli(*words, *options)
            assert done.status == 0 and "What to change" in done.out, done.err[-3:]
            continue
        if words[0] in ("validate", "test"):
            options = [*options[:6], *options[8:]]
        if "last" in words:
            options = [word if word != 2 else 3 for word in options]
        done = run_cli(*words, *options)
        assert done.status == 0, (command, done.err[-3:])
    assert len(served.repositories["somebody/gpt2-dpo"].commits) == 3  # an empty one, and one of each push


REFERENCES = (ROOT / "docs" / "references.md").read_text().split("\n## ")


@pytest.mark.parametrize("section", REFERENCES[1:], ids=lambda text: text.splitlines()[0])
def test_every_command_of_the_page_of_references_runs(
    run_cli: RunCli, elsewhere: Path, toy: Path, section: str
) -> None:
    for command in re.findall(r"^python -m dpo_lightning (.+)$", section, re.MULTILINE):
        words = shlex.split(command)
        done = run_cli(*words, *([] if words[0] == "export" else small(toy)))
        assert done.status == 0, (command, done.err[-3:])
    assert "export" not in section or (elsewhere / "my-adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("sweep")])
def test_every_point_of_a_sweep_is_a_config_that_fit_takes(run_cli: RunCli, elsewhere: Path, command: str) -> None:
    words = shlex.split(command)
    config, grid = (Path(words[words.index(name) + 1]) for name in ("--config", "--grid"))
    for point in read_grid(grid):
        (elsewhere / "point.yaml").write_text(yaml.safe_dump(configured(read_config(config), point)))
        done = run_cli("fit", "--config", "point.yaml", "--print_config")
        assert done.status == 0, (point, done.err[-3:])
        resolved = yaml.safe_load(done.out)["model"]
        assert resolved["loss"]["class_path"].endswith(point["model.loss"])
        assert resolved["loss"].get("init_args", {}).get("beta") == point.get("model.loss.beta")


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs(run_cli: RunCli, elsewhere: Path, toy: Path, config: str) -> None:
    done = run_cli("fit", "--config", f"configs/{config}", *small(toy))
    assert done.status == 0, done.err[-3:]
    assert (elsewhere / "runs" / Path(config).stem / "version_0" / "export" / "model.safetensors").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("config", RANKS)
def test_every_config_of_several_ranks_runs_on_two(elsewhere: Path, toy: Path, config: str) -> None:
    words = ["--config", elsewhere / "configs/gpt2.yaml", "--config", elsewhere / "configs" / config, *small(toy)]
    words += ["--trainer.default_root_dir", elsewhere / "runs", "--model.max_new_tokens", 4]
    done = processes.run("fit", *words, ranks=2, nodes=RANKS[config])
    assert (elsewhere / "runs" / "version_0" / "export" / "model.safetensors").exists(), done.output


DISTRIBUTED = (ROOT / "docs" / "distributed.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^(?:torchrun|python|srun) .+$", DISTRIBUTED, re.MULTILINE))
def test_every_command_of_the_page_of_devices_is_one(run_cli: RunCli, elsewhere: Path, command: str) -> None:
    """As far as can be seen on one device: files and options are, and torchrun starts what the options speak of."""
    words = shlex.split(command)
    if "pytest" in words:
        assert (ROOT / words[3]).exists()
        return
    given = dict(pairwise(words))
    done = run_cli(*words[words.index("dpo_lightning") + 1 :], "--print_config")
    assert done.status == 0, done.err[-3:]
    trainer = yaml.safe_load(done.out)["trainer"]
    if words[0] == "torchrun":
        assert (int(given["--nnodes"]), int(given["--nproc_per_node"])) == (
            trainer["num_nodes"],
            int(trainer["devices"]),
        )
    if words[0] == "srun":
        (nodes,), (tasks,) = (
            re.findall(f"^#SBATCH --{n}=(.+)$", DISTRIBUTED, re.M) for n in ("nodes", "ntasks-per-node")
        )
        assert (int(nodes), int(tasks)) == (trainer["num_nodes"], trainer["devices"])
