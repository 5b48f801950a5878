"""The families: for each architecture one short table of what every axis of every parameter counts.

A row is a parameter name pattern and the axes of that parameter; the first row that matches holds. An
axis made of several blocks side by side, as in a fused query-key-value matrix, is a tuple of what each
block counts. Everything else about an architecture (shapes, scales, ties) is asked of its stock class.

A new family is one table here and its line in FAMILIES. Shapes: V vocabulary, H heads, D hidden width, F
feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# What an axis can count. Hidden is one set for the whole model, the others are one set for each layer.
HIDDEN = "hidden"  # D, the residual stream: written and read by all layers
FFN = "ffn"  # F, the inner neurons of one feed-forward block
QUERY = "query"  # H * head_dim: query dimension i only ever meets key dimension i, so the two are one group;
KEY = "key"  # the queries absorb a change of the attention scale 1/sqrt(head_dim)
VALUE = "value_output"  # H * head_dim: value dimension j only ever meets column j of the output matrix
HEADS = "head_groups"  # where head dimensions must stay: a key/value head with the query heads it serves
SHARED_HEADS = "heads"  # H, heads that are counted once for all layers: they go from all layers or from none
EMBEDDING = "embedding"  # the embedding width: hidden where the config says they are equal, fixed where it differs
FIXED = None  # vocabulary, positions, token types, classes, single head dimensions: never narrowed


@dataclass(frozen=True)
class Family:
    """One architecture: what each axis of each parameter counts, and the few ways in which families differ."""

    axes: Mapping[str, tuple]  # parameter name pattern -> what its axes count; the first match holds
    causal: bool = False  # predicts the next token, not masked ones
    base: str | None = None  # the module before the head, if it is not what the stock class calls its base model
    ffn: str = "intermediate_size"  # what the config calls F
    whole_heads: bool = False  # head dimensions stay (they are rotated, or normed, together), whole heads go
    linked: bool = True  # the stock class computes head_dim = hidden / heads
    divisible: bool = False  # not linked, but the stock config still wants hidden to be a multiple of heads
    positions_after_padding: bool = False  # position numbers begin after that of the padding token
    embedding: str | None = None  # what the config calls an embedding width that may differ from hidden
    follows: tuple[str, ...] = ()  # other config entries that repeat the hidden width
    fixed: Mapping[str, str] = field(default_factory=dict)  # widths that cannot change, and why


def linear(name: str, out, into) -> dict[str, tuple]:
    """nn.Linear: weight (out, in), bias (out)."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def conv1d(name: str, into, out) -> dict[str, tuple]:
    """GPT-2's Conv1D, a linear layer with its weight transposed: (in, out), bias (out)."""
    return {f"{name}.weight": (into, out), f"{name}.bias": (out,)}


def norm(name: str, width=HIDDEN) -> dict[str, tuple]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def embedding(name: str, width=HIDDEN) -> dict[str, tuple]:
    return {f"{name}.weight": (FIXED, width)}


# Heads for tasks: of stock class names, the same over all families.
TASKS = (
    linear("classifier", FIXED, HIDDEN)
    | linear("score", FIXED, HIDDEN)
    | linear("qa_outputs", FIXED, HIDDEN)
    | linear("classifier.dense", HIDDEN, HIDDEN)
    | linear("classifier.out_proj", FIXED, HIDDEN)
    | linear("*pooler.dense", HIDDEN, HIDDEN)
)

# --- masked language models

_BERT_LAYER = (
    linear("*.self.query", QUERY, HIDDEN)
    | linear("*.self.key", KEY, HIDDEN)
    | linear("*.self.value", VALUE, HIDDEN)
    | linear("*.attention.output.dense", HIDDEN, VALUE)
    | linear("*.intermediate.dense", FFN, HIDDEN)
    | linear("*.output.dense", HIDDEN, FFN)
)

BERT = Family(
    axes=embedding("*embeddings.*_embeddings")
    | _BERT_LAYER
    | norm("*LayerNorm")
    # The transform feeds the decoder, which is tied to the embedding: its output is the same set.
    | linear("cls.predictions.transform.dense", HIDDEN, HIDDEN)
    | embedding("cls.predictions.decoder")
    | {"cls.predictions*bias": (FIXED,)}
    | linear("cls.seq_relationship", FIXED, HIDDEN)
    | TASKS,
)

ROBERTA = Family(
    positions_after_padding=True,
    axes=embedding("*embeddings.*_embeddings")
    | _BERT_LAYER
    | norm("*LayerNorm")
    | linear("lm_head.dense", HIDDEN, HIDDEN)
    | norm("lm_head.layer_norm")
    | linear("lm_head.decoder", FIXED, HIDDEN)
    | {"lm_head.bias": (FIXED,)}
    | TASKS,
)

DISTILBERT = Family(
    ffn="hidden_dim",
    axes=embedding("*embeddings.*_embeddings")
    | linear("*.attention.q_lin", QUERY, HIDDEN)
    | linear("*.attention.k_lin", KEY, HIDDEN)
    | linear("*.attention.v_lin", VALUE, HIDDEN)
    | linear("*.attention.out_lin", HIDDEN, VALUE)
    | linear("*.ffn.lin1", FFN, HIDDEN)
    | linear("*.ffn.lin2", HIDDEN, FFN)
    | norm("*LayerNorm")
    | norm("*layer_norm")
    | linear("vocab_transform", HIDDEN, HIDDEN)
    | linear("vocab_projector", FIXED, HIDDEN)
    | linear("pre_classifier", HIDDEN, HIDDEN)
    | TASKS,
)

ELECTRA = Family(
    embedding="embedding_size",
    axes=embedding("*embeddings.*_embeddings", EMBEDDING)
    | norm("*embeddings.LayerNorm", EMBEDDING)
    | linear("*embeddings_project", HIDDEN, EMBEDDING)
    | _BERT_LAYER
    | norm("generator_predictions.LayerNorm", EMBEDDING)
    | norm("*LayerNorm")
    | linear("generator_predictions.dense", EMBEDDING, HIDDEN)
    | linear("generator_lm_head", FIXED, EMBEDDING)
    | linear("discriminator_predictions.dense", HIDDEN, HIDDEN)
    | linear("discriminator_predictions.dense_prediction", FIXED, HIDDEN)
    | TASKS,
)

# The layers of a group share their weights, so their neurons are one set, too. The embedding width stays.
ALBERT = Family(
    axes=embedding("*embeddings.*_embeddings", FIXED)
    | norm("*embeddings.LayerNorm", FIXED)
    | linear("*embedding_hidden_mapping_in", HIDDEN, FIXED)
    | linear("*.attention.query", QUERY, HIDDEN)
    | linear("*.attention.key", KEY, HIDDEN)
    | linear("*.attention.value", VALUE, HIDDEN)
    | linear("*.attention.dense", HIDDEN, VALUE)
    | linear("*.ffn", FFN, HIDDEN)
    | linear("*.ffn_output", HIDDEN, FFN)
    | norm("*layer_norm")
    | norm("*attention.LayerNorm")
    | linear("predictions.dense", FIXED, HIDDEN)
    | norm("predictions.LayerNorm", FIXED)
    | linear("predictions.decoder", FIXED, FIXED)
    | {"predictions.bias": (FIXED,)}
    | linear("*pooler", HIDDEN, HIDDEN)
    | linear("sop_classifier.classifier", FIXED, HIDDEN)
    | TASKS,
)

# The relative position bias has one entry for each head and is shared by the layers.
MPNET = Family(
    positions_after_padding=True,
    axes={"*relative_attention_bias.weight": (FIXED, SHARED_HEADS)}
    | embedding("*embeddings.*_embeddings")
    | linear("*.attn.q", QUERY, HIDDEN)
    | linear("*.attn.k", KEY, HIDDEN)
    | linear("*.attn.v", VALUE, HIDDEN)
    | linear("*.attn.o", HIDDEN, VALUE)
    | linear("*.intermediate.dense", FFN, HIDDEN)
    | linear("*.output.dense", HIDDEN, FFN)
    | norm("*LayerNorm")
    | linear("lm_head.dense", HIDDEN, HIDDEN)
    | norm("lm_head.layer_norm")
    | linear("lm_head.decoder", FIXED, HIDDEN)
    | {"lm_head.bias": (FIXED,)}
    | TASKS,
)

# Positions are attended to as well: their queries and keys, shared with the words' or not, are scaled alike.
DEBERTA = Family(
    embedding="embedding_size",
    follows=("pooler_hidden_size",),
    axes=embedding("*embeddings.*_embeddings", EMBEDDING)
    | linear("*embed_proj", HIDDEN, EMBEDDING)
    | embedding("*rel_embeddings")
    | linear("*.self.query_proj", QUERY, HIDDEN)
    | linear("*.self.pos_query_proj", QUERY, HIDDEN)
    | linear("*.self.key_proj", KEY, HIDDEN)
    | linear("*.self.pos_key_proj", KEY, HIDDEN)
    | linear("*.self.value_proj", VALUE, HIDDEN)
    | linear("*.attention.output.dense", HIDDEN, VALUE)
    | linear("*.intermediate.dense", FFN, HIDDEN)
    | linear("*.output.dense", HIDDEN, FFN)
    | {"*encoder.conv.conv.weight": (HIDDEN, HIDDEN, FIXED), "*encoder.conv.conv.bias": (HIDDEN,)}
    | norm("cls.predictions.transform.LayerNorm", EMBEDDING)
    | norm("*LayerNorm")
    | linear("cls.predictions.transform.dense", EMBEDDING, HIDDEN)
    | embedding("cls.predictions.decoder", EMBEDDING)
    | {"cls.predictions*bias": (FIXED,)}
    | linear("lm_predictions.lm_head.dense", HIDDEN, HIDDEN)
    | {"lm_predictions.lm_head.bias": (FIXED,)}
    | TASKS,
)

MODERNBERT = Family(
    whole_heads=True,
    axes=embedding("*embeddings.tok_embeddings")
    | linear("*.attn.Wqkv", (HEADS, HEADS, HEADS), HIDDEN)
    | linear("*.attn.Wo", HIDDEN, HEADS)
    | linear("*.mlp.Wi", (FFN, FFN), HIDDEN)
    | linear("*.mlp.Wo", HIDDEN, FFN)
    | norm("*norm")
    | linear("head.dense", HIDDEN, HIDDEN)
    | linear("decoder", FIXED, HIDDEN)
    | TASKS,
)

# --- causal language models

GPT2 = Family(
    causal=True,
    ffn="n_inner",
    axes=embedding("*wte")
    | embedding("*wpe")
    | conv1d("*.attn.c_attn", HIDDEN, (QUERY, KEY, VALUE))
    | conv1d("*.attn.c_proj", VALUE, HIDDEN)
    | conv1d("*.mlp.c_fc", HIDDEN, FFN)
    | conv1d("*.mlp.c_proj", FFN, HIDDEN)
    | norm("*ln_?")
    | embedding("lm_head")
    | TASKS,
)

OPT = Family(
    causal=True,
    base="model.decoder",
    ffn="ffn_dim",
    embedding="word_embed_proj_dim",
    axes=embedding("*embed_tokens", EMBEDDING)
    | embedding("*embed_positions")
    | linear("*project_in", HIDDEN, EMBEDDING)
    | linear("*project_out", EMBEDDING, HIDDEN)
    | linear("*.self_attn.q_proj", QUERY, HIDDEN)
    | linear("*.self_attn.k_proj", KEY, HIDDEN)
    | linear("*.self_attn.v_proj", VALUE, HIDDEN)
    | linear("*.self_attn.out_proj", HIDDEN, VALUE)
    | linear("*.fc1", FFN, HIDDEN)
    | linear("*.fc2", HIDDEN, FFN)
    | norm("*layer_norm")
    | embedding("lm_head", EMBEDDING)
    | embedding("score", EMBEDDING)
    | TASKS,
)

# Query, key and value of a head lie side by side, so a head is one run of rows of the fused matrix.
GPT_NEOX = Family(
    causal=True,
    whole_heads=True,
    axes=embedding("*embed_in")
    | linear("*.attention.query_key_value", HEADS, HIDDEN)
    | linear("*.attention.dense", HIDDEN, HEADS)
    | linear("*.mlp.dense_h_to_4h", FFN, HIDDEN)
    | linear("*.mlp.dense_4h_to_h", HIDDEN, FFN)
    | norm("*norm")
    | embedding("lm_head")
    | TASKS,
)

_LLAMA_AXES = (
    embedding("*embed_tokens")
    | linear("*.self_attn.[qkv]_proj", HEADS, HIDDEN)
    | linear("*.self_attn.o_proj", HIDDEN, HEADS)
    | linear("*.mlp.gate_proj", FFN, HIDDEN)
    | linear("*.mlp.up_proj", FFN, HIDDEN)
    | linear("*.mlp.down_proj", HIDDEN, FFN)
    | norm("*.self_attn.[qk]_norm", FIXED)  # over the dimensions of a head, the same for all heads
    | norm("*norm")
    | embedding("lm_head")
    | TASKS
)

LLAMA = Family(causal=True, whole_heads=True, linked=False, divisible=True, axes=_LLAMA_AXES)

MISTRAL = replace(LLAMA, divisible=False)  # and Qwen

GEMMA = replace(
    LLAMA,
    fixed={
        HIDDEN: "a stock Gemma multiplies its embeddings by sqrt(hidden_size), and they are tied to its output: "
        "no weights of a narrower one give the same states"
    },
)

# By the `model_type` of the config.
FAMILIES = {
    "albert": ALBERT,
    "bert": BERT,
    "camembert": ROBERTA,
    "deberta-v2": DEBERTA,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "modernbert": MODERNBERT,
    "mpnet": MPNET,
    "opt": OPT,
    "qwen2": MISTRAL,
    "qwen3": MISTRAL,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}
