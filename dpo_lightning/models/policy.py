"""A causal language model that scores preference batches in any layout.

Most Hugging Face families can be told what each token sees (`dpo_lightning.models.attention`); those that cannot (ALiBi
reads distance from the index, state-space models have no mask) get the padded layout. Nobody keeps a table of families:
the self-check at load asks the model itself.

Legend: B pairs  R rows  T tokens a row  N answer tokens  D hidden  C chunk  V vocabulary
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import LogitsProcessorList, PreTrainedConfig, PreTrainedModel

from dpo_lightning.data.packing import LAYOUTS, Layout, LayoutChoice, PreferenceBatch, pack
from dpo_lightning.data.tokenization import TokenPair
from dpo_lightning.errors import InputError
from dpo_lightning.models.adapters import Adapter
from dpo_lightning.models.attention import TREES, Attention, MaskAttention, RowAttention, TreeAttention
from dpo_lightning.models.layers import is_checkpointed, last_feed_forward, only_at
from dpo_lightning.models.recomputation import computed_again
from dpo_lightning.objective.logps import PairLogps, token_logps


class Policy(nn.Module):
    """A language model and the way it reads a batch.

    Args:
        model: any causal language model of transformers with a decoder behind `get_decoder()` and a head over it.
        layout: the layout of the batches to come; `auto` takes the first of `shared`, `packed`, `padded` that passes
            the self-check.
        noise_rates: rates of dropout that the model's config had before they were set to 0, for its export.
        checkpoint: what it was loaded from.
        adapter: what of it is trained, where that is not the model itself.

    Raises:
        InputError: if the model cannot run the layout that was asked for.

    Attributes:
        layout: the layout that was chosen.
        attention: how the model is told which token sees which.
        shortened: name of the last layer's feed-forward block, which may be computed only where it is read; empty where
            it may not.
        reasons: why layouts and ways of attention that come before were passed over, one line each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: LayoutChoice = "auto",
        noise_rates: Mapping[str, float] | None = None,
        checkpoint: str = "",
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.noise_rates = dict(noise_rates or {})
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.layout: Layout = "padded"
        self.attention: Attention = RowAttention()
        self.shortened = last_feed_forward(model)
        self.reasons: list[str] = []
        candidates = LAYOUTS if layout == "auto" else (layout,)
        if any(self._adopt(candidate) for candidate in candidates):
            return
        tried_all = layout in ("auto", "padded")
        advice = "no layout is left, so it cannot be trained here" if tried_all else "use layout padded or auto"
        raise InputError(f"{type(model).__name__} cannot run the layout {layout}: {'; '.join(self.reasons)}; {advice}")

    def logps(self, batch: PreferenceBatch, statistics: Sequence[str] = ()) -> PairLogps:
        """Log-probabilities of every answer token of the batch, in nats, with gradient where it is enabled."""
        scores, extras = self(batch, statistics)
        return PairLogps(scores, batch.answer, batch.num_pairs, batch.num_answers, extras)

    def forward(self, batch: PreferenceBatch, statistics: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """What `logps` is made of, `[N]` each; with `extend` the only way in, where sharded weights are gathered."""
        hidden = self.hidden(batch)  # [R, T, D]
        states = hidden.flatten(0, 1)[batch.source]  # [N, D]
        return token_logps(states, batch.target, self.readout, self.vocabulary, statistics)

    def extend(self, tokens: Tensor, mask: Tensor, processors: LogitsProcessorList) -> Tensor:
        """Rows of tokens with what the model's own generation adds to them.

        Args:
            tokens: `[P, T]` ids, padded on the left.
            mask: `[P, T]`, 0 where a row is padded.
            processors: what may change the scores before a token is chosen.
        """
        # With its weights spread over devices, each must go on until all have come to their ends.
        together = isinstance(self, FSDPModule)
        with ordinary_attention(self.model):
            return self.model.generate(tokens, attention_mask=mask, logits_processor=processors, synced_gpus=together)

    def hidden(self, batch: PreferenceBatch) -> Tensor:
        """The decoder's last hidden states, `[R, T, D]`; what nobody reads is of no meaning."""
        decoder = self.model.get_decoder()
        # What a checkpointed layer computed may be asked for once only.
        lean = nullcontext() if is_checkpointed(self.model) else computed_again(self.model)
        with self._shortened(batch), lean:
            return decoder(input_ids=batch.tokens, **self.attention(batch), use_cache=False).last_hidden_state

    def _shortened(self, batch: PreferenceBatch) -> AbstractContextManager[None]:
        """Within, the last layer's block is computed where it is read, if it may be."""
        if not self.is_shortened:
            return nullcontext()
        return only_at(self.model.get_submodule(self.shortened), batch.read)

    def readout(self, states: Tensor) -> Tensor:
        """Logits `[C, V]` of hidden states `[C, D]`, by the model's own forward.

        Its decoder is replaced by one that returns `states`, so a bias (Phi, GPT-J), a scale (Cohere, Granite) or a
        soft cap (Gemma-2) is applied as the model applies it.
        """
        with standing_in(self.model.get_decoder(), states[None]):
            tokens = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            # Not `[0]`, whose backward would fill a second tensor of the logits' size.
            return self.model(input_ids=tokens, use_cache=False).logits.squeeze(0)

    def starting_tensors(self) -> dict[str, Tensor]:
        """The weights that training starts from: a new adapter, which changes nothing yet, has no part in them."""
        return self.model.state_dict() if self.adapter is None else self.adapter.starting_tensors()

    def starting_config(self) -> dict[str, Any] | None:
        """The configuration of the adapter that training begins with, where it began before."""
        return None if self.adapter is None or self.adapter.new else self.adapter.config

    def lay_out(self, pairs: Sequence[TokenPair]) -> PreferenceBatch:
        """Pairs as a batch that this model reads, on its device."""
        batch = pack(pairs, self.layout, row_tokens=self.attention.row_tokens)
        return batch.to(self.model.device)

    @property
    def is_shortened(self) -> bool:
        """Whether the last layer's feed-forward block is computed only where it is read.

        Layers that are computed again in backward are so outside of `hidden`, and whole; then references and validation
        compute whole ones, too, so that what is equal is equal to the bit.
        """
        return bool(self.shortened) and not is_checkpointed(self.model)

    @property
    def attn_implementation(self) -> str:
        """What transformers' models compute attention by, where they are told of no trees."""
        own = self.model.config._attn_implementation
        return "sdpa" if own == TREES else own

    @property
    def vocabulary(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def _adopt(self, layout: Layout) -> bool:
        """Take a layout on in the quickest way that the model can; if it can in none, `reasons` says why not."""
        self.layout = layout
        if layout == "padded":
            return self._fits(RowAttention())
        if "position_ids" not in inspect.signature(self.model.get_decoder().forward).parameters:
            self.reasons.append(f"{layout}: the model takes no position_ids")
            return False
        if self.model.config._attn_implementation in ("sdpa", TREES):
            self.model.set_attn_implementation(TREES)
            if self._fits(TreeAttention(self.model.config)):
                return True
            self.model.set_attn_implementation("sdpa")
        return self._fits(MaskAttention(self.model.config, self.model.dtype))

    def _fits(self, attention: Attention) -> bool:
        """Tell the model so what each token sees; whether that is what it sees, else one more of `reasons`."""
        self.attention = attention
        fault = self_check(self)
        if fault is not None and self.shortened:
            name, self.shortened = self.shortened, ""
            fault = self_check(self)
            if fault is not None:  # it is not for this
                self.shortened = name
        if fault is None and isinstance(attention, TreeAttention):
            fault = attention.fault()
        if fault is not None:
            self.reasons.append(f"{self.layout}, {attention}: {fault}")
        return fault is None


@contextmanager
def ordinary_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within, a model attends as it does where nobody tells it of trees."""
    trees = model.config._attn_implementation == TREES
    if trees:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if trees:
            model.set_attn_implementation(TREES)


class _DecoderOutput(tuple):
    """Hidden states as a decoder returns them: element 0, `last_hidden_state`; all else (caches ...) is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def standing_in(decoder: nn.Module, states: Tensor) -> Iterator[None]:
    """Within, `decoder` returns `states` `[1, C, D]` whatever it is given."""

    def forward(*_: object, **__: object) -> _DecoderOutput:
        return _DecoderOutput((states,))

    own = decoder.__dict__.get("forward")  # where a library has wrapped it
    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward  # the class's shows again
        if own is not None:
            decoder.forward = own


@torch.no_grad()
def self_check(policy: Policy) -> str | None:
    """Whether the model computes in its layout what it computes for plain, separate sequences.

    Two toy pairs of unequal lengths and random tokens, in one row where the layout packs, against one unpadded forward
    of the model's own logits for each answer. And other chosen tokens, and another last rejected token, must leave the
    log-probabilities of the rejected tokens before it as they were, to the bit: that finds leaking trees, and models
    that see the future, in any precision. (In a mixture of experts the other tokens change the shapes of the experts'
    products and so their rounding; there they may move by the tolerance.)

    Returns:
        None if all is well, else what is wrong.
    """
    toy, other = toy_pairs(policy)
    row = sum(len(pair.prompt) + len(pair) for pair in toy)
    device = policy.model.device
    try:
        batch = pack(toy, policy.layout, row_tokens=row).to(device)
        found = policy.logps(batch).token_logps
        swapped = policy.logps(pack(other, policy.layout, row_tokens=row).to(device)).token_logps
        with ordinary_attention(policy.model):
            plain = separate_logps(policy.model, toy)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"its forward failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    allowed = tolerance(plain, policy.model)
    error = (found - plain).square().mean().sqrt()
    if not error <= allowed:
        return f"log-probabilities differ from separate forwards by {error:.2g} nats a token"
    ends = torch.cat([batch.answer.diff() != 0, batch.answer.new_ones(1).bool()])  # the last token of each answer
    leak = (found - swapped)[(batch.answer >= batch.num_pairs) & ~ends].abs().max()
    if not leak <= (allowed if has_experts(policy.model.config) else 0):
        return f"other tokens, which it must not see, move the rejected answer's log-probabilities by {leak:.2g} nats"
    return None


def tolerance(logps: Tensor, model: PreTrainedModel) -> float:
    """Nats a token, as root mean square, by which two ways of computing the same `logps` may differ.

    In half precision rounding is a share of their spread that grows with the depth: 0.008 at most in 17 families of two
    or three layers, where wrong positions give 0.03 and a wrong mask 1; 0.026 in a Llama of 32 layers.
    """
    if torch.finfo(model.dtype).bits >= 32:
        return 1e-4
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 12)
    return 0.015 * layers**0.5 * logps.std().item()


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether the model routes tokens to experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


def toy_pairs(policy: Policy) -> tuple[list[TokenPair], list[TokenPair]]:
    """Two unequal pairs of random tokens, and the same with other chosen tokens and another last rejected token.

    Their prompts outlast a short attention window, so that a window measured in row indices shows.
    """
    windows = [getattr(policy.model.config, name, None) for name in ("sliding_window", "window_size")]
    short = [window for window in windows if isinstance(window, int) and window <= 1024]
    base = max(short, default=3) + 2
    # On the CPU, though a model may be made where another device is the default.
    generator = torch.Generator().manual_seed(0)

    def draw(length: int):
        drawn = torch.randint(policy.model.config.vocab_size, (length,), generator=generator, device="cpu")
        return drawn.int().numpy()

    toy = [TokenPair(draw(base), draw(5), draw(3)), TokenPair(draw(base + 2), draw(2), draw(6))]
    vocabulary = policy.model.config.vocab_size
    other = []
    for pair in toy:
        rejected = pair.rejected.copy()
        rejected[-1] = (rejected[-1] + 1) % vocabulary
        other.append(TokenPair(pair.prompt, draw(len(pair.chosen)), rejected))
    return toy, other


def separate_logps(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> Tensor:
    """`[N]` token log-probabilities from one unpadded forward per answer, answers in order."""
    pieces = []
    for answer, prompt in [(pair.chosen, pair.prompt) for pair in pairs] + [(p.rejected, p.prompt) for p in pairs]:
        tokens = torch.as_tensor([*prompt, *answer], dtype=torch.long, device=model.device)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        first = max(len(prompt), 1)
        pieces.append(logps[first - 1 : -1].gather(-1, tokens[first:, None]).squeeze(-1))
    return torch.cat(pieces)
