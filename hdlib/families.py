"""One table per family: which neurons the entries of each axis of each parameter belong to.

A row maps a parameter name pattern to the axes of that parameter; the first matching row is used. A tuple stands for
an axis that joins several blocks of equal length, as in a fused query-key-value matrix. Shapes, scales and ties come
from the stock class. A new family is one table and one entry in FAMILIES. H heads, D hidden, F feed-forward width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# What an axis counts. HIDDEN and SHARED_HEADS are one set for the whole model, the others one set per layer.
HIDDEN = "hidden"  # D, the residual stream
FFN = "ffn"  # F, the inner neurons of a feed-forward block
QUERY = "query"  # H * head_dim; a change of the attention scale 1/sqrt(head_dim) is folded into the queries
KEY = "key"  # H * head_dim; query dimension i is multiplied by key dimension i only, so both form one group
VALUE = "value_output"  # H * head_dim; value dimension j is multiplied by column j of the output matrix only
HEADS = "head_groups"  # where head_dim is fixed: one key/value head with the query heads that share it
SHARED_HEADS = "heads"  # H, for a parameter that has one entry per head for all layers
EMBEDDING = "embedding"  # the embedding width: HIDDEN if the config makes the two equal, else FIXED
FIXED = None  # vocabulary, positions, token types, classes, single head dimensions: never narrowed


@dataclass(frozen=True, eq=False)
class Family:
    """The axis table of one architecture, and how it differs from a BERT."""

    axes: Mapping[str, tuple]  # parameter name pattern to what each axis counts; the first match is used
    causal: bool = False  # trained on next-token prediction, not on masked tokens
    base: str | None = None  # the module below the head, if it is not the one at base_model_prefix
    ffn: str = "intermediate_size"  # config name of F
    linked: bool = True  # the stock class computes head_dim = hidden / heads
    pre_norm: bool = False  # a layer adds to what it has read, and norms only what its blocks read
    divisible: bool = False  # not linked, but the stock config requires hidden to be a multiple of heads
    positions_after_padding: bool = False  # position numbers start after the padding token's id
    embedding: str | None = None  # config name of an embedding width that may differ from hidden
    follows: tuple[str, ...] = ()  # other config entries that repeat the hidden width
    fixed: Mapping[str, str] = field(default_factory=dict)  # widths that cannot change (head_dim: whole heads go)

    def __post_init__(self):
        object.__setattr__(self, "axes", TASKS | self.axes)


def linear(name: str, out, into) -> dict[str, tuple]:
    """nn.Linear: weight (out, in), bias (out)."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def conv1d(name: str, into, out) -> dict[str, tuple]:
    """GPT-2's Conv1D, a linear layer with a transposed weight: (in, out), bias (out)."""
    return {f"{name}.weight": (into, out), f"{name}.bias": (out,)}


def norm(name: str, width=HIDDEN) -> dict[str, tuple]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def embedding(name: str, width=HIDDEN) -> dict[str, tuple]:
    return {f"{name}.weight": (FIXED, width)}


def attention(query: str, key: str, value: str, output: str) -> dict[str, tuple]:
    inputs = linear(query, QUERY, HIDDEN) | linear(key, KEY, HIDDEN) | linear(value, VALUE, HIDDEN)
    return inputs | linear(output, HIDDEN, VALUE)


def feed_forward(into: str, out: str) -> dict[str, tuple]:
    return linear(into, FFN, HIDDEN) | linear(out, HIDDEN, FFN)


# The heads of the stock task classes, in every table; a row of the same name in a table replaces one of these.
TASKS = (
    linear("classifier", FIXED, HIDDEN)
    | linear("score", FIXED, HIDDEN)
    | linear("qa_outputs", FIXED, HIDDEN)
    | linear("classifier.dense", HIDDEN, HIDDEN)
    | linear("classifier.out_proj", FIXED, HIDDEN)
    | linear("*pooler.dense", HIDDEN, HIDDEN)
)

WHOLE_HEADS = {"head_dim": "all dimensions of a head are rotated or normed together: remove whole heads"}

# EMBEDDING is the hidden width here, except in ELECTRA.
_BERT_BODY = (
    embedding("*embeddings.*_embeddings", EMBEDDING)
    | attention("*.self.query", "*.self.key", "*.self.value", "*.attention.output.dense")
    | feed_forward("*.intermediate.dense", "*.output.dense")
    | norm("*LayerNorm")
)

BERT = Family(
    axes=_BERT_BODY
    # The transform's output is read by the decoder, which is tied to the embedding.
    | linear("cls.predictions.transform.dense", HIDDEN, HIDDEN)
    | embedding("cls.predictions.decoder")
    | {"cls.predictions*bias": (FIXED,)}
    | linear("cls.seq_relationship", FIXED, HIDDEN),
)

_ROBERTA_HEAD = (
    linear("lm_head.dense", HIDDEN, HIDDEN)
    | norm("lm_head.layer_norm")
    | linear("lm_head.decoder", FIXED, HIDDEN)
    | {"lm_head.bias": (FIXED,)}
)

ROBERTA = Family(positions_after_padding=True, axes=_BERT_BODY | _ROBERTA_HEAD)

DISTILBERT = Family(
    ffn="hidden_dim",
    axes=embedding("*embeddings.*_embeddings")
    | attention("*.attention.q_lin", "*.attention.k_lin", "*.attention.v_lin", "*.attention.out_lin")
    | feed_forward("*.ffn.lin1", "*.ffn.lin2")
    | norm("*[Nn]orm")
    | linear("vocab_transform", HIDDEN, HIDDEN)
    | linear("vocab_projector", FIXED, HIDDEN)
    | linear("pre_classifier", HIDDEN, HIDDEN),
)

ELECTRA = Family(
    embedding="embedding_size",
    axes=norm("*embeddings.LayerNorm", EMBEDDING)
    | norm("generator_predictions.LayerNorm", EMBEDDING)
    | linear("*embeddings_project", HIDDEN, EMBEDDING)
    | _BERT_BODY
    | linear("generator_predictions.dense", EMBEDDING, HIDDEN)
    | linear("generator_lm_head", FIXED, EMBEDDING)
    | linear("discriminator_predictions.dense", HIDDEN, HIDDEN)
    | linear("discriminator_predictions.dense_prediction", FIXED, HIDDEN),
)

# All layers of a group share their weights, hence their neurons. The embedding width is fixed.
ALBERT = Family(
    fixed={"layers": "they share their weights, so that fewer have as many"},
    axes=embedding("*embeddings.*_embeddings", FIXED)
    | norm("*embeddings.LayerNorm", FIXED)
    | linear("*embedding_hidden_mapping_in", HIDDEN, FIXED)
    | attention("*.attention.query", "*.attention.key", "*.attention.value", "*.attention.dense")
    | feed_forward("*.ffn", "*.ffn_output")
    | linear("predictions.dense", FIXED, HIDDEN)
    | norm("predictions.LayerNorm", FIXED)
    | norm("*[Nn]orm")
    | linear("predictions.decoder", FIXED, FIXED)
    | {"predictions.bias": (FIXED,)}
    | linear("*pooler", HIDDEN, HIDDEN)
    | linear("sop_classifier.classifier", FIXED, HIDDEN),
)

# All layers share one relative position bias, which has one entry per head.
MPNET = Family(
    positions_after_padding=True,
    axes={"*relative_attention_bias.weight": (FIXED, SHARED_HEADS)}
    | embedding("*embeddings.*_embeddings")
    | attention("*.attn.q", "*.attn.k", "*.attn.v", "*.attn.o")
    | feed_forward("*.intermediate.dense", "*.output.dense")
    | norm("*LayerNorm")
    | _ROBERTA_HEAD,
)

# Relative positions have queries and keys too; they use the scale of the content queries.
DEBERTA = Family(
    embedding="embedding_size",
    follows=("pooler_hidden_size",),
    axes=embedding("*embeddings.*_embeddings", EMBEDDING)
    | linear("*embed_proj", HIDDEN, EMBEDDING)
    | embedding("*rel_embeddings")
    | attention("*.self.*query_proj", "*.self.*key_proj", "*.self.value_proj", "*.attention.output.dense")
    | feed_forward("*.intermediate.dense", "*.output.dense")
    | {"*encoder.conv.conv.weight": (HIDDEN, HIDDEN, FIXED), "*encoder.conv.conv.bias": (HIDDEN,)}
    | norm("cls.predictions.transform.LayerNorm", EMBEDDING)
    | norm("*LayerNorm")
    | linear("cls.predictions.transform.dense", EMBEDDING, HIDDEN)
    | embedding("cls.predictions.decoder", EMBEDDING)
    | {"cls.predictions*bias": (FIXED,)}
    | linear("lm_predictions.lm_head.dense", HIDDEN, HIDDEN)
    | {"lm_predictions.lm_head.bias": (FIXED,)},
)

MODERNBERT = Family(
    pre_norm=True,
    fixed=WHOLE_HEADS,
    axes=embedding("*embeddings.tok_embeddings")
    | linear("*.attn.Wqkv", (HEADS, HEADS, HEADS), HIDDEN)
    | linear("*.attn.Wo", HIDDEN, HEADS)
    | linear("*.mlp.Wi", (FFN, FFN), HIDDEN)
    | linear("*.mlp.Wo", HIDDEN, FFN)
    | norm("*norm")
    | linear("head.dense", HIDDEN, HIDDEN)
    | linear("decoder", FIXED, HIDDEN),
)

GPT2 = Family(
    pre_norm=True,
    causal=True,
    ffn="n_inner",
    axes=embedding("*w[tp]e")
    | conv1d("*.attn.c_attn", HIDDEN, (QUERY, KEY, VALUE))
    | conv1d("*.attn.c_proj", VALUE, HIDDEN)
    | conv1d("*.mlp.c_fc", HIDDEN, FFN)
    | conv1d("*.mlp.c_proj", FFN, HIDDEN)
    | norm("*ln_?")
    | embedding("lm_head"),
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
    | attention("*.self_attn.q_proj", "*.self_attn.k_proj", "*.self_attn.v_proj", "*.self_attn.out_proj")
    | feed_forward("*.fc1", "*.fc2")
    | norm("*layer_norm")
    | embedding("lm_head", EMBEDDING)
    | embedding("score", EMBEDDING),
)

# The fused matrix stores query, key and value of a head in adjacent rows, so a head is one block of rows.
GPT_NEOX = Family(
    causal=True,
    pre_norm=True,
    fixed=WHOLE_HEADS,
    axes=embedding("*embed_in")
    | linear("*.attention.query_key_value", HEADS, HIDDEN)
    | linear("*.attention.dense", HIDDEN, HEADS)
    | feed_forward("*.mlp.dense_h_to_4h", "*.mlp.dense_4h_to_h")
    | norm("*norm")
    | embedding("lm_head"),
)

LLAMA = Family(
    causal=True,
    pre_norm=True,
    fixed=WHOLE_HEADS,
    linked=False,
    divisible=True,
    axes=embedding("*embed_tokens")
    | linear("*.self_attn.[qkv]_proj", HEADS, HIDDEN)
    | linear("*.self_attn.o_proj", HIDDEN, HEADS)
    | linear("*.mlp.gate_proj", FFN, HIDDEN)
    | feed_forward("*.mlp.up_proj", "*.mlp.down_proj")
    | norm("*.self_attn.[qk]_norm", FIXED)  # over the dimensions of one head, the same weights for all heads
    | norm("*norm")
    | embedding("lm_head"),
)

MISTRAL = replace(LLAMA, divisible=False)  # also Qwen

GEMMA = replace(
    LLAMA,
    fixed=WHOLE_HEADS
    | {HIDDEN: "its tied embeddings are multiplied by sqrt(hidden_size)"}
    | {"layers": "a norm after each block would undo that a layer is faded out"},
)

# The keys are the `model_type` of the stock configs.
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
