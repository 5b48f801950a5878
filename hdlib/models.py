"""Teachers, students as their copies, and the forward pass that records what the loss compares."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from os.path import exists, expanduser
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from torch import Tensor
from torch.nn.functional import normalize, softmax
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, MaskedLMOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import logging

from .losses import LogitsInPieces, QueryKey, Scores, at_least_float32
from .narrowing import stock_model
from .sentences import Modules, Pooling, read_modules
from .widths import Widths, compared_states, family, family_of

EMBEDDED_TEACHER = Path(__file__).with_name("teacher")
RECORDING = "hdlib_recording"  # our attention function's name in Transformers' registry
SAFE_LOADING = {"use_safetensors": True, "trust_remote_code": False}  # no pickle, no Python from a model's folder
TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "tekken.json")  # Transformers makes one up if none is there
UNUSED_ROWS = 1024  # accepted rows of the embedding without a token, since vocabularies are often padded
# Parts of a checkpoint that language modelling does not use, and buffers that old versions saved.
UNUSED = re.compile(r"(^|[.])(pooler|seq_relationship|position_ids|token_type_ids|inv_freq|masked_bias|version)([.]|$)")
NO_WEIGHTS = {  # what a folder may hold instead of weights in safetensors, and the way out
    "adapter_config.json": "an adapter: load it with PEFT, then merge_and_unload() and save_pretrained()",
    "*.gguf": "GGUF files: use the safetensors checkpoint from which they were made",
    "pytorch_model*.bin": "pickled weights, which can execute code, and no safetensors: if you trust them, open them "
    "with Transformers and call save_pretrained()",
}


def load_teacher(
    name_or_path: str | Path = "embedded", encoder: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pre-trained language model or sentence encoder, in float32 and in eval mode, and its tokenizer.

    A sentence encoder is a folder of sentence-transformers, or a masked model that was saved without its head, which
    gets mean pooling; its settings are in the attribute `sentence_pooling`, and are printed in one line.

    Args:
        name_or_path: "embedded" for the small teacher of this library, a local folder, or a model's name on the hub.
        encoder: read a language model without its head, as a sentence encoder with mean pooling.

    Raises:
        FileNotFoundError: a path that does not exist, or a hub name that cannot be reached.
        ValueError: a checkpoint that does not fit its config, or lacks its head or its tokenizer; modules of
            sentence-transformers that are not supported.
        UnsupportedArchitecture: a family without a table of width groups.
    """
    modules = read_modules(expanduser(name_or_path)) if exists(expanduser(name_or_path)) else None
    config = shape_of(Path(name_or_path, modules.path) if modules else name_or_path)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{config.name_or_path} is quantised: use the checkpoint from which it was made")
    auto, source = language_model_class(config), config.name_or_path
    modules = modules or (None if exists(source) else read_modules(source))
    bare = auto is AutoModelForMaskedLM and config.architectures == [MODEL_MAPPING_NAMES[config.model_type]]
    if modules is None and (bare or encoder):
        modules = Modules(Pooling())
    if modules is not None:
        auto = AutoModel
    if exists(source) and not any(any(Path(source).glob(pattern)) for pattern in TOKENIZERS):
        raise ValueError(f"{source} holds no tokenizer ({', '.join(TOKENIZERS)}): save the teacher's tokenizer in it")
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with no_progress_bars() if exists(source) else nullcontext():  # a download keeps its progress bar
            model, report = auto.from_pretrained(source, **options, **SAFE_LOADING)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of Transformers, tokenizers or safetensors
        reason = " ".join(str(error).split())
        raise ValueError(f"no language model with its tokenizer could be loaded from {source}: {reason}") from error
    if modules is not None:
        model.sentence_pooling = modules.pooling
        tokenizer.model_max_length = min(modules.longest or tokenizer.model_max_length, num_positions(model))
        report = report | {"missing_keys": _without_pooler(model, report["missing_keys"])}
        tqdm.write(f"{source}: {type(model).__name__}, {modules.pooling}, {tokenizer.model_max_length} tokens at most")
    _check_report(model, report)
    check_teacher(model)
    check_vocabulary(tokenizer, model)
    return model.eval(), tokenizer


def _without_pooler(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Missing weights without those of the pooler: no pooling uses it, so they become 0."""
    unused = {name for name in missing if name.startswith("pooler.")}
    for name in unused:
        torch.nn.init.zeros_(model.get_parameter(name))
    return missing - unused


def _check_report(model: PreTrainedModel, report: Mapping[str, set]) -> None:
    """Raise ValueError if loading left weights of the model random, or weights of the checkpoint unread."""
    own = {name.partition(".")[0] for part in (model, base_model(model)) for name, _ in part.named_children()}
    unread = [key for key in report["unexpected_keys"] if key.partition(".")[0] in own and not UNUSED.search(key)]
    shapes = [f"{key} of {tuple(saved)}, not {tuple(shape)}" for key, saved, shape in report["mismatched_keys"]]
    found = {
        "lacks weights, which would be random": report["missing_keys"],
        "has weights of another shape than config.json gives them": shapes,
        "has weights that a model of its config.json does not have": unread,
    }
    found = [f"{what}: {_listed(keys)}" for what, keys in found.items() if keys]
    way_out = "Correct config.json, or use a checkpoint that was saved whole, with its language-model head"
    if model.config.model_type == "deberta-v2" and any("predictions." in key for key in report["unexpected_keys"]):
        way_out = f'Set "legacy": {str(not model.config.legacy).lower()} in its config.json, which selects the head'
    if found:
        raise ValueError(f"the checkpoint {model.name_or_path} {'; it '.join(found)}. {way_out}.")


def _listed(names) -> str:
    return ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_teacher(model: PreTrainedModel) -> None:
    """Raise ValueError unless this is the stock model of its config, with its weights in memory.

    A language model needs its head, a sentence encoder its `sentence_pooling`.
    """
    kind, causal = type(model).__name__, family(model).causal
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if causal else MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if hasattr(model, "sentence_pooling"):
        names = MODEL_MAPPING_NAMES
    if (needed := names[model.config.model_type]) not in (each.__name__ for each in type(model).__mro__):
        way_out = f"open the checkpoint with its language-model head, as {needed}"
        way_out += ", or a sentence encoder by load_teacher" if is_encoder(model) else ""
        raise ValueError(f"a {kind} is no teacher: {way_out}")
    if not causal and getattr(model.config, "is_decoder", False):
        raise ValueError(f"this {kind} reads earlier tokens only: set is_decoder to false in its config")
    stock = {name: each.shape for name, each in stock_model(model, Widths.of(model)).named_parameters()}
    loaded = ((name, each) for name, each in model.named_parameters() if each.is_floating_point() and not each.is_meta)
    own = {name: each.shape for name, each in loaded}
    if differ := [name for name in own | stock if own.get(name) != stock.get(name)]:
        raise ValueError(
            f"the teacher's weights are not those of a stock {kind} of its config, in memory: {_listed(differ)}. Load "
            "it without quantisation, adapter or device_map; for an output matrix, correct tie_word_embeddings"
        )


def shape_of(name_or_path: str | Path = "embedded") -> PreTrainedConfig:
    """The config of a teacher, without its weights. Arguments and errors as for `load_teacher`."""
    source = str(EMBEDDED_TEACHER) if name_or_path == "embedded" else expanduser(name_or_path)

    def ask():
        return try_to_load_from_cache(source, "config.json") or HfApi().model_info(source, timeout=hub_timeout())

    check_reachable(source, ask, "model")
    if exists(source):
        _check_folder(Path(source))
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of Transformers, tokenizers or safetensors
        raise ValueError(f"no language model could be read from {source}: {' '.join(str(error).split())}") from error


def _check_folder(folder: Path) -> None:
    """Raise ValueError, with a way out, if a folder holds no config, or weights in other files than safetensors."""
    loadable = any(folder.glob("model*.safetensors"))
    for pattern in ["adapter_config.json"] if loadable else NO_WEIGHTS:
        if any(folder.glob(pattern)):
            raise ValueError(f"no language model could be read from {folder}: it holds {NO_WEIGHTS[pattern]}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"no language model could be read from {folder}: name a folder that holds a config.json")


def hub_timeout() -> int:
    """Seconds to wait for an answer of the hub: the longer one of HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT."""
    return max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)


def check_reachable(source: str, ask: Callable[[], object], what: str) -> None:
    """Raise FileNotFoundError for a path that does not exist, or a hub name that cannot be reached.

    `ask` raises unless the hub's files are on this machine or the hub answers; `what`, "model" or "data set", is for
    the message.
    """
    if exists(source):
        return
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no file or folder {source}")
    try:
        ask()
    except Exception as error:
        raise FileNotFoundError(
            f"{source!r} is no local file or folder, and no {what} of that name could be reached on the hub "
            f'({type(error).__name__}). Pass an existing path, or "embedded".'
        ) from error


def language_model_class(config: PreTrainedConfig) -> type:
    """The auto class that loads a model of this family with its language-model head."""
    return AutoModelForCausalLM if family_of(config.model_type).causal else AutoModelForMaskedLM


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise ValueError if the tokenizer cannot be that of the model."""
    rows, tokens = model.config.vocab_size, len(tokenizer)
    if tokens > rows or rows - tokens > UNUSED_ROWS:
        mismatch = f"the tokenizer has {tokens} entries, the teacher's embedding {rows} rows"
    elif tokenizer.mask_token_id in (None, tokenizer.unk_token_id) and not (family(model).causal or is_encoder(model)):
        mismatch = "the tokenizer has no mask token"
    else:
        return
    raise ValueError(f"tokenizer and teacher do not belong together: {mismatch}. Use the teacher's own tokenizer.")


def num_positions(model: PreTrainedModel) -> int:
    """The length of the longest sequence, in tokens, that the model has positions for."""
    positions = model.config.max_position_embeddings
    return positions - model.config.pad_token_id - 1 if family(model).positions_after_padding else positions


def check_length(length: int, model: PreTrainedModel) -> None:
    """Raise ValueError if blocks of this length, in tokens, are longer than the model's positions."""
    if length > (positions := num_positions(model)):
        raise ValueError(f"blocks have {length} tokens, the teacher only {positions} positions: make shorter blocks")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of Transformers while small models are read or written."""
    with ExitStack() as stack:
        if logging.is_progress_bar_enabled():
            stack.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
        yield


def frozen_copy(teacher: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """A float32 copy on `device` in eval mode, without gradients; weights of that dtype and device are shared."""
    memo = {id(buffer): buffer.to(device) for buffer in teacher.buffers()}
    for parameter in teacher.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to(device, torch.float32), requires_grad=False)
    return deepcopy(teacher, memo).eval()


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """The student at step 0: a copy of the teacher with trainable float32 weights, in eval mode.

    Training keeps eval mode: without dropout, identical models give identical outputs.
    """
    return trainable(deepcopy(teacher).float())


def trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Let all weights be trained, in eval mode; not those of an encoder's pooler, which the loss does not use."""
    model.requires_grad_(True)
    if is_encoder(model) and getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
    return model.eval()


def random_student(teacher: PreTrainedModel, widths: Widths, seed: int) -> PreTrainedModel:
    """A student of the teacher's family and of these widths, with the stock random initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = stock_model(teacher, widths, "cpu")
    return trainable(student.to(teacher.device, torch.float32))


@contextmanager
def recording(*models: PreTrainedModel) -> Iterator[None]:
    """Let models return the inputs of their attention scores; restore their attention function afterwards.

    SDPA returns no attentions, and eager attention would store probabilities (B, H, S, S). The registered function
    runs SDPA and returns queries and keys. The few families without SDPA run eagerly: `forward` records their scores.
    """
    with ExitStack() as stack:
        for model in models:
            before, recorder = model.config._attn_implementation, RECORDING if model._supports_sdpa else "eager"
            if before != recorder:
                stack.callback(model.set_attn_implementation, before)
                model.set_attn_implementation(recorder)
        yield


class SentenceOutput(NamedTuple):
    """What the loss compares of a sentence encoder."""

    embeddings: Tensor  # (B, E), of length 1
    hidden_states: tuple[Tensor, ...]  # L + 1 of (B, S, D)
    attentions: tuple  # L of QueryKey or Scores


def forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    layers: list[int] | None = None,
    in_pieces: bool = False,
) -> MaskedLMOutput | SentenceOutput:
    """Run a model and return everything that `DistillationLoss` compares.

    Args:
        model: a model of a supported family with its head, or a sentence encoder.
        input_ids: (B, S).
        positions: the N loss positions, where the head runs: indices (N,) of the flattened tokens, or (B, S) of bool,
            with a host synchronisation on a GPU. None: everywhere.
        attention_mask: (B, S), 1 for real tokens and 0 for padding; None if there is no padding.
        layers: of a teacher: those that its student has; states and attentions of the others are left out.
        in_pieces: return LogitsInPieces if the logits (N, V) are too large to be held.

    Returns:
        Hugging Face outputs with `logits` (N, V) or (B, S, V), `hidden_states` (L + 1 of (B, S, D)) and
        `attentions` (L of QueryKey, or of Scores for a family without SDPA); for a sentence encoder `embeddings`
        (B, E) of length 1 instead of logits.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "return_dict": True}
    if family(model).causal:
        inputs["use_cache"] = False
    eager = None if model._supports_sdpa else _SoftmaxInputs()
    # Each of these checks waits for the device: whether a block has several texts, whether it has padding.
    packed = patch("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    padded = patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask")
    with recording(model), eager or nullcontext(), packed, padded:
        outputs = base_model(model)(**inputs, output_hidden_states=True, output_attentions=True)
    attentions = tuple(eager.layers) if eager else outputs.attentions
    states, hidden_states = outputs.last_hidden_state, outputs.hidden_states  # (B, S, D)
    if layers is not None:
        hidden_states = tuple(hidden_states[state] for state in compared_states(layers, len(attentions)))
        attentions = tuple(attentions[layer] for layer in layers)
    if is_encoder(model):
        embeddings = normalize(model.sentence_pooling(states, attention_mask), dim=-1)
        return SentenceOutput(embeddings, hidden_states, attentions)
    if positions is not None:
        indices = positions.flatten().nonzero()[:, 0] if positions.dtype == torch.bool else positions
        states = states.flatten(0, 1).index_select(0, indices)  # (N, D)
    logits = LogitsInPieces(states, partial(head, model), model.config.vocab_size)
    if positions is None or not in_pieces or len(logits.slices) <= 1:
        logits = head(model, states)
    return MaskedLMOutput(logits=logits, hidden_states=hidden_states, attentions=attentions)


def base_model(model: PreTrainedModel) -> torch.nn.Module:
    """A language model without its head: from tokens to the last hidden state; an encoder itself."""
    return model.get_submodule(base_name(model))


def base_name(model: PreTrainedModel) -> str:
    """The name of the base model inside a model: "" for a model that was loaded without a head."""
    name = family(model).base or model.base_model_prefix
    return name.partition(".")[2] if is_encoder(model) else name


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether a model has no head: it is no language model, but gives one vector a sentence."""
    return model.base_model is model


def head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits (..., V) from last hidden states (..., D): the model's own forward, with its base model replaced."""
    row = states.reshape(1, -1, states.shape[-1])  # (1, N, D)
    output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=row)
    with patch.object(base_model(model), "forward", lambda *arguments, **options: output):
        logits = model(input_ids=row.new_zeros(row.shape[:2], dtype=torch.long), return_dict=True).logits  # (1, N, V)
    return logits.view(*states.shape[:-1], logits.shape[-1])


class _SoftmaxInputs(TorchFunctionMode):
    """Records the attention scores of an eager model's layers: the inputs of the softmax over keys."""

    def __init__(self):
        super().__init__()
        self.layers = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is softmax and arguments[0].dim() == 4:
            scores = arguments[0]  # (B, H, S, S); about the lowest number of the dtype outside the mask
            self.layers.append(Scores(scores, (scores > torch.finfo(scores.dtype).min / 2)[:, :1]))
        return function(*arguments, **(options or {}))


def _attend_and_record(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """SDPA in Transformers' attention signature; returns (output, QueryKey)."""
    kwargs.pop("output_attentions", None)  # SDPA would warn that it cannot return them
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    recorded = query, key
    if query.device.type == "cpu":  # where the backward pass of SDPA is several times slower in bfloat16
        query, key, value = (at_least_float32(each) for each in (query, key, value))
    if torch.is_grad_enabled():  # SDPA's backward stores these; without gradients the smaller ones are recorded
        recorded = query, key
    with torch.autocast("cpu", enabled=False):  # elsewhere it casts rotated queries and keys to the values' dtype
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key = recorded
    if key.shape[1] != query.shape[1]:  # grouped-query attention: repeat the key heads
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    attended = attention_mask  # (B, 1, S, S) of bool
    if attended is None and module.is_causal:
        attended = torch.ones(query.shape[2:3] * 2, dtype=torch.bool, device=query.device).tril()[None, None]
    return output, QueryKey(query, key, attended, scaling)


AttentionInterface.register(RECORDING, _attend_and_record)
AttentionMaskInterface.register(RECORDING, sdpa_mask)
