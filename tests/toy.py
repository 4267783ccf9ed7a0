"""A model made from a config and pairs made on the spot: what runs and tests use where nothing may be downloaded.

`python -m tests.toy DIR` writes `DIR/model` (a GPT-2 of 0.1M random parameters with a byte tokenizer) and
`DIR/pairs.jsonl`, whose chosen answers name what a thing is for and whose rejected ones evade the question.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

THINGS = {
    "hammer": "drives nails",
    "saw": "cuts wood",
    "kettle": "boils water",
    "lamp": "gives light",
    "brush": "spreads paint",
    "spade": "digs soil",
    "oven": "bakes bread",
    "clock": "tells the time",
}
QUESTIONS = ("What does a {} do?", "What is a {} for?", "Tell me what a {} does.", "Why own a {}?")
EVASIONS = (" I cannot say.", " Who knows?", " Ask me later, please.", " Things.")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and `<eos>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {character: number + 1 for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def make_model(folder: Path, seed: int = 0) -> None:
    """A random GPT-2 and its tokenizer, in Hugging Face format."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=128, **ids)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_pairs(file: Path, count: int, seed: int = 0) -> None:
    """`count` rows of prompt, chosen, rejected; the prompts differ in a number, so that they are all distinct."""
    draw = random.Random(seed)
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            thing, use = draw.choice(list(THINGS.items()))
            prompt = f"{number}. {draw.choice(QUESTIONS).format(thing)}"
            row = {"prompt": prompt, "chosen": f" A {thing} {use}.", "rejected": draw.choice(EVASIONS)}
            lines.write(json.dumps(row) + "\n")


def make_toy(folder: Path, pairs: int = 512) -> Path:
    """Model and pairs in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model")
    make_pairs(folder / "pairs.jsonl", pairs)
    return folder


if __name__ == "__main__":
    print(f"Model and pairs written to {make_toy(Path(sys.argv[1]))}")
