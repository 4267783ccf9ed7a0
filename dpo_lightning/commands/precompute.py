"""`precompute`: the reference's log-probabilities of all pairs, on disk, for every run that needs the same.

It takes the config of a `fit`. That would make them itself; here it can be done with more devices, or before a sweep.
"""

from lightning import LightningDataModule, LightningModule, Trainer

from dpo_lightning.errors import InputError
from dpo_lightning.models.cached import CachedLogps
from dpo_lightning.models.reference import FrozenModel
from dpo_lightning.training.cli import DPOCLI, set_up_output


class Precomputing(Trainer):
    """A Trainer that runs the reference alone."""

    def precompute(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Score all pairs with the reference, and keep what comes out.

        Args:
            model: whose reference it is.
            datamodule: whose pairs are scored.
            ckpt_path: as in the config of a fit; not looked at.
            weights_only: as in the config of a fit; not looked at.
        """
        self.predict(model, datamodule=datamodule, return_predictions=False)


class PrecomputeCLI(DPOCLI):
    """The options of `fit`, with a trainer that leaves no run directory."""

    trainer_type = Precomputing

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"precompute": {"model", "dataloaders", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.options.ckpt_path = None
        self.options.trainer.logger = False

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """Without what a run leaves behind."""
        self.save_config_callback = None
        self.model.reference = precomputable(self.model)
        self.options.trainer.enable_checkpointing = False
        return self.make_trainer(**kwargs)

    def after_precompute(self) -> None:
        """Say where the tables are."""
        if self.trainer.is_global_zero:
            print("\nThe reference's log-probabilities are in:")
            for split, table in self.model.reference.tables.items():
                print(f"  {table.folder}  ({split})")
            print("A fit with the same config finds them with --model.reference CachedLogps")


def precomputable(model: LightningModule) -> CachedLogps:
    """The reference of a config as one that keeps what it has scored.

    Raises:
        InputError: if there is none, or its values change while training.
    """
    reference = model.reference
    if isinstance(reference, CachedLogps):
        return reference
    if reference is None:
        raise InputError(f"{model.loss} has no reference, so that there is nothing to compute")
    if type(reference) is FrozenModel:
        return CachedLogps(reference.checkpoint)
    if reference.is_fixed:
        return CachedLogps()
    raise InputError(f"model.reference is {type(reference).__name__}, whose values change while training; remove it")


def main() -> None:
    """Run the verb of the command line."""
    set_up_output()
    PrecomputeCLI()
