"""Small stock models with random weights, one builder for every family of the library."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import transformers as T
from hypothesis import strategies as st

from hdlib import Pooling, Widths

VOCABULARY, POSITIONS = 60, 32


@dataclass(frozen=True)
class Kind:
    """How to build one family: stock class, config class, the config's names of the widths."""

    model: type
    config: type
    names: dict[str, str] = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    head_dims: bool = True  # head_dim can change; else whole heads are removed
    linked: bool = True  # hidden = heads * head_dim
    grouped: bool = False  # has key/value heads
    hidden_fixed: bool = False
    divisible: bool = False  # not linked, but hidden is a multiple of heads
    deep: bool = True  # layers can leave

    @property
    def causal(self) -> bool:
        return "MaskedLM" not in self.model.__name__


_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT_LIKE = {"max_position_embeddings": POSITIONS + 2}
_GPT = _IDS | {"max_position_embeddings": POSITIONS}
_ROTARY = _GPT | {"attention_dropout": 0.0}
_LLAMA = {"options": _ROTARY, "head_dims": False, "linked": False, "grouped": True}
_WINDOW = {"sliding_window": 6}
_GEMMA = _LLAMA | {"options": _ROTARY | _WINDOW, "hidden_fixed": True, "divisible": True, "deep": False}
_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["c2p", "p2c"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "max_position_embeddings": POSITIONS,
}
_MODERNBERT = _GPT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8, "global_attn_every_n_layers": 2}
_DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
}

KINDS = {
    "bert": Kind(T.BertForMaskedLM, T.BertConfig, options=_BERT_LIKE),
    "bert untied": Kind(T.BertForMaskedLM, T.BertConfig, options=_BERT_LIKE | {"tie_word_embeddings": False}),
    "roberta": Kind(T.RobertaForMaskedLM, T.RobertaConfig, options=_BERT_LIKE),
    "xlm-roberta": Kind(T.XLMRobertaForMaskedLM, T.XLMRobertaConfig, options=_BERT_LIKE),
    "camembert": Kind(T.CamembertForMaskedLM, T.CamembertConfig, options=_BERT_LIKE),
    "distilbert": Kind(T.DistilBertForMaskedLM, T.DistilBertConfig, _DISTILBERT_NAMES, _BERT_LIKE),
    "electra": Kind(T.ElectraForMaskedLM, T.ElectraConfig, options=_BERT_LIKE | {"embedding_size": 10}),
    "electra, one width": Kind(T.ElectraForMaskedLM, T.ElectraConfig, options=_BERT_LIKE | {"embedding_size": None}),
    "albert": Kind(T.AlbertForMaskedLM, T.AlbertConfig, options=_BERT_LIKE | {"embedding_size": 10}, deep=False),
    "albert, two groups": Kind(
        T.AlbertForMaskedLM,
        T.AlbertConfig,
        options=_BERT_LIKE | {"embedding_size": 7, "num_hidden_groups": 2},
        deep=False,
    ),
    "mpnet": Kind(T.MPNetForMaskedLM, T.MPNetConfig, options=_BERT_LIKE),
    "deberta-v2": Kind(
        T.DebertaV2ForMaskedLM, T.DebertaV2Config, options=_DEBERTA | {"conv_kernel_size": 3}, deep=False
    ),
    "deberta-v3": Kind(
        T.DebertaV2ForMaskedLM, T.DebertaV2Config, options=_DEBERTA | {"share_att_key": True, "legacy": False}
    ),
    "modernbert": Kind(T.ModernBertForMaskedLM, T.ModernBertConfig, options=_MODERNBERT, head_dims=False),
    "modernbert, biases": Kind(
        T.ModernBertForMaskedLM,
        T.ModernBertConfig,
        options=_MODERNBERT | {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True},
        head_dims=False,
    ),
    "gpt2": Kind(T.GPT2LMHeadModel, T.GPT2Config, _GPT2_NAMES, _GPT),
    "gpt2, by layer": Kind(
        T.GPT2LMHeadModel, T.GPT2Config, _GPT2_NAMES, _GPT | {"scale_attn_by_inverse_layer_idx": True}, deep=False
    ),
    "gpt2, unscaled": Kind(T.GPT2LMHeadModel, T.GPT2Config, _GPT2_NAMES, _GPT | {"scale_attn_weights": False}),
    "opt": Kind(T.OPTForCausalLM, T.OPTConfig, {"intermediate_size": "ffn_dim"}, _GPT | {"word_embed_proj_dim": None}),
    "opt, plain norms": Kind(
        T.OPTForCausalLM,
        T.OPTConfig,
        {"intermediate_size": "ffn_dim"},
        _GPT | {"word_embed_proj_dim": None, "layer_norm_elementwise_affine": False, "do_layer_norm_before": False},
    ),
    "opt, projected": Kind(
        T.OPTForCausalLM, T.OPTConfig, {"intermediate_size": "ffn_dim"}, _GPT | {"word_embed_proj_dim": 10}
    ),
    "gpt_neox": Kind(T.GPTNeoXForCausalLM, T.GPTNeoXConfig, options=_ROTARY, head_dims=False),
    "llama": Kind(T.LlamaForCausalLM, T.LlamaConfig, **_LLAMA, divisible=True),
    "llama, tied and biased": Kind(
        T.LlamaForCausalLM,
        T.LlamaConfig,
        **_LLAMA | {"options": _ROTARY | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}},
        divisible=True,
    ),
    "mistral": Kind(T.MistralForCausalLM, T.MistralConfig, **_LLAMA | {"options": _ROTARY | _WINDOW}),
    "qwen2": Kind(T.Qwen2ForCausalLM, T.Qwen2Config, **_LLAMA | {"options": _ROTARY | {"tie_word_embeddings": True}}),
    "qwen3": Kind(T.Qwen3ForCausalLM, T.Qwen3Config, **_LLAMA),
    "gemma2": Kind(
        T.Gemma2ForCausalLM,
        T.Gemma2Config,
        **_GEMMA,
    ),
    "gemma3": Kind(
        T.Gemma3ForCausalLM,
        T.Gemma3TextConfig,
        **_GEMMA,
    ),
}
PLAIN = [name for name in KINDS if "," not in name and "untied" not in name]  # the others are variants of these
VARIANTS = [name for name in KINDS if name not in PLAIN]


def random_model(
    name: str, heads=4, head_dim=6, ffn=56, layers=2, groups=2, hidden=28, seed=0, vocabulary=VOCABULARY, **options
):
    """A model of a family with random weights, biases and norms, so that none is symmetric or zero.

    `groups` query heads share a key/value head, in families that have these. `hidden` is the hidden width where it
    is independent of the heads; elsewhere hidden = heads x head_dim.
    """
    kind = KINDS[name]
    widths = {
        "hidden_size": heads * head_dim if kind.linked else hidden,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
    }
    if not kind.linked:
        widths |= {"head_dim": head_dim, "num_key_value_heads": heads // groups}
    options = kind.options | options
    for name_of_width in ("embedding_size", "word_embed_proj_dim"):  # None: as wide as the residual stream
        if name_of_width in options and options[name_of_width] is None:
            options = options | {name_of_width: widths["hidden_size"]}
    if kind.model is T.DistilBertForMaskedLM:
        options = options | {"pad_token_id": 0}
    torch.manual_seed(seed)
    config = kind.config(
        vocab_size=vocabulary, **{kind.names.get(width, width): size for width, size in widths.items()}, **options
    )
    model = kind.model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_encoder(name: str, pooling: Pooling | None = None, **shape):
    """A model of a family without its head, with random weights, as a sentence encoder."""
    torch.manual_seed(0)
    model = T.AutoModel.from_config(random_model(name, **shape).config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.sentence_pooling = pooling or Pooling()
    return model


def narrower(name: str, model, ratio: float) -> dict[str, Widths]:
    """For each width that this family can change separately, the shape in which it is `ratio` of the model's."""
    kind, wide = KINDS[name], Widths.of(model)

    def part(size: int, unit: int = 1) -> int:
        return max(1, round(ratio * size / unit)) * unit

    shapes = {"ffn": Widths(ffn=part(wide.ffn)), "all": Widths.at(model, ratio)}
    group = wide.heads // (getattr(model.config, "num_key_value_heads", None) or wide.heads)
    heads = part(wide.heads, group)
    hidden = wide.hidden // heads * heads if kind.divisible and not kind.hidden_fixed else None
    shapes["heads"] = Widths(heads=heads, hidden=hidden)
    if kind.head_dims:
        shapes["head_dim"] = Widths(head_dim=part(wide.head_dim))
    if kind.deep:
        shapes["layers"] = replace(shapes["all"], layers=max(1, wide.layers // 2))
    if not kind.linked and not kind.hidden_fixed:
        shapes["hidden"] = Widths(hidden=part(wide.hidden, wide.heads if kind.divisible else 1))
    return {width: shape.resolved(model) for width, shape in shapes.items()}


@st.composite
def models_and_widths(draw, least_hidden=1):
    """A model of any family and uneven shape, and a shape to which it can be narrowed."""
    name = draw(st.sampled_from(sorted(KINDS)))
    kind = KINDS[name]
    groups = draw(st.integers(1, 3)) if kind.grouped else 1
    heads = groups * draw(st.integers(2 if kind.linked else 1, 12 // groups))
    grain = heads if kind.divisible else 1
    model = random_model(
        name,
        heads=heads,
        head_dim=draw(st.integers(1, 4)) * 4 if not kind.head_dims else draw(st.integers(2, 7)),
        ffn=draw(st.integers(5, 70)),
        layers=draw(st.integers(2, 3)),
        groups=groups,
        hidden=heads * draw(st.integers(1 + 8 // heads, 1 + 48 // heads))
        if kind.divisible
        else draw(st.integers(8, 48)),
        seed=draw(st.integers(0, 1000)),
    )
    wide = Widths.of(model)
    fitting = [n for n in range(groups, wide.heads + 1, groups) if not kind.hidden_fixed or wide.hidden % n == 0]
    heads = draw(st.sampled_from(fitting))
    head_dim = draw(st.integers(1, wide.head_dim)) if kind.head_dims else wide.head_dim
    hidden = heads * head_dim if kind.linked else wide.hidden
    if not kind.linked and not kind.hidden_fixed:
        grain = heads if kind.divisible else 1
        hidden = grain * draw(st.integers(-(-least_hidden // grain), wide.hidden // grain))
    embedding = {"electra": "embedding_size", "opt": "word_embed_proj_dim"}.get(model.config.model_type)
    avoided = getattr(model.config, embedding) if embedding else wide.hidden
    while hidden < least_hidden or hidden == avoided != wide.hidden:
        widest = hidden < least_hidden or head_dim == wide.head_dim
        heads, head_dim = (wide.heads, wide.head_dim) if widest else (heads, head_dim + 1)
        hidden = heads * head_dim
    ffn = draw(st.integers(1, wide.ffn))
    layers = draw(st.integers(1, wide.layers)) if kind.deep else wide.layers
    return name, model, Widths(hidden=hidden, ffn=ffn, head_dim=head_dim, heads=heads, layers=layers)
