"""A smaller vocabulary: a model and its tokenizer without the entries that a text does not use.

The entries that stay keep their order, so that their new ids are the ranks of the old ones. The tokenizer is edited in
the JSON of its own serialisation.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import pairwise
from math import inf

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .models import check_vocabulary
from .narrowing import check_narrowable, copy_derived_attributes, sites_of
from .widths import Widths, family


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] | None = None,
    size: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Copies of a model and of its tokenizer with fewer entries in the vocabulary, both of stock classes.

    Special and added tokens, single characters and bytes always stay, and in BPE what merges into an entry that stays.
    A text whose tokens all stay is divided as before, and these tokens have the logits of before. Trim a teacher before
    its corpus is loaded: its student has the same entries.

    Args:
        model: a model of a supported family, with or without a head.
        tokenizer: its fast tokenizer.
        texts: the entries that they use stay, the most used ones first.
        size: number of entries to keep; those without a use in the order of merges or ids. None: all that texts use.

    Raises ValueError for an impossible size, texts without a token, a slow tokenizer, or one that is not the model's.
    """
    check_narrowable(model, Widths.of(model))
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer: open it as a fast one, with AutoTokenizer")
    check_vocabulary(tokenizer, model)
    backend, vocabulary = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    uses = Counter() if size and texts is None else _uses(tokenizer, texts or ())
    uses |= dict.fromkeys(_needed(model, tokenizer, backend), inf)
    kept = _most_used(vocabulary, uses, backend["model"], size)
    ids = [vocabulary[token] for token in kept]
    return _with_rows(model, ids), _with_entries(tokenizer, backend, {token: new for new, token in enumerate(kept)})


def _uses(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[str]:
    """How often texts use each entry."""
    if isinstance(texts, str):
        raise ValueError("texts is a single string: pass a list of texts, or an open file of lines")
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids = Counter(index for text in texts for index in tokenizer(text, **options)["input_ids"])
    if not ids:
        raise ValueError("texts hold no token: pass texts such as the model will read, or a size")
    return Counter({token: ids[index] for token, index in tokenizer.get_vocab().items()})


def _needed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, backend: dict) -> set[str]:
    """The entries that always stay, without the parts of BPE."""
    entries, names = backend["model"], {index: token for token, index in tokenizer.get_vocab().items()}
    within_words = re.escape(entries.get("continuing_subword_prefix") or "")
    character = re.compile(f"({within_words})?(.|<0x[0-9A-F]{{2}}>)", re.DOTALL)
    needed = {token for token in names.values() if character.fullmatch(token)}
    needed |= {*tokenizer.all_special_tokens, *(added["content"] for added in backend["added_tokens"])}
    needed |= {token for *_, token in _places(backend["post_processor"])}
    for config, name, ids in _special_ids(model):
        if lost := set(ids) - names.keys():
            field = f"{name}={lost.pop()} of {type(config).__name__}"
            raise ValueError(f"{field} is no entry of the tokenizer: correct it, or set it to None")
        needed |= {names[index] for index in ids}
    if family(model).positions_after_padding:  # the padding token keeps its id
        needed |= {names[index] for index in range(1 + model.get_input_embeddings().padding_idx)}
    if entries["type"] == "Unigram":  # the lowest score decides that of an unknown character
        needed.add(min(entries["vocab"], key=lambda entry: entry[1])[0])
    return needed.intersection(names.values())


def _special_ids(model: PreTrainedModel) -> Iterator[tuple[object, str, list[int]]]:
    """(config, name, ids) of the special tokens in the configs of a model."""
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        for name, value in config.to_dict().items():
            if name.endswith("_token_id") and value is not None:
                yield config, name, value if isinstance(value, list) else [value]


def _places(part) -> Iterator[tuple[list, int, str]]:
    """(list, index in it, token) of each token id in the JSON of a post-processor."""
    if isinstance(part, list) and [*map(type, part)] == [str, int]:
        yield part, 1, part[0]
    elif isinstance(part, dict) and "ids" in part:
        yield from ((part["ids"], index, token) for index, token in enumerate(part["tokens"]))
    elif isinstance(part, dict | list):
        for each in part.values() if isinstance(part, dict) else part:
            yield from _places(each)


def _most_used(vocabulary: dict[str, int], uses: Counter[str], entries: dict, size: int | None) -> list[str]:
    """The entries to keep, in the order of their ids."""
    merges = entries.get("merges", ())
    if merges and (entries["continuing_subword_prefix"] or entries["end_of_word_suffix"]):
        raise ValueError("the tokenizer is a BPE that marks parts of words, which is not supported: use another model")
    ranks, order, totals = {tuple(pair): rank for rank, pair in enumerate(merges)}, {}, uses.copy()
    for token, index in vocabulary.items():
        parts, last = _merged(token, ranks)
        order[token] = last, len(parts), index
        for part in parts:  # as often used as the token and before it in order: stays if the token stays
            totals[part] += uses[token]
    least, used = sum(total == inf for total in totals.values()), sum(total > 0 for total in totals.values())
    if size is not None and not least <= size <= len(vocabulary):
        limits = f"{least}, which special tokens, characters and bytes need, to {len(vocabulary)}, which are all"
        raise ValueError(f"size={size} is impossible: take a number of entries from {limits}")
    ranked = sorted(vocabulary, key=lambda token: (-totals[token], order[token]))
    return sorted(ranked[: size or used], key=vocabulary.get)


def _merged(token: str, ranks: dict[tuple[str, str], int]) -> tuple[set[str], float]:
    """The entries that BPE makes of a token's characters before the token, and the highest rank of the merges.

    They are the same wherever the token is used, because no merge crosses its ends.
    """
    symbols, parts, last = list(token), set(), 0
    while ranks and len(symbols) > 1:
        rank, place = min((ranks.get(pair, inf), place) for place, pair in enumerate(pairwise(symbols)))
        if rank == inf:  # the tokenizer finds this token as a whole
            return set(), inf
        parts.add(merged := symbols[place] + symbols.pop(place + 1))
        symbols[place], last = merged, max(last, rank)
    return parts - {token}, last


def _with_entries(tokenizer: PreTrainedTokenizerBase, backend: dict, new: dict[str, int]) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with the entries of `new`, token to id."""
    entries = backend["model"]
    if entries["type"] == "Unigram":
        unknown = None if entries["unk_id"] is None else entries["vocab"][entries["unk_id"]][0]
        entries["vocab"] = [entry for entry in entries["vocab"] if entry[0] in new]
        entries["unk_id"] = new.get(unknown)
    else:
        entries["vocab"] = {token: new[token] for token in entries["vocab"] if token in new}
    if "merges" in entries:
        entries["merges"] = [pair for pair in entries["merges"] if {*pair, "".join(pair)} <= new.keys()]
    for added in backend["added_tokens"]:
        added["id"] = new[added["content"]]
    for ids, index, token in _places(backend["post_processor"]):
        ids[index] = new[token]
    if backend["padding"]:
        backend["padding"]["pad_id"] = new[backend["padding"]["pad_token"]]
    trimmed = deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return trimmed


@torch.no_grad()
def _with_rows(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A copy of a model that keeps these rows of each parameter of which the stock class then has fewer."""
    model = deepcopy(model)
    for config, name, ids in _special_ids(model):
        new = [kept.index(index) for index in ids]
        setattr(config, name, new if isinstance(getattr(config, name), list) else new[0])
    model.config.vocab_size = len(kept)
    with torch.device("meta"):
        stock = type(model)(model.config)
    rows, sites = torch.tensor(kept, device=model.device), sites_of(model)
    for name, parameter in [*model.named_parameters()]:
        if parameter.shape != stock.get_parameter(name).shape:
            smaller = nn.Parameter(parameter[rows], requires_grad=parameter.requires_grad)
            for module, attribute in sites[parameter]:
                setattr(module, attribute, smaller)
    copy_derived_attributes(model, stock)
    return model
