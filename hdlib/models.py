"""Teachers, students as their copies, and the one forward that records what the loss compares."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from os.path import exists
from pathlib import Path
from unittest.mock import patch

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from torch import Tensor
from torch.nn.functional import softmax
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
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
from transformers.utils import logging

from .families import FAMILIES
from .losses import LogitsInPieces, QueryKey, Scores
from .widths import UnsupportedArchitecture, Widths, family, set_widths, unsupported

EMBEDDED_TEACHER = Path(__file__).with_name("teacher")
RECORDING = "hdlib_recording"  # the name our attention function is registered under
SAFE_LOADING = {"use_safetensors": True, "trust_remote_code": False}  # no pickle, no Python out of a model's folder
# Vocabularies are often padded to a round number of rows; this many unused rows are no mismatch.
UNUSED_ROWS = 1024


def load_teacher(name_or_path: str | Path = "embedded") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pre-trained language model, masked or causal, and its tokenizer.

    Args:
        name_or_path: "embedded" for the small teacher that comes with the library, a local folder, or a
            model name on the hub.

    Returns:
        (model, tokenizer): the model in float32 whatever it is stored in, in eval mode.

    Raises:
        FileNotFoundError: a path that is not there, or a hub name that cannot be reached.
        ValueError: no language-model head in the checkpoint (names the missing weights), or a
            tokenizer of another vocabulary.
        UnsupportedArchitecture: a family without a table of width groups.
    """
    source = _source(name_or_path)
    _check_reachable(source)
    try:
        auto_class = language_model_class(AutoConfig.from_pretrained(source, trust_remote_code=False))
        with no_progress_bars() if exists(source) else nullcontext():  # a download is worth a bar
            model, report = auto_class.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, **SAFE_LOADING
            )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UnsupportedArchitecture:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no language model with its tokenizer could be loaded from {source}: {error}") from error
    family(model)
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ValueError(
            f"the checkpoint {source} lacks weights that a language model needs: {', '.join(missing)}. "
            "They would be random, and a teacher that guesses teaches nothing: "
            "take a checkpoint that was saved with its language-model head."
        )
    check_vocabulary(tokenizer, model)
    return model.eval(), tokenizer


def shape_of(name_or_path: str | Path = "embedded") -> PreTrainedConfig:
    """The config of a teacher, without its weights. Arguments as for `load_teacher`.

    Raises:
        FileNotFoundError: a path that is not there, or a hub name that cannot be reached.
        ValueError: no config of a model that Transformers knows.
    """
    source = _source(name_or_path)
    _check_reachable(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no config of a model could be read from {source}: {error}") from error


def language_model_class(config: PreTrainedConfig) -> type:
    """The auto class that opens a model of this family with its language-model head."""
    if config.model_type not in FAMILIES:
        raise unsupported(config.model_type)
    return AutoModelForCausalLM if FAMILIES[config.model_type].causal else AutoModelForMaskedLM


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise ValueError unless tokenizer and model can belong together."""
    rows, tokens = model.config.vocab_size, len(tokenizer)
    if tokens > rows or rows - tokens > UNUSED_ROWS:
        raise ValueError(
            f"tokenizer and teacher do not belong together: the tokenizer has {tokens} entries, the teacher's "
            f"embedding {rows} rows. Take the tokenizer that was saved with the teacher."
        )
    if tokenizer.mask_token_id is None and not family(model).causal:
        raise ValueError("the tokenizer has no mask token: masked language modelling needs one")
    pads = (tokenizer.pad_token_id, model.config.pad_token_id)
    if None not in pads and pads[0] != pads[1]:
        raise ValueError(
            f"tokenizer and teacher do not belong together: padding is token {pads[0]} for the tokenizer and "
            f"{pads[1]} for the teacher."
        )


def num_positions(model: PreTrainedModel) -> int:
    """The longest sequence that a model has positions for."""
    positions = model.config.max_position_embeddings
    return positions - model.config.pad_token_id - 1 if family(model).positions_after_padding else positions


def check_length(length: int, model: PreTrainedModel) -> None:
    """Raise ValueError unless a model has positions for blocks of so many tokens."""
    positions = num_positions(model)
    if length > positions:
        raise ValueError(f"blocks have {length} tokens, the teacher only {positions} positions")


@contextmanager
def no_progress_bars():
    """Small models are read and written at once: no progress bars of Transformers meanwhile."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def frozen_copy(teacher: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The teacher as a run reads it: float32, eval mode, without gradients, on `device`.

    The caller's teacher stays as it is; weights that are in float32 on `device` already are shared, not copied.
    """
    memo = {
        id(parameter): torch.nn.Parameter(parameter.detach().to(device, torch.float32), requires_grad=False)
        for parameter in teacher.parameters()
    }
    memo |= {id(buffer): buffer.to(device) for buffer in teacher.buffers()}
    return deepcopy(teacher, memo).eval()


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """The student at step 0: a copy of the teacher with float32 weights, all of them trainable.

    It is in eval mode and is trained in it: dropout stays off, so that identical models give identical
    outputs, while the config keeps the teacher's dropout for whoever fine-tunes the result.
    """
    return deepcopy(teacher).float().requires_grad_(True).eval()


def random_student(teacher: PreTrainedModel, widths: Widths, seed: int) -> PreTrainedModel:
    """A student of the teacher's family and of these widths that was never the teacher: the stock initialisation."""
    config = deepcopy(teacher.config)
    set_widths(teacher, config, widths)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = type(teacher)(config)
    return student.to(teacher.device, torch.float32).eval()


@contextmanager
def recording(*models: PreTrainedModel):
    """Let models hand back what their attention scores are made of, then restore how they attended.

    Eager attention would hold (B, H, S, S) probabilities; SDPA hands back nothing. This runs SDPA and
    returns queries and keys. Outputs are those of SDPA. The few families that have no SDPA (their scores
    are more than a product of queries and keys) go on attending eagerly: `forward` takes the scores there.
    """
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation(RECORDING if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


def forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    in_pieces: bool = False,
) -> MaskedLMOutput:
    """Run a model so that its outputs hold everything `DistillationLoss` compares.

    Args:
        model: a model of a supported family with its head.
        input_ids: (B, S).
        positions: (B, S) of bool; the head runs at these N positions only and the logits are (N, V).
            None: everywhere, (B, S, V).
        attention_mask: (B, S), or None if there is no padding.
        in_pieces: where the N positions have more logits than should be held at once, give LogitsInPieces.

    Returns:
        Hugging Face outputs with `logits`, `hidden_states` (L + 1 of (B, S, D)) and `attentions` (L
        QueryKey pairs, or Scores where the family has no SDPA).
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if family(model).causal:
        inputs["use_cache"] = False
    with _recording_once(model), _SoftmaxInputs(not model._supports_sdpa) as seen:
        outputs = base_model(model)(**inputs, output_hidden_states=True, output_attentions=True)
    attentions = tuple(Scores.of(scores) for scores in seen.scores) or outputs.attentions
    states = outputs.last_hidden_state  # (B, S, D)
    if positions is None:
        logits = head(model, states)
    else:
        logits = LogitsInPieces(states[positions], partial(head, model), model.config.vocab_size)
        if not in_pieces or len(logits.pieces) == 1:
            logits = logits.all()
    return MaskedLMOutput(logits=logits, hidden_states=outputs.hidden_states, attentions=attentions)


def base_model(model: PreTrainedModel) -> torch.nn.Module:
    """A language model without its head: from tokens to the last hidden state."""
    return model.get_submodule(family(model).base or model.base_model_prefix)


def head(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits (..., V) from last hidden states (..., D), whatever a stock class does on the way.

    Its own forward is run, with these states for what its base model answers. The vocabulary is the most expensive
    layer: at 15 % of the positions it costs 15 %, and no (B, S, V) tensor is ever made.
    """
    row = states.reshape(1, -1, states.shape[-1])
    answer = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=row)
    with patch.object(base_model(model), "forward", lambda *arguments, **options: answer):
        logits = model(input_ids=row.new_zeros(row.shape[:2], dtype=torch.long)).logits
    return logits.view(*states.shape[:-1], logits.shape[-1])


@contextmanager
def _recording_once(model: PreTrainedModel):
    """`recording`, unless the caller has switched the model already (the loop does, once for all steps)."""
    if model.config._attn_implementation == RECORDING:
        yield
    else:
        with recording(model):
            yield


class _SoftmaxInputs(TorchFunctionMode):
    """What goes into the softmax over keys, layer by layer: the attention scores of an eager model."""

    def __init__(self, watch: bool):
        super().__init__()
        self.watch, self.scores = watch, []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if self.watch and function is softmax and arguments[0].dim() == 4:
            self.scores.append(arguments[0])  # (B, H, S, S)
        return function(*arguments, **(options or {}))


def _attend_and_record(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """SDPA that also hands back query and key, which of them meet, and the scale of their products.

    On CPUs, SDPA's backward is several times slower in bfloat16 than in float32, so it runs in float32.
    """
    kwargs.pop("output_attentions", None)  # SDPA would warn that it cannot; this function is how we can
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    recorded = query, key
    if query.device.type == "cpu":
        query, key, value = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key, value))
    if torch.is_grad_enabled():  # what SDPA's backward holds costs nothing to hand back; else the smaller is
        recorded = query, key
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key = recorded
    if key.shape[1] != query.shape[1]:  # several query heads to a key head
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return output, QueryKey(query, key, _attended(module, query, attention_mask), scaling)


def _attended(module, query: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Which keys each query meets, (1 or B, 1, S, S) of bool; None for all of them."""
    if attention_mask is not None:
        return attention_mask
    if not module.is_causal:
        return None
    length = query.shape[2]
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]


AttentionInterface.register(RECORDING, _attend_and_record)
AttentionMaskInterface.register(RECORDING, sdpa_mask)


def _source(name_or_path: str | Path) -> str:
    return str(EMBEDDED_TEACHER) if name_or_path == "embedded" else str(name_or_path)


def _check_reachable(source: str) -> None:
    """Fail in words, and at once, for a path that is not there or a hub that cannot be reached."""
    if exists(source):
        return
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder {source}")
    try:
        if not try_to_load_from_cache(source, "config.json"):
            HfApi().model_info(source, timeout=5)
    except Exception as error:
        raise FileNotFoundError(
            f"{source!r} is no local folder, and the hub could not be asked for a model of that name "
            f'({type(error).__name__}). Pass a local folder saved by save_pretrained, or "embedded".'
        ) from error
