"""Pre-train a small causal teacher, a Qwen3 of 4 layers, for runs without the hub.

    python -m experiments.make_causal_teacher --corpus WIKIPEDIA --out runs/causal_teacher --steps 1500

The tokenizer, a byte-level BPE of 4,096 entries, is trained on the same corpus, which is any that `load_corpus`
accepts. The model has what a test of narrowing causal models needs: trained weights, rotary positions, key/value heads
shared by several query heads, and norms on queries and keys.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_linear_schedule_with_warmup

import hdlib
from hdlib.data import NextToken, TrainingBatches
from hdlib.text.corpus import load_documents

LENGTH, VOCABULARY, BATCH = 128, 4096, 16
END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.corpus)
    train, validation = hdlib.load_corpus(arguments.corpus, tokenizer, LENGTH)
    model = pre_train(small_qwen(tokenizer), train, arguments.steps)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(hdlib.discrepancy(model, model, validation.take(200)))


def train_tokenizer(corpus: str, documents: int = 2000) -> PreTrainedTokenizerFast:
    text = (row["text"] for row in islice(load_documents(corpus)["train"], documents))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, model_max_length=LENGTH
    )


def small_qwen(tokenizer) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def pre_train(model: Qwen3ForCausalLM, train, steps: int) -> Qwen3ForCausalLM:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    learning_rate = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    batches = TrainingBatches(train, NextToken(), batch_size=BATCH, seed=0)
    for step in (bar := tqdm(range(steps), desc="pre-training")):
        input_ids = batches[step]["input_ids"]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


if __name__ == "__main__":
    main()
