"""Tokens through the decoder per pair, in each layout: what sharing the prompt and packing save.

    python benchmarks/tokens.py --source ../shared/data/rm-static-test.jsonl.gz --tokenizer ../shared/tokenizers/gpt2

It counts rows times their length as the batches are laid out, padding included, in the order of a first epoch, for a
model whose attention is the library's and one that needs a mask. The count does not depend on the machine.
"""

from jsonargparse import auto_cli
from transformers import AutoTokenizer

from dpo_lightning.data.batching import BatchPlan
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.packing import LAYOUTS
from dpo_lightning.data.pairs import TokenizedPairs
from dpo_lightning.models.attention import TreeAttention

#: Layouts, and the tokens that a row may hold.
WAYS = [(layout, row_tokens) for layout in LAYOUTS for row_tokens in (TreeAttention.row_tokens, None)][:-1]


def count_tokens(source: str, tokenizer: str, max_length: int = 1024, batch_size: int = 8, pairs: int = 2048) -> None:
    """Print a table of layouts.

    Args:
        source: whatever `data.source` takes.
        tokenizer: folder or hub id.
        max_length: of prompt + one answer + EOS.
        batch_size: pairs of a batch.
        pairs: how many of the source's pairs to count.
    """
    data = PreferenceDataModule(
        source, max_length=max_length, batch_size=batch_size, max_train_pairs=pairs, bad_rows=1.0
    )
    data.compile(AutoTokenizer.from_pretrained(tokenizer), None)
    print("| layout | tokens a pair | of them padding | padded / layout |\n|---|---|---|---|")
    table: dict[str, tuple[float, float]] = {}
    for layout, row_tokens in WAYS:
        split = TokenizedPairs(data.tables["train"], layout, pairwise=True, row_tokens=row_tokens)
        batches = [split[batch] for batch in BatchPlan(split.costs, batch_size, shuffle=True)]
        counted = sum(batch.tokens.numel() for batch in batches)
        needed = sum(int((batch.tree >= 0).sum()) for batch in batches)
        name = f"{layout}, by a mask" if row_tokens is None and layout != "padded" else layout
        table[name] = counted / len(split), 1 - needed / counted
    for layout, (tokens, padding) in table.items():
        print(f"| {layout} | {tokens:.0f} | {padding:.0%} | {table['padded'][0] / tokens:.2f} |")


if __name__ == "__main__":
    auto_cli(count_tokens, as_positional=False)
