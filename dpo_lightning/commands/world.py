"""`world`: what the built-in world ships is made here, once: a blank model with its tokenizer, and the base's pairs.

Between the two lies `fit --config configs/world-sft.yaml`, which makes the base of the blank. `make world` runs all.
"""

import gzip
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpo_lightning.data import world
from dpo_lightning.data.oracle import best_accuracy, figures, prefers, true_reward
from dpo_lightning.models.checkpoint import load_policy, load_tokenizer
from dpo_lightning.models.generation import generate

END = "<|endoftext|>"

#: Pairs for each prompt of a split; the test split is there for its prompts.
PAIRS_A_PROMPT = {"train": 20, "validation": 8, "test": 1}

#: Prompts answered in one batch.
AT_ONCE = 8

#: Tokens of the longest answer: the corpus has none as long.
LONGEST = 64


def blank(output_dir: Path, width: int = 128, layers: int = 3, heads: int = 4, seed: int = 0) -> None:
    """Write a GPT-2 with random weights, and its tokenizer.

    Args:
        output_dir: the folder to write.
        width: of the hidden states.
        layers: of the decoder.
        heads: of each attention.
        seed: of the weights.
    """
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=96,
        bos_token_id=end,
        eos_token_id=end,
    )
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    print(f"Written to {output_dir}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the world is one token, and so is every byte, so that any text can be read."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for row in world.corpus() for word, _ in split.pre_tokenize_str(row["prompt"] + row["completion"])}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Of all ways to make up a text from pieces the one with the highest sum is taken: words before letters.
    pieces = [
        (END, 0.0),
        *((letter, -10.0) for letter in letters),
        *((word, -1.0) for word in sorted(words - {*letters})),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=None))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def pairs(checkpoint: str, output: Path, seed: int = 0) -> None:
    """Sample pairs of answers from a model and label them as Bradley and Terry would, by the oracle's rewards.

    Args:
        checkpoint: the model whose answers are paired: the base.
        output: the file to write, .jsonl.gz.
        seed: of the samples and the labels.
    """
    draw = random.Random(seed)
    rows: list[dict[str, str]] = []
    for split, prompt, first, second in sampled_pairs(checkpoint, seed):
        first_wins = draw.random() < prefers(true_reward(prompt, first), true_reward(prompt, second))
        chosen, rejected = (first, second) if first_wins else (second, first)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split})
    output.parent.mkdir(parents=True, exist_ok=True)
    # Without the file's name and the time of writing, so that the bytes are the same.
    with output.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
    print("\n".join([*(described(split, rows) for split in PAIRS_A_PROMPT), f"Written to {output}"]))


def described(split: str, rows: Sequence[Mapping[str, str]]) -> str:
    """How good the answers of a split's pairs are, and how well one can tell the better one."""
    own = [row for row in rows if row["split"] == split]
    if not own:
        return f"{split}: no pairs"
    judged = [figures(row["prompt"], row[name]) for row in own for name in ("chosen", "rejected")]
    parts = [f"{name} {sum(answer[name] for answer in judged) / len(judged):.3f}" for name in judged[0]]
    best = best_accuracy(own)
    return f"{split}: {len(own):,} pairs, best possible accuracy {best:.4f}; of their answers: {', '.join(parts)}"


def sampled_pairs(checkpoint: str, seed: int) -> Iterator[tuple[str, str, str, str]]:
    """`(split, prompt, answer, another answer)`, both drawn from the model, one better than the other.

    Two answers that are equally good are no pair, as people skip a question that has no answer: half of their labels
    would be wrong, and all that a policy could learn of them is noise.
    """
    policy, tokenizer = load_policy(checkpoint, layout="padded"), load_tokenizer(checkpoint)
    asked = list(world.questions().values())
    for split, count in PAIRS_A_PROMPT.items():
        draws = max(3 * count, 12)  # some to spare
        prompts = [(number, question.prompt) for number, question in enumerate(asked) if question.split == split]
        for start in tqdm(range(0, len(prompts), AT_ONCE), desc=f"Sampling {split}"):
            some = prompts[start : start + AT_ONCE]
            jobs = [((seed, number, attempt), prompt) for number, prompt in some for attempt in range(draws)]
            ids = [np.array(tokenizer(prompt).input_ids) for _, prompt in jobs]
            texts = decoded(tokenizer, generate(policy, tokenizer, ids, LONGEST, [key for key, _ in jobs]))
            for place, (_, prompt) in enumerate(some):
                mine = texts[place * draws : (place + 1) * draws]
                unequal = [
                    pair
                    for pair in zip(mine[::2], mine[1::2], strict=True)
                    if true_reward(prompt, pair[0]) != true_reward(prompt, pair[1]) and all(map(str.strip, pair))
                ]
                for first, second in unequal[:count]:
                    yield split, prompt, first, second


def decoded(tokenizer: PreTrainedTokenizerFast, answers: Sequence[np.ndarray]) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def main() -> None:
    """Run the verb of the command line."""
    auto_cli([blank, pairs], args=sys.argv[2:], as_positional=False)
