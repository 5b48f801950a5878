"""Sentence encoders: from the states of tokens to one vector, and folders in the format of sentence-transformers.

A sentence encoder is a stock model without a head. Its attribute `sentence_pooling` holds what sentence-transformers
stores in modules of its own. Shapes: B sentences, S tokens, D hidden width (Dt of the teacher, Ds of the student),
E dimensions of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .data import Sentences
from .losses import at_least_float32, in_teacher_space

ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")  # of dense layers, by their names in torch.nn
OLD_NAMES = {  # of the pooling modes, in the order in which several are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(states)  # (B, S, 1)
    return (states * weights).sum(1) / weights.sum(1)


def _at(states: Tensor, positions: Tensor) -> Tensor:
    return states.gather(1, positions[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]


MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of states (B, S, D) and mask (B, S) to (B, D)
    "cls": lambda states, mask: _at(states, mask.int().argmax(1)),
    "max": lambda states, mask: states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1),
    "mean": _mean,
    "lasttoken": lambda states, mask: _at(states, mask.shape[1] - 1 - mask.int().flip(1).argmax(1)),
}


class Dense(NamedTuple):
    """A linear layer after pooling: weight (out, in), bias (out,) or None, and its activation, a name in torch.nn."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "Identity"

    def __call__(self, pooled: Tensor) -> Tensor:
        weight, bias = (None if each is None else each.to(pooled) for each in self[:2])
        return getattr(nn, self.activation)()(F.linear(pooled, weight, bias))


@dataclass(frozen=True, eq=False)
class Pooling:
    """From the last hidden states of the tokens to one vector a sentence."""

    modes: tuple[str, ...] = ("mean",)  # keys of MODES; the vectors of several are concatenated
    dense: tuple[Dense, ...] = ()  # layers after pooling
    normalize: bool = True  # whether embeddings are divided by their length
    prompts: Mapping[str, str] = field(default_factory=dict)  # texts to put before a sentence, by name
    default_prompt: str | None = None  # name of the one that is used if none is given
    projection: Tensor | None = None  # (Ds, Dt), of a student in training: from its width to the teacher's

    def __call__(self, states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings (B, E) of sentences with last hidden states (B, S, D); the mask (B, S) is 0 for padding."""
        mask = torch.ones_like(states[..., 0]) if attention_mask is None else attention_mask
        with torch.autocast(states.device.type, enabled=False):  # lengths and their differences need float32
            states = at_least_float32(states)
            vectors = [MODES[mode](states, mask) for mode in self.modes]  # each (B, D)
            if self.projection is not None:
                vectors = [in_teacher_space(each, self.projection) for each in vectors]
            embeddings = torch.cat(vectors, -1)
            for dense in self.dense:
                embeddings = dense(embeddings)
            return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def prompt(self, given: str | None = None) -> str:
        """The text to put before every sentence: the given one, else the default one.

        Raises ValueError if the model has prompts, none of them is the default one, and none is given.
        """
        texts = {name: text for name, text in self.prompts.items() if text.strip()}
        if given is None and texts and self.default_prompt is None:
            named = ", ".join(f"{name} {text!r}" for name, text in texts.items())
            raise ValueError(
                f'the model was trained with prompts before its texts ({named}): pass one as prompt=..., or prompt="" '
                "to encode without"
            )
        return self.prompts.get(self.default_prompt, "") if given is None else given

    def fixed(self) -> Pooling:
        """The same with the projection as a dense layer, for a model that is no longer trained."""
        if self.projection is None:
            return self
        blocks = [self.projection.detach().cpu().float().T] * len(self.modes)  # (Dt, Ds) each
        return replace(self, projection=None, dense=(Dense(torch.block_diag(*blocks)), *self.dense))

    def __str__(self) -> str:
        dense = [f"dense {layer.weight.shape[1]} to {layer.weight.shape[0]}" for layer in self.fixed().dense]
        prompts = ", ".join(name for name, text in self.prompts.items() if text.strip())
        parts = [f"{' + '.join(self.modes)} pooling", *dense, "normalised" if self.normalize else "not normalised"]
        return ", ".join([*parts, f"prompts: {prompts}" if prompts else "no prompts"])


@torch.no_grad()
def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Embeddings (N, E) of texts, on the CPU in float32, equal to those of `SentenceTransformer(folder).encode`.

    Args:
        model, tokenizer: a sentence encoder, from `load_teacher` or `Run.student`.
        texts: N texts; the end of a longer one than `tokenizer.model_max_length` is not read.
        prompt: put before every text; None: the model's default one.

    Raises ValueError for a model with prompts of which none is given or the default one, and a text without a token.
    """
    pooling = model.sentence_pooling
    sentences = Sentences.of(token_ids(tokenizer, texts, pooling.prompt(prompt)), tokenizer.pad_token_id)
    embeddings = [torch.empty(0, 0)] * len(texts)
    for rows in sentences.lengths.argsort(descending=True).split(batch_size):
        batch = {name: each.to(model.device) for name, each in sentences[rows.tolist()].items()}
        made = pooling(model(**batch).last_hidden_state, batch["attention_mask"]).cpu().float()
        for row, embedding in zip(rows.tolist(), made, strict=True):
            embeddings[row] = embedding
    return torch.stack(embeddings)


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt: str = "", length: int | None = None
) -> list[list[int]]:
    """Token ids of each text, special tokens included, cut to `length` tokens; as sentence-transformers reads texts."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts must be a list of at least one text; got {texts!r:.50}")
    options = {"truncation": True, "max_length": length, "verbose": False, "return_attention_mask": False}
    ids = tokenizer([prompt + text for text in texts], **options)["input_ids"]
    if empty := [number for number, tokens in enumerate(ids) if not tokens]:
        raise ValueError(f"text {empty[0]} has no token: remove it")
    return ids


# --------------------------------------------------------------------------------------------------------- folders


class Modules(NamedTuple):
    """What a folder of sentence-transformers says."""

    pooling: Pooling
    path: str = ""  # of the transformer below the folder
    longest: int | None = None  # sentence, in tokens


def read_modules(source: str) -> Modules | None:
    """Read the modules of a sentence-transformers folder, local or on the hub; None if there is no modules.json.

    Raises ValueError for a module, an order of modules or a setting that is not supported, and pickled weights.
    """
    if (modules := _json(source, "modules.json")) is None:
        return None
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    paths = [module["path"] for module in modules]
    known = ("Transformer", "Pooling", "Dense", "Normalize")
    if unknown := [module["type"] for module, kind in zip(modules, kinds, strict=True) if kind not in known]:
        raise ValueError(
            f"{source}: the module {unknown[0]} is not supported: use an encoder made of {', '.join(known)}"
        )
    if kinds != ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), *["Normalize"] * ("Normalize" in kinds)]:
        order = "Transformer, Pooling, any number of Dense, at most one Normalize"
        raise ValueError(f"{source}: its modules are {', '.join(kinds)}: they must be {order}")
    settings = _json(source, "config_sentence_transformers.json") or {}
    pooling = Pooling(
        modes=_modes(source, paths[1]),
        dense=tuple(_dense(source, path) for path, kind in zip(paths, kinds, strict=True) if kind == "Dense"),
        normalize="Normalize" in kinds,
        prompts=settings.get("prompts") or {},
        default_prompt=settings.get("default_prompt_name"),
    )
    of_tokenizer = _json(source, f"{paths[0]}/sentence_bert_config.json".lstrip("/")) or {}
    if of_tokenizer.get("do_lower_case"):
        raise ValueError(
            f"{source}: do_lower_case is true in sentence_bert_config.json: use the tokenizer's own setting"
        )
    return Modules(pooling, paths[0], of_tokenizer.get("max_seq_length"))


def _modes(source: str, path: str) -> tuple[str, ...]:
    config = _json(source, f"{path}/config.json") or {}
    others = sorted(name for name in config.keys() - OLD_NAMES if name.startswith("pooling_mode_"))
    flags = [OLD_NAMES.get(name, name) for name in (*OLD_NAMES, *others) if config.get(name)]
    modes = config.get("pooling_mode", flags)
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or (unknown := [mode for mode in modes if mode not in MODES]):
        found = unknown[0] if modes else "none"
        raise ValueError(f"{source}/{path}: the pooling mode {found} is not supported: use {', '.join(MODES)}")
    if not config.get("include_prompt", True):
        raise ValueError(f"{source}/{path}: include_prompt is false, which is not supported: use another encoder")
    return modes


def _dense(source: str, path: str) -> Dense:
    config = _json(source, f"{path}/config.json") or {}
    activation = config.get("activation_function", "torch.nn.Tanh").rpartition(".")[2]
    others = {"use_residual": False}
    others |= dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding")
    changed = [name for name, usual in others.items() if (config.get(name) or usual) != usual]
    if activation not in ACTIVATIONS or changed:
        setting = changed[0] if changed else f"the activation {config['activation_function']}"
        raise ValueError(f"{source}/{path}: {setting} of a dense layer is not supported: use {', '.join(ACTIVATIONS)}")
    if (file := _file(source, f"{path}/model.safetensors")) is None:
        raise ValueError(
            f"{source}/{path} has no model.safetensors: open it with sentence-transformers and save it again"
        )
    weights = load_file(file)
    return Dense(weights["linear.weight"].float(), weights.get("linear.bias"), activation)


def write_pooling(folder: Path, model: PreTrainedModel, pooling: Pooling, longest: int) -> None:
    """Complete the folder of a model for sentence-transformers; `longest` is the longest sentence in tokens."""
    pooling, modes = pooling.fixed(), list(pooling.modes)
    modules = ["Transformer", "Pooling", *["Dense"] * len(pooling.dense), *["Normalize"] * pooling.normalize]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(modules[1:], 1))]
    write_json(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(zip(modules, paths, strict=True))
        ],
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    prompts = {"prompts": dict(pooling.prompts), "default_prompt_name": pooling.default_prompt}
    write_json(folder / "config_sentence_transformers.json", prompts | {"similarity_fn_name": "cosine"})
    for path in paths[1:]:
        (folder / path).mkdir()
    sizes = {"word_embedding_dimension": model.config.hidden_size}
    write_json(folder / "1_Pooling/config.json", sizes | {"pooling_mode": modes if len(modes) > 1 else modes[0]})
    for path, (weight, bias, activation) in zip(paths[2:], pooling.dense, strict=False):
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
        write_json(folder / path / "config.json", sizes | {"activation_function": f"torch.nn.{activation}"})
        tensors = {"linear.weight": weight.contiguous()} | ({} if bias is None else {"linear.bias": bias})
        save_file(tensors, folder / path / "model.safetensors")


def _file(source: str, name: str) -> str | None:
    """A file of a local folder or of a model on the hub; None if there is none."""
    try:
        return cached_file(source, name)
    except OSError:
        return None


def _json(source: str, name: str):
    if (file := _file(source, name)) is None:
        return None
    try:
        return json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged and cannot be read: {error}") from error


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
