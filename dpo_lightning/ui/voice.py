"""A model that is talked to: answers token by token, and what an answer is worth to it.

Prompts become ids by the way of the training data, so that the model reads what it was trained on. One question is
answered at a time, whoever asks.

Legend: L tokens of an answer  N tokens of both answers
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from dpo_lightning.data.chat import FAILURES
from dpo_lightning.data.formats import ASSISTANT
from dpo_lightning.data.preference import Preference, RowFault
from dpo_lightning.data.tokenization import PairTokenizer, TokenPair
from dpo_lightning.errors import InputError
from dpo_lightning.models.checkpoint import context_length, is_hub_id, load_policy, load_tokenizer, located
from dpo_lightning.models.generation import Sampler, generating, until_eos
from dpo_lightning.models.reach import answers, check_reachable
from dpo_lightning.paths import path_of

#: The options of a run, beside its export.
CONFIG = "config.yaml"

#: What a model without a limit of its own reads.
CONTEXT = 4096

#: Beta where a model does not say what it was trained with.
BETA = 0.1

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_p: the share of probability that tokens are drawn from, the likeliest first.
        max_new_tokens: longest answer, with its EOS.
        seed: of the random numbers; with the same one a prompt has the same answer.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


class Voice:
    """A loaded model with its tokenizer.

    Args:
        name: folder or hub id.

    Raises:
        InputError: if it cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer = load_tokenizer(name)
        self.policy = load_policy(name, layout="padded").eval().requires_grad_(False)
        if torch.cuda.is_available():
            self.policy.cuda()
        self.context = context_length(self.policy.model.config) or CONTEXT
        self.lock = Lock()

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def text(self, messages: Sequence[Message], dialogue: bool = False) -> str:
        """What the model reads, up to where its answer begins.

        By the chat template where there is one; else the last question alone, or with `dialogue` all that was said, as
        in Anthropic's HH data.

        Raises:
            InputError: if the chat template refuses the messages.
        """
        if self.templated:
            try:
                return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            except FAILURES as error:
                raise InputError(f"the chat template of {self.name} refuses these messages: {error}") from None
        said = [message for message in messages if message["role"] != "system"]
        if not dialogue:
            return said[-1]["content"]
        names = {"user": "Human", "assistant": "Assistant"}
        system = "".join(message["content"] for message in messages if message["role"] == "system")
        turns = "".join(f"\n\n{names[message['role']]}: {message['content'].strip()}" for message in said)
        return f"{system}{turns}{ASSISTANT}"

    def ids(self, text: str, max_new_tokens: int) -> np.ndarray:
        """A prompt's ids, as in training.

        Raises:
            InputError: if the prompt and its answer may not fit into the model's context.
        """
        encode = PairTokenizer(self.tokenizer, max(self.context, 4 * len(text) + 16))
        [found] = encode([Preference(text, "a", None, templated=self.templated)])
        if isinstance(found, RowFault):
            raise InputError(f"the prompt cannot be read: {found}")
        if not found.prompt:
            raise InputError("the prompt is empty; write something")
        if len(found.prompt) + max_new_tokens > self.context:
            raise InputError(
                f"The prompt has {len(found.prompt):,} tokens, and with an answer of up to {max_new_tokens:,} it is "
                f"longer than the model's context of {self.context:,}. Shorten it, clear the history or ask for a "
                "shorter answer."
            )
        return np.array(found.prompt)

    def stream(self, prompt: np.ndarray, sampling: Sampling, every: float | None = None) -> Iterator[np.ndarray]:
        """An answer as it grows: its ids so far, with EOS at the end unless it is cut off.

        It stops where the iterator is closed.

        Args:
            prompt: as `ids` gives it.
            sampling: how it is drawn.
            every: seconds after which the same is said again where nothing has come, so that who waits for another
                visitor's answer can leave.
        """
        tokens: SimpleQueue[int | BaseException | None] = SimpleQueue()
        closed = Event()

        def work() -> None:
            try:
                with self.lock:
                    if not closed.is_set():
                        self._generate(prompt, sampling, Arriving(tokens), Closed(closed))
            except BaseException as error:
                tokens.put(error)
            finally:
                tokens.put(None)

        worker = Thread(target=work, daemon=True)
        worker.start()
        ids: list[int] = []
        try:
            while True:
                try:
                    token = tokens.get(timeout=every)
                except Empty:
                    yield until_eos(np.array(ids, dtype=np.int64), self.tokenizer.eos_token_id)
                    continue
                if token is None:
                    break
                if isinstance(token, BaseException):
                    raise token
                ids.append(token)
                yield until_eos(np.array(ids), self.tokenizer.eos_token_id)
        finally:
            closed.set()
            worker.join()

    @torch.no_grad()
    def _generate(self, prompt: np.ndarray, sampling: Sampling, streamer: BaseStreamer, closed: "Closed") -> None:
        model = self.policy.model
        eos = self.tokenizer.eos_token_id
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0 if eos is None else eos,
        )
        tokens = torch.as_tensor(prompt, dtype=torch.long, device=model.device)[None]
        processors: list[LogitsProcessor] = []
        if sampling.temperature > 0:
            numbers = np.random.default_rng(sampling.seed).random((1, sampling.max_new_tokens))
            processors = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
            processors += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
            processors += [Sampler(numbers, len(prompt))]
        with generating(model, config):
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([closed]),
                streamer=streamer,
            )

    def decode(self, ids: np.ndarray) -> str:
        """An answer's text, without special tokens and without a character that has only begun."""
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")

    def cut(self, ids: np.ndarray, sampling: Sampling) -> str:
        """How an answer ended that did not come to its own end, with EOS; nothing where it did."""
        if len(ids) and ids[-1] == self.tokenizer.eos_token_id:
            return ""
        return f"{'cut' if len(ids) >= sampling.max_new_tokens else 'stopped'} at {len(ids):,} tokens"

    @torch.no_grad()
    def token_logps(self, prompt: np.ndarray, answers: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of the tokens of two answers to a prompt, `[L]` each, in nats."""
        with self.lock:
            found = self.policy.logps(self.policy.lay_out([TokenPair(prompt, *answers)]))
        return [found.token_logps[found.answer == answer].cpu().numpy() for answer in (0, 1)]


class Arriving(BaseStreamer):
    """Puts each token that is generated into a queue; the prompt comes first and is left out."""

    def __init__(self, tokens: SimpleQueue) -> None:
        self.tokens = tokens
        self.begun = False

    def put(self, value: Tensor) -> None:
        if self.begun:
            self.tokens.put(int(value.flatten()[0]))
        self.begun = True

    def end(self) -> None:
        """Nothing: who waits is told when the model is free again."""


class Closed(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self, closed: Event) -> None:
        self.closed = closed

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.closed.is_set(), device=input_ids.device)


def check_same_tokens(policy: Voice, reference: Voice) -> None:
    """Raises InputError unless both models know the same tokens: else neither can score the other's answers."""
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise InputError(
            f"{policy.name} and {reference.name} have different tokenizers, so that neither can score the other's "
            "answers; compare models of one family"
        )


def config_file(name: str) -> Path | None:
    """The config.yaml of an exported model, in its folder or its repository; None where there is none."""
    try:
        if is_hub_id(name):
            check_reachable(name)
            return config_of(name)
        folder = path_of(located(name))
        return folder / CONFIG if (folder / CONFIG).is_file() else None
    except (InputError, OSError):
        return None


def option(name: str, *keys: str) -> Any:
    """An option that an exported model was trained with; None where neither its folder nor its repository says."""
    path = config_file(name)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


@lru_cache
def config_of(repository: str) -> Path | None:
    """The config.yaml of a model on the hub, asked for once."""
    try:
        return Path(hf_hub_download(repository, CONFIG, local_files_only=not answers(repository)))
    except (OSError, HTTPError, HFValidationError):
        return None


def reference_of(name: str) -> str:
    """What a model's training started from, by its config.yaml; the model itself where that is not known."""
    found = option(name, "model", "checkpoint")
    return found if isinstance(found, str) and found.strip() else name


def beta_of(name: str) -> float:
    """The beta that a model was trained with, by its config.yaml."""
    beta = option(name, "model", "loss", "init_args", "beta")
    return float(beta) if isinstance(beta, int | float) and beta > 0 else BETA
