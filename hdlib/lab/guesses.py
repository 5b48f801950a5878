"""The most probable tokens for the gaps of a sentence, or for its next token."""

from __future__ import annotations

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import forward, num_positions
from ..widths import family

GAP = "___"


@torch.no_grad()
def guesses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: str, count: int = 5
) -> list[pd.DataFrame]:
    """The `count` most probable tokens at each gap of a sentence; for a causal model, after its end.

    `___` or the tokenizer's mask token is a gap. Returns a table for each gap with the columns `guess` and
    `probability`, best first. Raises ValueError for no gap, or for more tokens than the model has positions.
    """
    causal = family(model).causal
    if not sentence.strip():
        raise ValueError("the sentence is empty: write a sentence")
    text = sentence if causal else sentence.replace(GAP, tokenizer.mask_token)
    input_ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)  # (1, S)
    length, positions = input_ids.shape[1], num_positions(model)
    if length > positions:
        raise ValueError(f"the sentence has {length} tokens, the model {positions} positions: write a shorter one")
    gaps = torch.zeros_like(input_ids, dtype=torch.bool) if causal else input_ids == tokenizer.mask_token_id  # (1, S)
    gaps[:, -1] |= causal
    if not gaps.any():
        raise ValueError(f"the sentence has no gap: write {GAP} in place of each token to guess")
    probabilities = forward(model.eval(), input_ids, gaps).logits.float().softmax(-1).topk(count)  # (gaps, count)
    return [
        pd.DataFrame({"guess": [tokenizer.decode([token]).strip() for token in tokens], "probability": values})
        for values, tokens in zip(*(each.tolist() for each in probabilities), strict=True)
    ]
