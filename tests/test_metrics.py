"""Metrics over pairs against numpy over all pairs at once.

Legend: B pairs
"""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.objective.logps import PairLogps
from dpo_lightning.objective.losses import AOT, IPO, NCA, SFT, AOTUnpaired, Hinge, PreferenceLoss, Sigmoid, SimPO
from dpo_lightning.objective.metrics import PreferenceMetrics, Scored, accuracies

BETA = 0.1
PAIRS = 23
FIGURES = {
    "loss",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/saturation",
    "rewards/accuracies/longer",
    "rewards/accuracies/shorter",
    "displacement",
    "kl_of_pairs",
}
#: Only a loss whose gradient is sigma(-margin) has this.
SATURATION = {"rewards/saturation"}
#: Only losses that compare with a reference have these.
COMPARED = {"displacement", "kl_of_pairs"}
SORTED = (
    AOT(BETA),
    AOTUnpaired(BETA),
    AOT(BETA, label_smoothing=0.1, sft_weight=0.3, per_token=True),
    AOTUnpaired(BETA, label_smoothing=0.1, sft_weight=0.3, per_token=True),
)

Pairs = list[tuple["Answer", "Answer"]]


class Answer:
    """One answer: log-probabilities of its tokens under policy and reference, and its mean logits."""

    def __init__(self, rng: np.random.Generator, tokens: int) -> None:
        self.policy = rng.uniform(-9, 0, tokens)
        self.reference = rng.uniform(-9, 0, tokens)
        self.logits = rng.normal(size=tokens)
        self.ones = np.ones(tokens)

    @property
    def logratio(self) -> float:
        return self.policy.sum() - self.reference.sum()

    @property
    def reward(self) -> float:
        return BETA * self.logratio


def draw_pairs(seed: int, count: int = PAIRS) -> Pairs:
    """Pairs of answers of 1 to 7 tokens; of every five one is a tie and one has a large margin."""
    rng = np.random.default_rng(seed)
    pairs = [tuple(Answer(rng, rng.integers(1, 8)) for _ in range(2)) for _ in range(count)]
    for chosen, rejected in pairs[::5]:
        for answer in (chosen, rejected):
            answer.reference = answer.policy
    for _, rejected in pairs[1::5]:
        rejected.policy = rejected.policy - 60
    return pairs


def numpy_figures(pairs: Pairs) -> dict[str, float]:
    """The oracle: every figure as the mean of one number a pair, over the pairs that have it; NaN where none has."""
    rows = []
    for chosen, rejected in pairs:
        margin = chosen.reward - rejected.reward
        accuracy = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        tokens = len(chosen.policy), len(rejected.policy)
        rows.append(
            {
                "loss": np.log1p(np.exp(-margin)),
                "logps/chosen": chosen.policy.sum(),
                "logps/rejected": rejected.policy.sum(),
                "logits/chosen": chosen.logits.mean(),
                "logits/rejected": rejected.logits.mean(),
                "rewards/chosen": chosen.reward,
                "rewards/rejected": rejected.reward,
                "rewards/accuracies": accuracy,
                "rewards/margins": margin,
                "rewards/saturation": float(1 / (1 + np.exp(margin)) < 0.01),  # what is left of the gradient
                "displacement": float(chosen.policy.sum() < chosen.reference.sum()),
                "kl_of_pairs": -(chosen.logratio + rejected.logratio) / 2,
            }
        )
        if tokens[0] != tokens[1]:
            rows[-1]["rewards/accuracies/" + ("longer" if tokens[0] > tokens[1] else "shorter")] = accuracy
    had = {name: [row[name] for row in rows if name in row] for name in FIGURES}
    return {name: float(np.mean(values)) if values else np.nan for name, values in had.items()}


def numpy_sorted(loss: AOTUnpaired, pairs: Pairs) -> float:
    """The oracle of a loss over all pairs together: what is largest on one side stands against the other's largest."""
    policy, reference, tokens = (
        np.array([[getattr(answer, which).sum() for answer in pair] for pair in pairs])
        for which in ("policy", "reference", "ones")
    )  # [B, 2] each
    scale = tokens if loss.per_token else 1.0
    if isinstance(loss, AOT):
        above, below = (-np.diff(logps / scale)[:, 0] for logps in (policy, reference))
    else:
        above, below = ((policy - reference) / scale).T
    margins = BETA * (np.sort(above) - np.sort(below))
    eps = loss.label_smoothing
    losses = (1 - eps) * np.log1p(np.exp(-margins)) + eps * np.log1p(np.exp(margins))
    return float(losses.mean() - loss.sft_weight * (policy / tokens)[:, 0].mean())


def all_figures(loss: PreferenceLoss, pairs: Pairs) -> dict[str, float]:
    """Every figure, and the counts, of a loss whose rewards are beta times the log-ratios."""
    found = numpy_figures(pairs) | {"pairs": len(pairs), "tokens": num_tokens(pairs)}
    if isinstance(loss, AOTUnpaired):
        found = {name: value for name, value in found.items() if name not in SATURATION}
        found["loss"] = numpy_sorted(loss, pairs)
    return found


def pair_logps(answers: list[Answer], which: str, num_pairs: int) -> PairLogps:
    return PairLogps(
        torch.from_numpy(np.concatenate([getattr(answer, which) for answer in answers])),
        torch.tensor([i for i, answer in enumerate(answers) for _ in answer.policy]),
        num_pairs=num_pairs,
        num_answers=len(answers),
        statistics={"mean_logits": torch.from_numpy(np.concatenate([answer.logits for answer in answers]))},
    )


def count(metric: PreferenceMetrics, loss: PreferenceLoss, pairs: Pairs, weight: float = 1.0) -> None:
    """Updates `metric` with a batch of `pairs`."""
    sides = (0, 1) if loss.pairwise else (0,)
    answers = [pair[side] for side in sides for pair in pairs]
    policy, reference = (pair_logps(answers, which, len(pairs)) for which in ("policy", "reference"))
    reference = reference if loss.needs_reference else None
    scored = Scored(policy, reference, loss(policy, reference), loss.rewards(policy, reference))
    tokens = sum(len(answer.policy) for answer in answers)
    metric.update(scored, torch.full((len(pairs),), weight), int(weight) * tokens)


def close(wanted: dict[str, float]) -> object:
    """What a figure may differ by in float64; a mean over no pair is no number."""
    return pytest.approx(wanted, rel=1e-12, abs=1e-12, nan_ok=True)


def figures(metric: PreferenceMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def num_tokens(pairs: Pairs) -> int:
    return sum(len(answer.policy) for pair in pairs for answer in pair)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**20), st.sets(st.integers(1, PAIRS - 1)), st.randoms(use_true_random=False))
def test_any_split_into_batches_gives_numpys_means(seed: int, cuts: set[int], random) -> None:
    pairs = draw_pairs(seed)
    wanted = all_figures(Sigmoid(BETA), pairs)
    random.shuffle(pairs)
    metric = PreferenceMetrics(Sigmoid(BETA))
    edges = [0, *sorted(cuts), PAIRS]
    for start, end in pairwise(edges):
        count(metric, Sigmoid(BETA), pairs[start:end])
    found = figures(metric)
    assert set(found) == FIGURES | {"pairs", "tokens"}
    assert found == close(wanted)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(SORTED),
    st.integers(0, 2**20),
    st.sets(st.integers(1, PAIRS - 1)),
    st.randoms(use_true_random=False),
)
def test_a_loss_that_sorts_all_pairs_is_that_of_all_pairs_however_they_are_split(
    loss: AOTUnpaired, seed: int, cuts: set[int], random
) -> None:
    pairs = draw_pairs(seed)
    wanted = numpy_sorted(loss, pairs)
    random.shuffle(pairs)
    metric = PreferenceMetrics(loss)
    for start, end in pairwise([0, *sorted(cuts), PAIRS]):
        count(metric, loss, pairs[start:end])
    assert figures(metric)["loss"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("loss", SORTED)
def test_a_loss_that_sorts_all_pairs_is_not_the_mean_over_its_batches(loss: AOTUnpaired) -> None:
    """Or the law above would hold of any loss."""
    pairs = draw_pairs(0)
    assert np.mean([numpy_sorted(loss, [pair]) for pair in pairs]) > numpy_sorted(loss, pairs) + 0.02


@pytest.mark.parametrize("loss", [Sigmoid(BETA), SFT(), AOT(BETA), AOTUnpaired(BETA)])
def test_ghosts_count_for_nothing(loss: PreferenceLoss) -> None:
    pairs, ghosts = draw_pairs(0, 7), draw_pairs(1, 4)
    alone, haunted = PreferenceMetrics(loss), PreferenceMetrics(loss)
    count(alone, loss, pairs)
    count(haunted, loss, ghosts, weight=0.0)
    count(haunted, loss, pairs)
    count(haunted, loss, ghosts, weight=0.0)
    assert figures(haunted) == figures(alone)


def test_a_ghost_beside_a_pair_counts_for_nothing() -> None:
    pairs, loss = draw_pairs(0, 3), Sigmoid(BETA)
    metric = PreferenceMetrics(loss)
    policy, reference = (pair_logps([p[s] for s in (0, 1) for p in pairs], w, 3) for w in ("policy", "reference"))
    scored = Scored(policy, reference, loss(policy, reference), loss.rewards(policy, reference))
    metric.update(scored, torch.tensor([1.0, 0.0, 1.0]), num_tokens([pairs[0], pairs[2]]))
    assert figures(metric) == close(all_figures(loss, [pairs[0], pairs[2]]))


def test_a_tie_is_half_an_accuracy() -> None:
    tie = draw_pairs(0, 1)  # its policy is its reference
    metric = PreferenceMetrics(Sigmoid(BETA))
    count(metric, Sigmoid(BETA), tie)
    found = figures(metric)
    assert found["rewards/accuracies"] == 0.5 and found["rewards/margins"] == 0
    assert found["loss"] == pytest.approx(np.log(2), abs=1e-15)
    margins = [3.0, 1e-30, 0.0, -0.0, -1e-30]
    assert accuracies(torch.tensor(margins)).tolist() == [1, 1, 0.5, 0.5, 0]


@pytest.mark.parametrize("loss", [Sigmoid(BETA), AOT(BETA)])
def test_reset_forgets_everything(loss: PreferenceLoss) -> None:
    metric = PreferenceMetrics(loss)
    count(metric, loss, draw_pairs(0))
    metric.reset()
    pairs = draw_pairs(1, 4)
    count(metric, loss, pairs)
    assert figures(metric) == close(all_figures(loss, pairs))


def test_supervised_figures_are_those_of_the_chosen_answers() -> None:
    pairs = draw_pairs(0)
    metric = PreferenceMetrics(SFT())
    count(metric, SFT(), pairs[:5])
    count(metric, SFT(), pairs[5:])
    wanted = {
        "loss": np.mean([-chosen.policy.mean() for chosen, _ in pairs]),
        "logps/chosen": np.mean([chosen.policy.sum() for chosen, _ in pairs]),
        "logits/chosen": np.mean([chosen.logits.mean() for chosen, _ in pairs]),
        "pairs": PAIRS,
        "tokens": sum(len(chosen.policy) for chosen, _ in pairs),
    }
    assert figures(metric) == close(wanted)


@pytest.mark.parametrize("loss", [Sigmoid(BETA), AOT(BETA)])
def test_no_pairs_give_no_number(loss: PreferenceLoss) -> None:
    metric = PreferenceMetrics(loss)
    count(metric, loss, draw_pairs(0, 2), weight=0.0)
    found = figures(metric)
    assert found["pairs"] == found["tokens"] == 0
    assert all(np.isnan(found[name]) for name in FIGURES - (set() if isinstance(loss, Sigmoid) else SATURATION))


@pytest.mark.parametrize("loss", SORTED)
def test_where_batches_are_steps_a_loss_over_all_pairs_is_the_mean_over_steps(loss: AOTUnpaired) -> None:
    """As it was trained on, however many steps there are between two reports."""
    pairs = draw_pairs(0, 12)
    metric = PreferenceMetrics(loss, batches_are_steps=True)
    for start in (0, 4, 8):
        count(metric, loss, pairs[start : start + 4])
    wanted = np.mean([numpy_sorted(loss, pairs[start : start + 4]) for start in (0, 4, 8)])
    assert figures(metric)["loss"] == pytest.approx(wanted, rel=1e-12)
    assert abs(wanted - numpy_sorted(loss, pairs)) > 1e-5  # all pairs together are another loss


@pytest.mark.parametrize("loss", [Sigmoid(BETA, 0.1), Hinge(BETA), IPO(BETA), NCA(BETA), SimPO()])
def test_a_loss_with_another_gradient_reports_no_saturation(loss: PreferenceLoss) -> None:
    assert not SATURATION & set(PreferenceMetrics(loss).figures)


def test_pairs_of_equal_lengths_are_neither_longer_nor_shorter() -> None:
    rng = np.random.default_rng(0)
    pairs = [tuple(Answer(rng, tokens) for tokens in lengths) for lengths in ((3, 3), (5, 2), (4, 4), (6, 1))]
    metric = PreferenceMetrics(Sigmoid(BETA))
    count(metric, Sigmoid(BETA), pairs)
    found, longer = figures(metric), numpy_figures([pairs[1], pairs[3]])
    assert found["rewards/accuracies/longer"] == longer["rewards/accuracies"]
    assert np.isnan(found["rewards/accuracies/shorter"])


def test_a_loss_without_a_reference_has_no_figure_that_compares_with_one() -> None:
    metric = PreferenceMetrics(SimPO())
    count(metric, SimPO(), draw_pairs(0))
    found = figures(metric)
    assert set(found) == FIGURES - COMPARED - SATURATION | {"pairs", "tokens"}
    assert found["logps/rejected"] == pytest.approx(numpy_figures(draw_pairs(0))["logps/rejected"], rel=1e-12)


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module,
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),  # what Lightning does for precision bf16-true
        lambda module: module.to(dtype=torch.float16),  # and for 16-true
    ],
    ids=["as-made", "half", "to-bf16", "to-fp16"],
)
def test_sums_keep_their_width_in_a_module_of_any_precision(
    convert: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    """In fp32 the sum of 2^24 and 1 is 2^24; in bf16 a count of pairs stops at 256."""
    (metric,) = convert(torch.nn.ModuleList([PreferenceMetrics(SFT())]))
    metric.reset()
    for loss in (2.0**24, 1.0, 1.0):
        policy = PairLogps(torch.tensor([-loss]), torch.tensor([0]), 1, 1, {"mean_logits": torch.tensor([1.0])})
        metric.update(Scored(policy, None, SFT()(policy, None), None), torch.ones(1), 257)
    assert figures(metric)["loss"] * 3 == pytest.approx(2**24 + 2, abs=1e-6)
    assert figures(metric)["tokens"] == 3 * 257


def test_figures_carry_no_gradient() -> None:
    tokens = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy = PairLogps(tokens, torch.tensor([0, 1]), 2, 2, {"mean_logits": torch.zeros(2)})
    metric = PreferenceMetrics(SFT())
    metric.update(Scored(policy, None, SFT()(policy, None), None), torch.ones(2), 2)
    assert not metric.totals.requires_grad


@pytest.mark.parametrize("loss", [Sigmoid(BETA), *SORTED[:2]])
def test_merged_states_are_the_states_of_all_pairs(loss: PreferenceLoss) -> None:
    pairs = draw_pairs(0)
    first, second = PreferenceMetrics(loss), PreferenceMetrics(loss)
    count(first, loss, pairs[:4])
    count(second, loss, pairs[4:])
    first.merge_state(second)
    assert figures(first) == close(all_figures(loss, pairs))


RANKED = (Sigmoid(BETA), *SORTED[:2])


def count_on_rank(rank: int, world: int, store: str, results: str) -> None:
    """A rank of a process group counts its share of the pairs, the last rank ghosts besides, and saves the figures."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    pairs = draw_pairs(0)
    found = []
    for loss in RANKED:
        metric = PreferenceMetrics(loss)
        for pair in pairs[rank::world]:
            count(metric, loss, [pair])
        if rank == world - 1:
            count(metric, loss, pairs[:3], weight=0.0)
        found.append(figures(metric))
        metric.reset()
        # Of two pairs the other rank has none.
        count(metric, loss, pairs[:2], weight=float(rank == 0))
        found.append(figures(metric))
    torch.save(found, f"{results}{rank}")
    torch.distributed.destroy_process_group()


def test_every_rank_reports_the_figures_of_all_pairs(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(count_on_rank, (2, str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2)
    pairs = draw_pairs(0)
    for rank in range(2):
        found = iter(torch.load(tmp_path / f"rank{rank}"))
        for loss in RANKED:
            assert next(found) == close(all_figures(loss, pairs))
            assert next(found) == close(all_figures(loss, pairs[:2]))
