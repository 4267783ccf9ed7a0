"""The training step: log-probabilities of policy and reference, the loss over pairs, and what is reported of it.

Legend: B pairs
"""

import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dpo_lightning.data.datamodule import Prompt
from dpo_lightning.data.packing import PreferenceBatch
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.errors import InputError
from dpo_lightning.models.adapters import LoRA
from dpo_lightning.models.cache import adapter_digest
from dpo_lightning.models.checkpoint import (
    base_of,
    context_length,
    load_config,
    load_policy,
    load_tokenizer,
    located,
)
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import AdapterOff, FrozenModel, Reference
from dpo_lightning.models.sharding import shard, total_norm
from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import Sigmoid
from dpo_lightning.objective.metrics import CONDITIONS, STATISTICS, PreferenceMetrics, Scored
from dpo_lightning.objective.preference import PreferenceLoss, call
from dpo_lightning.training.comparison import Comparison, compare, summarise
from dpo_lightning.training.diagnosis import diagnose, truly_worse
from dpo_lightning.training.schedule import Schedule, schedule
from dpo_lightning.training.start import check_start
from dpo_lightning.training.window import LossWindow

#: Beside it stands the best that is possible, where the labels' noise is known.
ACCURACY = "rewards/accuracies"

#: Longest answer that is sampled where nobody says how long it may be, in tokens.
DEFAULT_ANSWER = 128


class DPOModule(LightningModule):
    """A language model trained on preferences.

    Args:
        checkpoint: the model to start from: a hub id or a folder in Hugging Face format.
        tokenizer: hub id or folder of its tokenizer. Default: the checkpoint's own.
        loss: the objective, by name or import path.
        reference: what the policy is compared with. Default, where the loss needs one: the policy without its adapter
            if it has one, else a frozen copy of the checkpoint.
        lora: train a low-rank adapter in place of the model. A checkpoint that is an adapter is trained as it is.
        gradient_checkpointing: compute the decoder's activations again in backward: less memory, a third more time.
        attn_implementation: sdpa, eager or another of transformers. Default: its own choice.
        optimizer: class and options of the optimizer.
        lr_scheduler: what the learning rate does after the warm-up: falls linearly or as a cosine to 0, or stays.
        warmup_steps: optimizer steps over which the learning rate rises from 0; below 1, a share of all steps.
        save_every: optimizer steps between two writes of last.ckpt, which is also written at every epoch's end.
        samples: validation prompts whose sampled answers TensorBoard shows at each validation, and the end of a fit
            before and after; 0 for none.
        max_new_tokens: longest answer that is sampled. Default: 128, or half of the model's context if that is shorter.
        pair_ledger: keep each validation pair's log-ratios and margin, in `pairs/`, and list the pairs whose label
            looks wrong, in `doubtful.jsonl`.
        try_longest: compute the largest batch once before the first step, so that a lack of memory shows at once;
            false saves the time of it.
        samples_per_prompt: answers that `test` samples of each model to every prompt; more make its figures more exact.

    Raises:
        InputError: if a reference is given to a loss that needs none, or needs an adapter and there is none.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        loss: PreferenceLoss = Sigmoid(),
        reference: Reference | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=1e-5, weight_decay=0.0, fused=True
        ),
        lr_scheduler: Schedule = "linear",
        warmup_steps: float = 0,
        save_every: int = 100,
        samples: int = 3,
        max_new_tokens: int | None = None,
        samples_per_prompt: int = 1,
        pair_ledger: bool = False,
        try_longest: bool = True,
    ) -> None:
        super().__init__()
        if reference is not None and not loss.needs_reference:
            raise InputError(
                f"model.reference is {type(reference).__name__}, but {type(loss).__name__} needs none; remove it"
            )
        least = {"warmup_steps": 0, "save_every": 1, "samples": 0, "max_new_tokens": 1, "samples_per_prompt": 1}
        given = (warmup_steps, save_every, samples, max_new_tokens, samples_per_prompt)
        for name, value in zip(least, given, strict=True):
            if value is not None and value < least[name]:
                raise InputError(f"model.{name} must be at least {least[name]}, got {value}")
        if pair_ledger and not (loss.needs_reference and loss.implies_rewards):
            raise InputError(
                f"model.pair_ledger is true, but {type(loss).__name__} has no log-ratios and margins to keep; remove it"
            )
        self.checkpoint = checkpoint
        self.tokenizer_name = tokenizer or checkpoint
        self.loss = loss
        if lora is not None:
            lora.check()
        self.lora = lora
        adapted = lora is not None or base_of(located(checkpoint)) is not None
        if isinstance(reference, AdapterOff) and not adapted:
            raise InputError(
                f"model.reference is AdapterOff, but no adapter is trained: {checkpoint} is a model; set model.lora or "
                "remove the reference"
            )
        usual: type[Reference] = AdapterOff if adapted else FrozenModel
        self.reference = reference or (usual() if loss.needs_reference else None)
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        self.save_every = save_every
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self.samples_per_prompt = samples_per_prompt
        self.pair_ledger = pair_ledger
        self.try_longest = try_longest
        self.policy: Policy | None = None
        self.train_metrics = PreferenceMetrics(loss, batches_are_steps=True)
        self.val_metrics = PreferenceMetrics(loss)
        self.strict_loading = False  # a checkpoint holds the policy, not the reference
        self.loaded_step = 0  # optimizer steps behind the checkpoint that was loaded
        self.loss_state = {name: torch.tensor(value) for name, value in loss.initial_state.items()}
        self.start_loss: float | None = None  # of the policy against itself
        self.adapter_of = ""  # what the adapter that is trained is an adapter of, and of what kind
        self.comparisons: list[Comparison] = []  # of `test`
        self.validations: list[Mapping[str, float]] = []  # the figures of each so far
        self.warnings: dict[str, str] = {}  # what was said of them: fault -> sentence
        self.validated_at: int | None = None  # optimizer steps done when these weights were last validated
        self._logged_at: float | None = None  # when training, since the last report, began
        self._step_figures: dict[str, Tensor | float] = {}
        self._observed: dict[str, Tensor] = {}  # sums over the optimizer step's pairs so far
        self._window = LossWindow()

    # What the data needs to know

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return load_config(self.checkpoint)

    @property
    def context(self) -> int | None:
        """Longest sequence the model can read, in tokens; None where it has no limit."""
        return context_length(self.config)

    @property
    def answer_tokens(self) -> int:
        """Longest answer that is sampled, in tokens."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return DEFAULT_ANSWER if self.context is None else min(DEFAULT_ANSWER, self.context // 2)

    # Set-up

    def prepare_data(self) -> None:
        """What can be wrong with a checkpoint or a schedule is found before anything is written."""
        vocabulary = self.config.get_text_config().vocab_size
        if len(self.tokenizer) > vocabulary:
            raise InputError(
                f"{self.tokenizer_name}: the tokenizer has {len(self.tokenizer)} tokens, but {self.checkpoint} knows "
                f"only {vocabulary}; give model.tokenizer the one that the model was trained with"
            )

        if self.reference is not None and self.reference.needs_table and self.trainer.datamodule.streaming:
            raise InputError(
                f"model.reference is {type(self.reference).__name__}, which scores all pairs before training, and a "
                "stream's are not known then; remove it, or set data.streaming false"
            )
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        if self.loss.whole_step and fitting and parts > 1:
            raise InputError(
                f"model.loss {type(self.loss).__name__} sorts all pairs of an optimizer step, which must be one "
                f"batch on one device, but here it comes in {parts}; set trainer.devices 1 and "
                "accumulate_grad_batches 1, and raise data.batch_size"
            )
        endless = self.trainer.max_steps == -1 and (self.trainer.max_epochs == -1 or self.trainer.datamodule.streaming)
        if fitting and endless and self._needs_end():
            raise InputError(
                f"model.lr_scheduler {self.lr_scheduler} needs an end to fall towards; set trainer.max_steps or, of a "
                "source that is no stream, trainer.max_epochs, or lr_scheduler constant with a warm-up counted in steps"
            )

    def _needs_end(self) -> bool:
        """Whether the learning rate depends on the number of all steps."""
        return self.lr_scheduler != "constant" or 0 < self.warmup_steps < 1

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        # The policy first, so that nothing random in its making depends on the reference.
        self.policy = load_policy(
            self.checkpoint,
            layout=self.trainer.datamodule.layout,
            attn_implementation=self.attn_implementation,
            gradient_checkpointing=self.gradient_checkpointing,
            lora=self.lora,
        )
        if self.reference is None and self.trainer.testing:  # a loss may do without one, a comparison may not
            self.reference = FrozenModel() if self.policy.adapter is None else AdapterOff()
        if self.reference is not None:
            self.reference.mesh = self.device_mesh and self.device_mesh["data_parallel"]
            self.reference.prepare(self.policy)
        if self.policy.adapter is not None:
            self.adapter_of = adapter_digest(self.policy)
        rank_zero_info(self.summary())
        if self.device_mesh is not None:  # the strategy is fsdp
            for model in [module for module in self.modules() if isinstance(module, Policy)]:
                shard(model, self.device_mesh["data_parallel"])

    def summary(self) -> str:
        """What is trained, against what, and how it is laid out."""
        policy = self.policy
        parameters, trained = (
            sum(p.numel() for p in policy.parameters() if p.requires_grad or not only) for only in (False, True)
        )
        share = "" if trained == parameters else f" ({trained:,} of them trained)"
        reference = "none" if self.reference is None else type(self.reference).__name__
        passed_over = "".join(f"\n  not {reason}" for reason in policy.reasons)
        shortened = ", the last feed-forward block where it is read" if policy.is_shortened else ""
        return (
            f"Objective: {self.loss}, reference: {reference}\n"
            f"Policy: {type(policy.model).__name__}, {parameters:,} parameters{share}, from {self.checkpoint}\n"
            f"Layout: {policy.layout}, attention {policy.attention}{shortened}{passed_over}"
        )

    def attach(self, pairs: TokenizedPairs, split: str) -> TokenizedPairs:
        """The pairs of a split, with what the reference needs to score them."""
        if self.reference is not None:
            starts = self.loaded_step == 0 and self.trainer.global_step == 0
            self.reference.attach(pairs, split, self.start_logps if starts else None, self.trainer)
        return pairs

    @torch.no_grad()
    def start_logps(self, batch: PreferenceBatch) -> PairLogps:
        """The policy's log-probabilities of a batch as a step would have them, without gradient."""
        with self.trainer.precision_plugin.train_step_context():
            return self.policy.logps(batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        # Lightning refuses to clip the gradients of a fused optimizer, which would unscale them itself under fp16. Told
        # that it does not, Lightning unscales and clips first, as for any other.
        optimizer._step_supports_amp_scaling = False
        total = int(self.trainer.estimated_stepping_batches) if self._needs_end() else None
        warmup = self.warmup_steps * total if 0 < self.warmup_steps < 1 else self.warmup_steps
        rates = schedule(self.lr_scheduler, optimizer, round(warmup), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    # Steps

    def forward(self, batch: PreferenceBatch) -> Tensor:
        """`[num_answers]` the policy's log-probability of each answer, in nats."""
        return self.policy.logps(batch).logps

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        scored = self.score(batch)
        self.train_metrics.update(scored, batch.weights, batch.num_tokens)
        self._window.add(batch, scored.losses)
        for name, values in self.loss.observe(scored.policy, scored.reference).items():  # [B] each
            self._observed[name] = self._observed.get(name, 0) + (values * batch.weights).sum() / batch.pairs_in_step
        return self.mean_over_pairs(scored.losses, batch)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> Scored:
        scored = self.score(batch)
        self.val_metrics.update(scored, batch.weights, batch.num_tokens)
        return scored

    def test_step(self, batch: Sequence[Prompt], batch_idx: int) -> None:
        """Sample answers of each model to every prompt."""
        seed, oracle = int(os.environ.get("PL_GLOBAL_SEED", 0)), self.trainer.datamodule.oracle
        asked = [(row, sample, prompt) for row, prompt in batch for sample in range(self.samples_per_prompt)]
        self.comparisons += compare(
            self.policy, self.reference, self.tokenizer, asked, self.answer_tokens, seed, oracle
        )

    def score(self, batch: PreferenceBatch) -> Scored:
        """Both models' log-probabilities, the losses `[B]` and the implied rewards of a batch."""
        policy = self.policy.logps(batch, (*self.loss.statistics, *STATISTICS))
        reference = None if self.reference is None else self.reference.logps(batch)
        losses = call(self.loss, policy, reference, self.loss_state)
        return Scored(policy, reference, losses, self.loss.rewards(policy, reference))

    def mean_over_pairs(self, losses: Tensor, batch: PreferenceBatch) -> Tensor:
        """This micro-batch's part of the mean over all pairs of the optimizer step.

        Lightning divides by the micro-batches and averages over ranks; both are undone, so that a pair weighs the same
        in a full and in a short batch.
        """
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return (losses * batch.weights).sum() * parts / batch.pairs_in_step

    # Reports

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A run that goes on knows what it was like before, and that it was well."""
        self.check_window(self.trainer.global_step)
        frozen = self._frozen()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint |= {"validations": self.validations, "warnings": self.warnings, "start_loss": self.start_loss}
        checkpoint["loss_state"] = self.loss_state
        checkpoint["adapter_of"] = self.adapter_of

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Weights that are missing would not be noticed: loading is not strict, for the reference's sake."""
        frozen = self._frozen()
        own = {name: value for name, value in self.state_dict().items() if name not in frozen}
        found = {
            name: value.shape
            for name, value in checkpoint["state_dict"].items()
            if name in own or name.startswith("policy.")  # a frozen reference takes no weights of one that has moved
        }
        wanted = {name: value.shape for name, value in own.items()}
        if checkpoint.get("adapter_of", "") != self.adapter_of:
            raise InputError(
                f"the checkpoint is not one of {self.checkpoint} with model.lora {self.lora}: its adapter is of another"
                " model or kind, or only one of them has one; give model.checkpoint and model.lora what the run had"
            )
        if found != wanted:
            names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise InputError(
                f"the checkpoint is not one of {self.checkpoint}: {len(names)} tensors differ, {names[0]} for one; "
                "give model.checkpoint and model.reference what the run had"
            )
        state = checkpoint.get("loss_state", {})
        if missing := sorted(self.loss_state.keys() - state.keys()):
            raise InputError(
                f"the checkpoint is of a run whose loss remembers no {missing[0]}, which {self.loss} needs; give "
                "model.loss what the run had"
            )
        self.loss_state = {name: state[name] for name in self.loss_state}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        self.loaded_step = checkpoint["global_step"]
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.validations, self.warnings = checkpoint["validations"], checkpoint["warnings"]
            self.start_loss = checkpoint["start_loss"]

    def _frozen(self) -> set[str]:
        """Names of parameters that are not trained, nor moved: they come from where they came from."""
        parameters = self.policy.named_parameters(remove_duplicate=False)
        names = [name for name, value in parameters if not value.requires_grad]
        return {f"{owner}.{name}" for name in names for owner in ("policy", "reference.model")}

    def remember(self, validations: Sequence[Mapping[str, float]]) -> None:
        """Take over the validations of a run that goes on, and what was said of them."""
        self.validations = list(validations)
        for count in range(1, len(validations) + 1):
            self.warnings |= diagnose(self.validations[:count], self.start_loss, self.starts_as_reference)

    @property
    def starts_as_reference(self) -> bool:
        """Whether policy and reference are the same model when training starts."""
        return self.reference is not None and self.reference.is_start

    def on_train_start(self) -> None:
        for configured in self.trainer.lr_scheduler_configs:
            # A checkpoint brings the rate that the old schedule had come to; with another end it is another.
            schedule = configured.scheduler
            rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, factor in rates:
                group["lr"] = base * factor(schedule.last_epoch)
        if self.reference is not None:
            self.reference.check_length(self.trainer.estimated_stepping_batches)
        self.check_start()
        self._logged_at = None

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._logged_at = self._logged_at or time.perf_counter()  # what is done before the first step is no training

    def check_start(self) -> None:
        """Policy and reference must agree before the first step; where they need not, a line says so."""
        if self.reference is None:
            rank_zero_info(f"Step 0: not checked, since {type(self.loss).__name__} has no reference")
        elif self.trainer.ckpt_path is not None:
            rank_zero_info("Step 0: not checked, since this run goes on from a checkpoint")
        elif not self.reference.is_start:
            rank_zero_info("Step 0: not checked, since the reference is declared to be another model")
        else:
            batch = self.trainer.precision_plugin.convert_input(self.trainer.datamodule.first_batch()).to(self.device)
            with self.trainer.strategy.precision_plugin.train_step_context():
                found, fault = 0.0, None
                try:
                    found = check_start(self.loss, self.loss_state, self.policy, self.reference, batch)
                except InputError as error:  # on one rank alone the others would wait for it
                    fault = error
            if not self.trainer.strategy.reduce_boolean_decision(fault is None, all=True):
                raise fault or InputError("before the first step policy and reference differ on another rank")
            self.start_loss = found if self.loss.starts_constant else None
            rank_zero_info(f"Step 0: policy and reference agree, loss {found:.6g}")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Lightning would keep the gradients through the next forward: an eighth of a small model's peak.
        self.optimizers().zero_grad()
        if self.reference is not None:
            self.reference.follow(self.policy, self.trainer.global_step + 1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._observed:
            means = {
                name: self.trainer.strategy.reduce(value, reduce_op="sum") for name, value in self._observed.items()
            }
            self.loss_state, self._observed = self.loss.advance(self.loss_state, means), {}
        if self._ends_window(self.trainer.global_step + 1):
            self.check_window(self.trainer.global_step + 1)
            gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
            norm = total_norm(gradients)  # before clipping
            if not norm.isfinite() and not self._may_recover():
                raise InputError(
                    f"the gradient is not finite at optimizer step {self.trainer.global_step + 1}, though the losses "
                    "are; lower the learning rate, or look for a loss whose derivative overflows"
                )
            self._step_figures = {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}

    def _may_recover(self) -> bool:
        """Whether a gradient that is not finite may be an overflow in fp16: its step is skipped, the scale halved."""
        plugin = self.trainer.precision_plugin
        return isinstance(plugin, MixedPrecision) and plugin.scaler is not None and plugin.scaler.get_scale() >= 1

    def on_train_end(self) -> None:
        self.check_window(self.trainer.global_step)  # where a callback has stopped the run

    def check_window(self, step: int) -> None:
        """Every loss since the last report is finite, on every rank.

        Args:
            step: the optimizer step that the last of them is of.

        Raises:
            InputError: if one is not; its batch is written to disk.
        """
        if not self._window.parts:
            return
        file = Path(self.trainer.default_root_dir) / f"not_finite_rank{self.global_rank}.pt"
        fault = self._window.fault(step, file, self.trainer.datamodule.named_pairs)
        if not self.trainer.strategy.reduce_boolean_decision(fault is None, all=True):
            raise InputError(
                f"{fault or 'the loss is not finite on another rank'}; lower the learning rate, clip gradients or look "
                "at these rows"
            )
        self._window = LossWindow()

    def _ends_window(self, step: int) -> bool:
        """Whether figures are reported after this step: at intervals, at an end, and where last.ckpt is written.

        The last, so that a run that goes on from there reports the same means.
        """
        trainer = self.trainer
        interval = step % trainer.log_every_n_steps == 0 or step % self.save_every == 0
        return interval or trainer.is_last_batch or step == trainer.max_steps

    def on_train_batch_end(self, outputs: object, batch: PreferenceBatch, batch_idx: int) -> None:
        if not self._step_figures:  # this micro-batch ended no step that is logged
            return
        figures = self.train_metrics.compute()
        now = time.perf_counter()
        rates = {f"{name}_per_second": figures.pop(name) / (now - self._logged_at) for name in ("pairs", "tokens")}
        self.report("train", known(figures, self.train_metrics) | rates | self._step_figures)
        self.train_metrics.reset()
        self._logged_at, self._step_figures = now, {}

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            figures = self.val_metrics.compute()
            shown = known(figures, self.val_metrics)
            best = self.trainer.datamodule.best_accuracy
            if best is not None and ACCURACY in shown:
                shown[f"{ACCURACY}/best"] = best
            self.report("val", shown)
            self.validated_at = self.trainer.global_step
            counted = shown | {"pairs": figures["pairs"]}
            self.validations.append({name: float(value) for name, value in counted.items()})
            for fault, sentence in diagnose(self.validations, self.start_loss, self.starts_as_reference).items():
                self.warn(fault, sentence)
        self.val_metrics.reset()
        self._logged_at = time.perf_counter()  # validation is no training time

    def on_test_epoch_start(self) -> None:
        self.comparisons = []

    def on_test_epoch_end(self) -> None:
        """Every rank learns of all answers and makes the same figures of them."""
        gathered: list[list[Comparison]] = [self.comparisons]
        if self.trainer.world_size > 1:
            gathered = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self.comparisons)
        found = {(comparison.row, comparison.sample): comparison for part in gathered for comparison in part}
        self.comparisons = [found[place] for place in sorted(found)]
        found = summarise(self.comparisons)
        self.report("test", found)
        if sentence := truly_worse(found):
            self.warn("over-optimisation", sentence)

    def warn(self, fault: str, sentence: str) -> None:
        """Say it now, once, and keep it for the end of the run."""
        if fault not in self.warnings:
            self.warnings[fault] = sentence
            rank_zero_info(f"Warning: {fault}: {sentence}")

    def report(self, stage: str, figures: Mapping[str, Tensor | float]) -> None:
        """Send figures to callbacks and, at the number of optimizer steps done, to the loggers."""
        tagged = {f"{stage}/{name}": float(value) for name, value in figures.items()}
        self.log_dict(tagged, logger=False, batch_size=1)
        for logger in self.loggers:
            logger.log_metrics(tagged, step=max(self.trainer.global_step, self.loaded_step))
            logger.save()


def known(figures: Mapping[str, Tensor], metrics: PreferenceMetrics) -> dict[str, Tensor]:
    """The figures of which there was a pair: a mean over the pairs whose chosen answer is longer may have none."""
    return {name: figures[name] for name in metrics.figures if name not in CONDITIONS or not figures[name].isnan()}
