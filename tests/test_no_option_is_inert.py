"""Whoever sets an option of a loss gets another objective, or hears why not: walked over every loss and every field.

One value is changed at a time; then two, since an option may count for nothing beside another. What must change is the
losses or their gradient, in the first optimizer step or, through what a loss remembers, in the next one. The walk
names no loss and no field, so that a new one is covered as it is written.

Legend: B pairs  N answer tokens
"""

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from dpo_lightning.data.packing import LAYOUTS, Layout, pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.errors import InputError
from dpo_lightning.models.cached import CachedLogps
from dpo_lightning.models.policy import Policy
from dpo_lightning.models.reference import AdapterOff, Reference
from dpo_lightning.objective.divergences import Divergence
from dpo_lightning.objective.logps import STATISTICS, PairLogps
from dpo_lightning.objective.losses import BCO, Sigmoid
from dpo_lightning.objective.preference import PreferenceLoss, State, call
from tests.objectives import candidates, concrete, field_types, make
from tests.toy import make_tokenizer

LOSSES = concrete(PreferenceLoss)

#: Tokens of the answers, chosen and rejected: short, so that no sigmoid is saturated, and longer on either side.
LENGTHS = [(5, 2), (2, 4), (3, 3), (1, 4), (4, 1), (6, 3)]


@dataclass(frozen=True)
class Batch:
    """What a policy and a reference say of the same pairs, the policy's log-probabilities taking gradient."""

    policy: PairLogps
    reference: PairLogps


@dataclass(frozen=True)
class Step:
    """A step's pairs, and the same without their rejected answers."""

    pairs: Batch
    chosen: Batch


def read_pairs(folder: Path) -> list[TokenPair]:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    words = make_tokenizer()
    pairs = []
    for row, lengths in zip(rows, LENGTHS, strict=False):
        prompt, *both = (np.array(words(row[name])["input_ids"]) for name in ("prompt", "chosen", "rejected"))
        pairs.append(TokenPair(prompt, *(ids[:length] for ids, length in zip(both, lengths, strict=True))))
    return pairs


def perturbed(folder: Path, layout: Layout, seed: int) -> Policy:
    """The toy's GPT-2 in fp64, moved at random so far that its answers are not all as likely."""
    model = GPT2LMHeadModel.from_pretrained(folder / "model", dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Policy(model.eval(), layout)


@pytest.fixture(scope="module", params=LAYOUTS)
def step(toy: Path, request: pytest.FixtureRequest) -> Step:
    """By real models, in each layout."""
    layout, pairs = request.param, read_pairs(toy)
    models = [perturbed(toy, layout, seed) for seed in (1, 2)]
    batches = []
    for these in (pairs, [replace(pair, rejected=None) for pair in pairs]):
        batch = pack(these, layout)
        with torch.no_grad():
            policy, reference = (model.logps(batch, tuple(STATISTICS)) for model in models)
        policy.token_logps.requires_grad_()
        batches.append(Batch(policy, reference))
    logratios = batches[0].policy.logps - batches[0].reference.logps
    assert 0.3 < logratios.abs().median() < 5  # nats: neither all the same nor out of every sigmoid's range
    return Step(*batches)


def outcome(loss: PreferenceLoss, step: Step) -> Tensor:
    """Losses and gradient of a step and of the next one over the same pairs, in one row.

    The loss is given what it asks for, and no more: a reference, rejected answers, statistics.
    """
    batch = step.pairs if loss.pairwise else step.chosen
    policy = replace(batch.policy, statistics={name: batch.policy.statistics[name] for name in loss.statistics})
    reference = replace(batch.reference, statistics={}) if loss.needs_reference else None
    state: State = {name: torch.tensor(value).double() for name, value in loss.initial_state.items()}
    found = []
    for _ in range(2):
        losses = call(loss, policy, reference, state)
        found += [losses.detach(), *torch.autograd.grad(losses.mean(), policy.token_logps)]
        observed = loss.observe(policy, reference)
        state = loss.advance(state, {name: values.mean() for name, values in observed.items()})
    return torch.cat(found)


def same(one: Tensor, other: Tensor) -> bool:
    """Up to the rounding of fp64; a batch without rejected answers has fewer tokens, and is another."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class Change:
    """A loss with the fields that differ in it, or the sentence that refused it."""

    loss: PreferenceLoss | None
    fields: tuple[str, ...]
    refusal: str = ""


def changes(loss: PreferenceLoss, name: str) -> Iterator[Change]:
    """The loss with each candidate for its field `name` but the value it has."""
    for value in candidates(field_types(type(loss))[name]):
        if value == getattr(loss, name):
            continue
        try:
            yield Change(replace(loss, **{name: value}), (name,))
        except InputError as error:
            yield Change(None, (name,), str(error))


def inert(loss: PreferenceLoss, name: str, step: Step) -> list[PreferenceLoss]:
    """The losses with another value for `name` that do the same as `loss`."""
    before = outcome(loss, step)
    return [one.loss for one in changes(loss, name) if one.loss is not None and same(outcome(one.loss, step), before)]


def names(cls: type) -> list[str]:
    return [field.name for field in fields(cls)]


@pytest.mark.parametrize("cls", LOSSES)
def test_every_value_of_every_option_changes_the_objective(cls: type, step: Step) -> None:
    loss = make(cls)
    assert outcome(loss, step).isfinite().all()
    assert {name: inert(loss, name, step) for name in names(cls)} == {name: [] for name in names(cls)}


@pytest.mark.parametrize("cls", LOSSES)
def test_an_option_changes_the_objective_beside_any_other_option_too(cls: type, step: Step) -> None:
    """For two options set together: neither may be taken away without a change."""
    plain, silent = make(cls), []
    for first, second in combinations(names(cls), 2):
        one = next((change.loss for change in changes(plain, first) if change.loss), None)
        if one is None:
            continue
        for both in changes(one, second):
            if both.loss is None:
                continue
            found = outcome(both.loss, step)
            for name in (first, second):
                without = replace(both.loss, **{name: getattr(plain, name)})
                if same(outcome(without, step), found):
                    silent.append((name, both.loss))
            break
    assert silent == []


@pytest.mark.parametrize("cls", LOSSES)
def test_a_refusal_names_the_class_and_its_field(cls: type) -> None:
    for name in names(cls):
        for change in changes(make(cls), name):
            assert change.loss is not None or f"{cls.__name__}.{name}" in change.refusal


@pytest.mark.parametrize("cls", concrete(Divergence))
def test_every_option_of_a_divergence_changes_the_objective(cls: type, step: Step) -> None:
    before, silent = outcome(Sigmoid(divergence=cls()), step), []
    for name in names(cls):
        accepted = [change.loss for change in changes(cls(), name) if change.loss is not None]
        assert accepted, f"{cls.__name__}.{name}"
        silent += [one for one in accepted if same(outcome(Sigmoid(divergence=one), step), before)]
    assert silent == []


#: Optimizer steps of the run that a reference is asked about.
STEPS = 4

#: Values of a reference's options, by their type.
VALUES = {float: (0.25, 0.6, 1.0), int: (1, 2, 3, 99), str | None: (None, "another")}


def answered(reference: Reference, folder: Path) -> Tensor:
    """What a reference says of the same pairs after each step, while the policy moves away."""
    policy, moved = perturbed(folder, "shared", 1), perturbed(folder, "shared", 3)
    reference.prepare(policy)
    reference.double()
    reference.check_length(STEPS)
    batch, found = pack(read_pairs(folder), "shared"), []
    for number in range(1, STEPS + 1):
        reference.follow(moved, number)
        found.append(reference.logps(batch).logps)
    return torch.cat(found)


#: References that need a run around them, whose options change tables and curves in `e2e/test_references`.
ELSEWHERE = {AdapterOff: set(), CachedLogps: {"checkpoint", "directory"}}


def test_references_whose_options_are_tried_elsewhere_have_no_further_ones() -> None:
    assert {cls: set(inspect.signature(cls).parameters) for cls in ELSEWHERE} == ELSEWHERE


@pytest.mark.parametrize("cls", [cls for cls in concrete(Reference) if cls not in ELSEWHERE])
def test_every_option_of_a_reference_changes_what_it_says(cls: type, toy: Path, tmp_path: Path) -> None:
    perturbed(toy, "shared", 5).model.save_pretrained(tmp_path / "another")
    options = inspect.signature(cls).parameters
    hints = get_type_hints(cls.__init__)
    plain = {name: 2 for name in options if hints[name] is int}  # within the run
    before = answered(cls(**plain), toy)
    for name in options:
        outcomes = []
        for value in VALUES[hints[name]]:
            value = str(tmp_path / value) if isinstance(value, str) else value
            if value == plain.get(name, options[name].default):
                continue
            try:
                outcomes.append(answered(cls(**plain | {name: value}), toy))
            except InputError as error:
                assert f"{cls.__name__}.{name}" in str(error)
        assert outcomes and not any(same(before, found) for found in outcomes), name


def owner(cls: type, name: str) -> str:
    """The class that declares a field, which its subclasses share."""
    declaring = [base for base in cls.__mro__ if is_dataclass(base) and name in inspect.get_annotations(base)]
    return f"{declaring[-1].__name__}.{name}"


def test_the_walk_changes_every_field_there_is() -> None:
    """No field is passed over because every loss refuses every candidate for it."""
    known = {owner(cls, name) for cls in LOSSES for name in names(cls)}
    changed = {
        owner(cls, name)
        for cls in LOSSES
        for name in names(cls)
        if any(change.loss is not None for change in changes(make(cls), name))
    }
    assert len(LOSSES) >= 10 and len(known) >= 10
    assert changed == known


# What the walk would find. These are no losses of the package, which is where it looks.


@dataclass(frozen=True)
class Deaf(Sigmoid):
    """Takes a number that it never reads, and beside it a flag that silences beta."""

    unread: float = 0.5
    loud: bool = False

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (chosen - rejected) ** 2 if self.loud else super().pair_losses(chosen, rejected)


@dataclass(frozen=True)
class Forgetful(BCO):
    """Its decay moves a state that it does not look at."""

    def __call__(self, policy: PairLogps, reference: PairLogps | None, state: State) -> Tensor:
        return super().__call__(policy, reference, {"shift": torch.zeros(())})


def test_the_walk_finds_an_option_that_is_never_read(step: Step) -> None:
    found = {name: inert(Deaf(), name, step) for name in names(Deaf)}
    assert len(found.pop("unread")) == len(list(changes(Deaf(), "unread"))) >= 5
    assert not any(found.values())


def test_the_walk_finds_an_option_that_another_one_silences(step: Step) -> None:
    with pytest.raises(AssertionError, match="beta"):
        test_an_option_changes_the_objective_beside_any_other_option_too(Deaf, step)


def test_the_walk_finds_a_memory_that_is_not_used(step: Step) -> None:
    assert inert(Forgetful(), "decay", step) and not inert(BCO(), "decay", step)


def test_the_walk_sees_the_packages_losses_alone() -> None:
    assert {Deaf, Forgetful}.isdisjoint(concrete(PreferenceLoss)) and {Sigmoid, BCO} <= set(concrete(PreferenceLoss))


def test_a_field_of_an_unknown_type_stops_the_walk() -> None:
    with pytest.raises(TypeError, match="complex"):
        candidates(complex)
