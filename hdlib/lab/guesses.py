"""What a language model guesses where a word is left out, or next."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import forward, num_positions
from ..widths import family

GAP = "___"


@torch.no_grad()
def guesses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: str, count: int = 5
) -> list[pd.DataFrame]:
    """The most probable words of a sentence's gaps, or, from a causal model, its next word.

    Args:
        model: with its language-model head.
        tokenizer: of the model.
        sentence: with a gap, `___` or the tokenizer's mask, for each word to guess; causal models go on from its end.
        count: guesses for each gap.

    Returns:
        For each gap a table with the columns `guess` and `probability`, the most probable first.

    Raises:
        ValueError: no gap; more text than the model has positions.
    """
    causal = family(model).causal
    if not sentence.strip():
        raise ValueError("write a sentence")
    text = sentence if causal else sentence.replace(GAP, tokenizer.mask_token)
    input_ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)  # (1, S)
    if input_ids.shape[1] > num_positions(model):
        raise ValueError(f"the sentence has {input_ids.shape[1]} tokens, the model {num_positions(model)} positions")
    gaps = torch.zeros_like(input_ids, dtype=torch.bool) if causal else input_ids == tokenizer.mask_token_id
    gaps[:, -1] |= causal
    if not gaps.any():
        raise ValueError(f"write {GAP} in place of each word that is to be guessed")
    probabilities = forward(model.eval(), input_ids, gaps).logits.float().softmax(-1)  # (gaps, V)
    return [_table(tokenizer, *each.topk(count)) for each in probabilities]


def _table(tokenizer: PreTrainedTokenizerBase, probabilities: Tensor, words: Tensor) -> pd.DataFrame:
    guessed = [tokenizer.decode([word]).strip() for word in words.tolist()]
    return pd.DataFrame({"guess": guessed, "probability": probabilities.tolist()})
