"""The command line of the verbs that need a trainer: from YAML and options to a run directory."""

import logging
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import AdamW, Optimizer

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.errors import InputError
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.cached import CachedLogps  # noqa: F401, so that its bare name is known
from dpo_lightning.models.card import CURVES
from dpo_lightning.models.export import export
from dpo_lightning.models.reference import Reference
from dpo_lightning.models.sharding import gathered
from dpo_lightning.objective.divergences import Divergence, ReverseKL
from dpo_lightning.objective.losses import PreferenceLoss, Sigmoid
from dpo_lightning.training.allocator import KeptMemory
from dpo_lightning.training.callbacks import (
    EXPORT,
    LAST,
    LEDGER_FILE,
    LastCheckpoint,
    Progress,
    ReplayedHistory,
    RunDirectory,
    StreamedCheckpointIO,
    run_of,
    versions,
)
from dpo_lightning.training.comparison import as_text, write_samples
from dpo_lightning.training.curves import draw_curves
from dpo_lightning.training.footprint import is_out_of_memory, one_line
from dpo_lightning.training.memory_check import MemoryCheck
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.options import (
    COMMAND_LINE,
    Given,
    check_classes,
    check_keys,
    check_same_run,
    given_options,
)
from dpo_lightning.training.pair_ledger import DOUBTFUL, FOLDER, PairLedger
from dpo_lightning.training.publication import (
    NAMES,
    OF_A_PUSH,
    Publication,
    begun_by,
    provenance_of,
)
from dpo_lightning.training.samples import Samples
from dpo_lightning.training.sharded import FSDP, FullySharded
from dpo_lightning.training.world import check_strategy, check_world

RUNS = Path("runs")

#: Options whose value is a class with fields of its own: the base class, and the default.
CLASS_OPTIONS: dict[str, tuple[type, type | None]] = {
    "model.loss": (PreferenceLoss, Sigmoid),
    "model.loss.divergence": (Divergence, ReverseKL),
    "model.reference": (Reference, None),
    "model.optimizer": (Optimizer, AdamW),
}

#: Options whose value is a record with fields, of one class only.
RECORDS: dict[str, tuple[type, type | None]] = {"model.lora": (LoRA, LoRA)}

#: Warnings of libraries about what is meant here; everything else is shown.
MEANT = (
    r".*does not have many workers",  # packing a batch takes milliseconds
    r".*logs directory .* exists and is not empty",  # one directory for everything
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
    r".*module\(s\) in eval mode at the start of training",  # the reference
    r".*not resumable",  # the data module keeps the position
    r".*smaller than the logging interval",  # an epoch's last step is always logged
    r".*sync_dist=True",  # figures are reduced before they are logged
    r".*overriding `LightningModule.optimizer_",  # a reference may move once a step is done
    r".*when using `ckpt_path`, callbacks used to create the checkpoint",  # samples are of no use outside a fit
)


class Parser(LightningArgumentParser):
    """Says what is wrong on one line, the last on stderr."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"error: {' '.join(message.split())}; --help lists all keys", file=sys.stderr)
        sys.exit(2)


class SaveConfig(SaveConfigCallback):
    """Writes the resolved config into the run's directory, below the commands that made the run."""

    def __init__(self, *args: Any, directory: RunDirectory, begun: str, **kwargs: Any) -> None:
        super().__init__(*args, save_to_log_dir=False, **kwargs)
        self.directory = directory
        self.begun = begun

    def save_config(self, trainer: Trainer, pl_module: object, stage: str) -> None:
        path = self.directory.path / self.config_filename
        if not path.exists():
            self.parser.save(self.config, path, skip_unset=False)
            path.write_text(self.begun + path.read_text(encoding="utf-8"), encoding="utf-8")


class DPOCLI(LightningCLI):
    """Lightning's command line with this project's run directory, resumption and end of a run."""

    trainer_type: type[Trainer] = Trainer

    def __init__(self, args: ArgsType = None) -> None:
        self.run_directory: RunDirectory | None = None
        self.memory_check = MemoryCheck()
        self.publication = Publication()
        try:
            super().__init__(
                DPOModule,
                PreferenceDataModule,
                trainer_class=self.trainer_type,
                save_config_callback=SaveConfig,
                seed_everything_default=0,
                trainer_defaults={"gradient_clip_val": 1.0, "log_every_n_steps": 10, "use_distributed_sampler": False},
                parser_class=Parser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=args,
            )
        except InputError:
            if self.run_directory is not None:
                self.run_directory.give_up()
            raise
        except (MemoryError, RuntimeError) as error:
            if self.run_directory is None or self.subcommand != "fit" or not is_out_of_memory(error):
                raise
            self.run_directory.give_up()
            known = f"; {said}" if (said := self.memory_check.shortage()) else ""
            step = self.trainer.global_step + 1
            raise InputError(f"out of memory at optimizer step {step}: {one_line(error)}{known}") from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Publication, instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        words = sys.argv[1:] if args is None else list(args)
        if words and words[0] in self._subcommand_parsers and not {"-h", "--help", "--print_config"} & set(words):
            given = given_options(words[1:])
            check_keys(given, {action.dest for action in self._subcommand_parsers[words[0]]._actions})
            check_classes(given, CLASS_OPTIONS | RECORDS)
            check_published(given, words[0])
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Nothing to do: options come from the config, not from a checkpoint, which need not be read twice."""

    @property
    def options(self) -> Namespace:
        """The parsed options of the verb."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        options = self.options
        if options.trainer.default_root_dir is None:
            options.trainer.default_root_dir = str(RUNS / run_name(options, self.subcommand))
        root = Path(options.trainer.default_root_dir)
        if options.ckpt_path == "last":
            options.ckpt_path = str(newest_checkpoint(root))
        elif options.ckpt_path is not None and not zipfile.is_zipfile(options.ckpt_path):
            raise InputError(f"{options.ckpt_path}: no such checkpoint; ckpt_path takes a last.ckpt or the word last")
        if self.subcommand == "fit" and options.ckpt_path is not None:
            check_same_run(run_of(Path(options.ckpt_path)) / "config.yaml", self.config_dump_of(options))
        check_trainer(options.trainer)
        check_strategy(options.trainer.strategy)
        if self.subcommand == "test" and options.trainer.limit_test_batches == 0:
            raise InputError("trainer.limit_test_batches is 0: there is nothing to test; set data.max_test_prompts")
        if options.model.pair_ledger and options.trainer.limit_val_batches == 0:
            raise InputError("model.pair_ledger keeps validation pairs, but trainer.limit_val_batches is 0; remove one")
        if self.subcommand == "fit" and options.trainer.max_epochs is None and options.trainer.max_steps == -1:
            options.trainer.max_epochs = 1
        if options.trainer.enable_model_summary is None:
            options.trainer.enable_model_summary = False  # the module prints its own
        if options.weights_only is None:
            options.weights_only = True  # a checkpoint is data, never code
        if self.subcommand == "fit" and rank_zero_only.rank == 0:
            if options.trainer.fast_dev_run and options.push_to_hub is not None:
                raise InputError("trainer.fast_dev_run is a trial, which is not for the hub; set push_to_hub null")
            lora = options.model.lora
            adapter = lora is not None and not lora.get("merge", True)
            self.publication = self.publication_of(options).check(self.config_dump_of(options), adapter)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.options
        root = Path(options.trainer.default_root_dir)
        self.run_directory = RunDirectory(root)
        before = None if options.ckpt_path is None else run_of(Path(options.ckpt_path)) / "config.yaml"
        self.save_config_kwargs |= {"directory": self.run_directory, "begun": begun_by(before)}
        chosen = self.config_init[self.subcommand].trainer.callbacks or []
        callbacks = [self.run_directory, self.memory_check, *chosen]
        if self.model.samples and self.subcommand == "fit" and not options.trainer.fast_dev_run:
            callbacks.append(Samples(self.model.samples))
        if self.model.pair_ledger:
            callbacks.append(PairLedger(self.run_directory))
        if options.trainer.enable_checkpointing is not False:
            callbacks.append(LastCheckpoint(self.run_directory, self.model.save_every))
        if options.ckpt_path is not None:
            callbacks.append(ReplayedHistory(run_of(Path(options.ckpt_path))))
        if options.trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in chosen):
            callbacks.append(Progress())
        kwargs["callbacks"] = callbacks
        own_loggers = options.trainer.logger in (None, True)
        if own_loggers:
            kwargs["logger"] = False
        trainer = self.make_trainer(**kwargs)
        self.run_directory.claim()
        if own_loggers and not trainer.fast_dev_run:
            trainer.loggers = loggers(self.run_directory.path)
        return trainer

    def make_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with this project's strategy and checkpoints.

        Raises:
            InputError: if Lightning refuses its options, or other processes were started than they say.
        """
        options = self.options
        if options.trainer.strategy == FSDP:
            kwargs["strategy"] = FullySharded()
        plugins = self.config_init[self.subcommand].trainer.plugins or []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, StreamedCheckpointIO()]
        callbacks = kwargs.get("callbacks") or self.config_init[self.subcommand].trainer.callbacks or []
        kwargs["callbacks"] = [*callbacks, KeptMemory()]
        try:
            trainer = LightningCLI.instantiate_trainer(self, **kwargs)
        except (MisconfigurationException, RuntimeError, ValueError) as error:  # what Lightning says of its options
            raise InputError(f"trainer: {' '.join(str(error).split())}") from error
        check_world(trainer.num_devices, trainer.num_nodes)
        return trainer

    @staticmethod
    def publication_of(options: Namespace) -> Publication:
        """Where the export goes, as it was asked for."""
        return Publication(**{name: options[name] for name in NAMES})

    def config_dump_of(self, options: Namespace) -> dict[str, Any]:
        """The options as they would stand in config.yaml."""
        parser = self._parser(self.subcommand)
        return yaml.safe_load(parser.dump(options, skip_unset=False))

    def after_validate(self) -> None:
        """Print the figures, which are also in the run's metrics.csv."""
        if self.trainer.is_global_zero:
            print(closing_message(self.run_directory.path, self.figures(), {}))

    def after_test(self) -> None:
        """Keep all answers, and print what they say."""
        if self.trainer.is_global_zero:
            comparisons, directory = self.model.comparisons, self.run_directory.path
            write_samples(comparisons, directory / "samples.jsonl")
            print(as_text(comparisons))
            print(closing_message(directory, {}, self.model.warnings))

    def figures(self) -> dict[str, float]:
        """The last validation figures."""
        return {tag: float(value) for tag, value in self.trainer.callback_metrics.items() if tag.startswith("val/")}

    def after_fit(self) -> None:
        """Every fit ends by validating the final weights, exporting the same and drawing the curves."""
        trainer, module = self.trainer, self.model
        if trainer.limit_val_batches != 0 and module.validated_at != trainer.global_step:
            trainer.validate(module, datamodule=self.datamodule, verbose=False)
        weights = gathered(module.policy.model.state_dict(keep_vars=True), keep=trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        directory = self.run_directory.path
        figures = self.figures()
        metrics, picture = directory / "metrics.csv", directory / CURVES
        if metrics.exists():
            draw_curves(metrics, picture, f"{directory.parent.name}, {directory.name}: {module.loss}")
        else:
            print("No curves are drawn: trainer.logger leaves no metrics.csv.")
        export(
            module.policy,
            module.tokenizer,
            directory / EXPORT,
            provenance_of(
                directory,
                self.config_dump_of(self.options),
                module.loss,
                figures,
                self.publication,
                steps=trainer.global_step,
                ranks=trainer.world_size,
            ),
            curves=picture,
            adapter_only=module.lora is not None and not module.lora.merge,
            weights=weights,
        )
        if said := self.datamodule.stream_summary():
            print(said)
        samples = next((callback for callback in trainer.callbacks if isinstance(callback, Samples)), None)
        if samples is not None and samples.now:
            print(samples.as_text())
        limit = "max_steps" if trainer.max_epochs == -1 else "max_epochs"
        further = f"--trainer.{limit} {2 * getattr(trainer, limit)}"
        print(closing_message(directory, figures, module.warnings, further))
        if self.publication.push_to_hub is not None:
            print(f"On the hub: {self.publication.push(directory / EXPORT, directory)}")


def run_name(options: Namespace, verb: str) -> str:
    """The name of the first config file, or the verb's where there is none."""
    configs = options.get("config") or []
    return Path(str(configs[0])).stem if configs else verb


def newest_checkpoint(root: Path) -> Path:
    """`last.ckpt` of the newest run under `root` that has one.

    Raises:
        InputError: if none has.
    """
    found = [path / LAST for path in versions(root) if (path / LAST).is_file()]
    if not found:
        raise InputError(
            f"{root}: no version_*/{LAST} here to go on from; leave out --ckpt_path last to start a run"
            + ("" if rank_zero_only.rank == 0 else f"; this is rank {rank_zero_only.rank}: every node must see the run")
        )
    return found[-1]


def loggers(directory: Path) -> list[Logger]:
    """TensorBoard and metrics.csv in one directory."""
    place = {"save_dir": directory.parent, "name": "", "version": directory.name}
    return [TensorBoardLogger(**place), CSVLogger(**place)]


def closing_message(
    directory: Path, figures: Mapping[str, float], faults: Mapping[str, str], further: str | None = None
) -> str:
    """What came out, where everything is, and what to try next; `further` is the option by which a fit goes on."""
    lines = ["", "Validation:"] if figures else [""]
    lines += [f"  {tag.removeprefix('val/'):26} {value:10.4f}" for tag, value in sorted(figures.items())]
    lines += [f"Warning: {fault}: {sentence}" for fault, sentence in faults.items()]
    names = (
        EXPORT,
        CURVES,
        "samples.jsonl",
        FOLDER,
        DOUBTFUL,
        LEDGER_FILE,
        "metrics.csv",
        "config.yaml",
        LAST,
    )
    lines += [f"Written to {directory}:"]
    lines += [f"  {directory / name}" for name in names if (directory / name).exists()]
    if further is not None:
        lines.append("Next:")
        if any(directory.glob("events.out.tfevents*")):
            lines.append(f"  tensorboard --logdir {directory.parent}")
        config = directory / "config.yaml"
        if config.exists() and (directory / LAST).exists():
            lines.append(f"  python -m dpo_lightning test --config {config} --ckpt_path {directory / LAST}")
            lines.append(f"  python -m dpo_lightning fit --config {config} --ckpt_path last {further}")
        if (directory / EXPORT).exists():
            lines.append(f"  python -m dpo_lightning chat --model {directory / EXPORT}")
    return "\n".join(lines)


def check_trainer(options: Namespace) -> None:
    """Raises InputError for options of Lightning's that would split the plan of batches again, or cannot be."""
    if options.use_distributed_sampler:
        raise InputError("trainer.use_distributed_sampler must be false: the plan of batches already knows the ranks")
    if options.overfit_batches:
        raise InputError("trainer.overfit_batches cannot be used with a plan of batches; set data.max_train_pairs")
    for name in ("accumulate_grad_batches", "log_every_n_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"trainer.{name} must be at least 1, got {getattr(options, name)}")


def check_published(given: Sequence[Given], verb: str) -> None:
    """Raises InputError for an option of the hub that would do nothing.

    A config that pushes is one for other verbs too, and where `push_to_hub` is set to null what belongs to it is off.
    """
    pushes = any(option.key == "push_to_hub" for option in given)
    for option in given:
        if option.key in NAMES and verb != "fit" and option.where == COMMAND_LINE:
            raise InputError(f"{option.key}: {verb} exports nothing; `fit` and `export` take it")
        if option.key in OF_A_PUSH and option.value not in (None, False) and not pushes:
            raise InputError(
                f"{option.where}: {option.key} is given, but nothing is pushed; set push_to_hub, or remove it"
            )


def no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's is about this run."""
    return "Tip:" not in record.getMessage()


def set_up_output() -> None:
    """Let libraries say only what is about this run."""
    for message in MEANT:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    """Run the verb of the command line."""
    set_up_output()
    DPOCLI()
