"""What to change in a source or its options, from what was found in it."""

from collections.abc import Iterator

import numpy as np

from dpo_lightning.data.inspection import Inspection

#: Part of an unsound check -> what to do about it.
CURES = {
    "no EOS": "Set eos_token in tokenizer_config.json.",
    "but the rows are plain text": (
        "If the model is a chat model, give conversations, or make them of the texts, as data.format triples_as_chat "
        "does of triples (docs/data.md lists the others)."
    ),
    "EOS stands before": "What follows it is never sampled: take it out of the texts.",
    "BOS stands twice in a row": "Take one out of the texts, or out of the template.",
    "puts BOS before a text, but": "If the model was trained with BOS, write it in the template.",
    "written in their text": "The model reads it as that token, not as its letters: take it out of the texts.",
    "would merge prompt and answer": "Move the blank at the prompts' end to the answers' start.",
    "do not spell": "The tokenizer changes or does not know some characters; the ledger lists the rows and where.",
}

#: Share of pairs from which on cuts are spoken of, and the accuracy of a rule by length alone.
FEW_CUTS, BIASED = 0.02, 0.55


def advise(found: Inspection) -> Iterator[str]:
    """What to change, the most urgent first."""
    used = found.train + found.val
    for source in found.sources:
        if source.bad > found.bad_rows * source.pairs:
            yield (
                f"{source.name}: {source.bad:,} of {source.pairs:,} rows cannot be used, more than data.bad_rows "
                f"{found.bad_rows:g}: `fit` will refuse it. Mend the rows listed above, or raise data.bad_rows."
            )
        if found.truncation is None and source.used and source.shortest > found.max_length:
            yield (
                f"{source.name}: data.max_length {found.max_length} is shorter than every prompt: `fit` will refuse "
                "it. Raise it, or set data.truncation to cut them all."
            )
    for start, cure in CURES.items():
        yield from (f"{check.text}. {cure}" for check in found.checks if not check.sound and start in check.text)
    if found.both_sides:
        yield (
            f"{len(found.both_sides):,} pairs to train on have a prompt that also validates: the validation flatters. "
            "Take those rows out, or use data.val_fraction, which splits by prompt."
        )
    [here] = [cut for cut in found.cuts if cut.max_length == found.max_length]
    if here.pairs > FEW_CUTS:
        most = int(np.quantile(found.lengths.longest, 0.99))
        does, would = ("drops", "drop") if found.truncation == "drop" else ("cuts", "cut")
        other = "" if found.truncation == "drop" else ", or set data.truncation drop to train on whole pairs only"
        yield (
            f"data.max_length {found.max_length} {does} {here.pairs:.1%} of the pairs; {most:,} would {would} 1%. "
            f"Raise it if model and memory allow{other}."
        )
    if contradictions := found.repetitions["contradictions"]:
        rows = sum(map(len, contradictions))
        yield (
            f"{rows:,} pairs contradict another one: the same two answers, preferred the other way round "
            f"({' and '.join(contradictions[0][:2])} for instance). Take one side out, or set the loss's "
            "label_smoothing."
        )
    if pairs := found.repetitions["pairs"]:
        yield (
            f"{sum(len(group) - 1 for group in pairs):,} pairs come again word for word "
            f"({' and '.join(pairs[0][:2])} for instance): they weigh more than others. Take the copies out."
        )
    if found.bias is not None and found.bias.accuracy - found.bias.error > BIASED:
        yield (
            f"Always preferring the longer answer is right in {found.bias.accuracy:.1%} of the pairs: a policy can "
            "learn that instead of what was meant. Watch val/rewards/accuracies/longer and .../shorter; the loss's "
            "ld_alpha (LD-DPO) or SimPO weigh length less."
        )
    if found.bias is not None and found.bias.accuracy + found.bias.error < 1 - BIASED:
        yield (
            f"Always preferring the shorter answer is right in {1 - found.bias.accuracy:.1%} of the pairs: a policy "
            "can learn that instead of what was meant. Watch val/rewards/accuracies/longer and .../shorter."
        )
    for odd, rows in found.oddities:
        if odd.texts > 0.01 * found.looked_at or odd.what.startswith(("NUL", "replacement", "UTF-8", "byte order")):
            yield f"{odd.texts:,} of {found.looked_at:,} pairs have {odd.what} ({rows[0]} for one). Look at them."
    if found.val < 100 and used > found.val:
        yield (
            f"Only {found.val} pairs validate: an accuracy of them has a standard error of {0.5 / found.val**0.5:.2f}. "
            "Raise data.val_fraction, or give data.val_source."
        )
