"""Which model is read: a checkpoint is read whole or refused, and only a language model is distilled."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

import hdlib
from hdlib import DistillConfig

from models import random_model

SHORT = {"steps": 2, "batch_size": 4, "target": 0.5, "eval_blocks": 2}


def saved(folder: Path, model, tokenizer, **config) -> Path:
    """Save a model and a tokenizer, then change fields of the config."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def rewritten(folder: Path, change) -> Path:
    """Apply a function to the weights of a checkpoint."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def is_refused(folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        hdlib.load_teacher(folder)
    assert "\n" not in str(refusal.value), "one paragraph"


# --- checkpoints whose weights and config differ


@pytest.mark.parametrize(
    "name, changes, key",
    [
        ("llama, tied and biased", {"attention_bias": False}, "model.layers.0.self_attn.k_proj.bias"),
        ("llama, tied and biased", {"mlp_bias": False}, "model.layers.0.mlp.down_proj.bias"),
        ("bert", {"num_hidden_layers": 1}, "bert.encoder.layer.1.attention.output.LayerNorm.bias"),
        ("gpt2", {"n_layer": 1}, "transformer.h.1.attn.c_attn.weight"),
        ("albert, two groups", {"num_hidden_groups": 1}, "albert.encoder.albert_layer_groups.1"),
        ("modernbert, biases", {"classifier_bias": False}, "head.dense.bias"),
        ("deberta-v2", {"conv_kernel_size": 0}, "deberta.encoder.conv.LayerNorm.bias"),
    ],
)
def test_weights_that_the_config_denies_are_named(name, changes, key, tokenizer, tmp_path):
    folder = saved(tmp_path, random_model(name, vocabulary=len(tokenizer)), tokenizer, **changes)
    is_refused(folder, f"has weights that a model of its config.json does not have: .*{re.escape(key)}")


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("bert", {"num_hidden_layers": 3}, "lacks weights.*bert.encoder.layer.2"),
        ("bert", {"vocab_size": 50}, r"another shape .*bert.embeddings.word_embeddings.weight of \(60, 24\), not \(50"),
        ("bert", {"intermediate_size": 40}, "another shape .*bert.encoder.layer.0.intermediate.dense.weight"),
        ("bert", {"tie_word_embeddings": False}, "lacks weights.*cls.predictions.decoder.weight"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight.*tie_word_embeddings"),
        ("bert untied", {"tie_word_embeddings": True}, "cls.predictions.decoder.*tie_word_embeddings"),
        ("deberta-v3", {"legacy": True}, 'lacks weights.*cls.predictions.*Set "legacy": false in its config.json'),
        ("deberta-v2", {"legacy": False}, 'lacks weights.*lm_predictions.*Set "legacy": true in its config.json'),
        ("bert", {"is_decoder": True}, "set is_decoder to false"),
        ("bert", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "is quantised"),
    ],
)
def test_a_config_that_does_not_fit_its_weights(name, changes, words, tokenizer, tmp_path):
    is_refused(saved(tmp_path, random_model(name, vocabulary=len(tokenizer)), tokenizer, **changes), words)


@pytest.mark.parametrize("extra", ["lm_head.bias", "h.2.ln_1.weight", "transformer.h.2.ln_1.weight"])
def test_more_weights_with_and_without_the_prefix(extra, tokenizer, tmp_path):
    model = random_model("gpt2", vocabulary=len(tokenizer))
    folder = saved(tmp_path, model.transformer if extra.startswith("h.") else model, tokenizer)
    is_refused(rewritten(folder, lambda weights: weights | {extra: torch.zeros(24)}), f"does not have: {extra}")


def test_weights_of_a_compiled_model(teacher, tokenizer, tmp_path):
    folder = saved(tmp_path, teacher, tokenizer)
    rewritten(folder, lambda weights: {f"_orig_mod.{name}": each for name, each in weights.items()})
    is_refused(folder, r"lacks weights.*bert.embeddings.LayerNorm.bias.* and \d+ more")


def test_a_pretraining_checkpoint_and_old_buffers_are_read(teacher, tokenizer, tmp_path):
    whole = T.BertForPreTraining(teacher.config).eval()
    old = {"bert.embeddings.position_ids": torch.arange(32)[None], "classifier.weight": torch.zeros(2, 24)}
    rewritten(saved(tmp_path, whole, tokenizer), lambda weights: weights | old)
    model, _ = hdlib.load_teacher(tmp_path)
    tokens = torch.arange(5, 21)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).prediction_logits)


def test_a_checkpoint_without_the_prefix_is_read(tokenizer, tmp_path):
    """As openai-community/gpt2 is saved: the tied head is in the embedding."""
    model = random_model("gpt2", vocabulary=len(tokenizer))
    found, _ = hdlib.load_teacher(saved(tmp_path, model.transformer, tokenizer))
    assert all(torch.equal(each, found.state_dict()[name]) for name, each in model.state_dict().items())


# --- folders that hold something else


@pytest.mark.parametrize(
    "files, without, words",
    [
        (["model.gguf"], ["model.safetensors"], "holds GGUF files: use the safetensors"),
        (["model.gguf"], ["model.safetensors", "config.json"], "holds GGUF files: use the safetensors"),
        (["pytorch_model.bin"], ["model.safetensors"], "holds pickled weights, .*save_pretrained"),
        (["pytorch_model-00001-of-00002.bin"], ["model.safetensors"], "holds pickled weights, .*save_pretrained"),
        (["adapter_config.json"], ["model.safetensors", "config.json"], "holds an adapter: .*merge_and_unload"),
        (["adapter_config.json"], [], "holds an adapter: .*merge_and_unload"),
        ([], ["config.json"], "name a folder that holds a config.json"),
        ([], ["tokenizer.json"], "holds no tokenizer"),
        ([], ["model.safetensors"], "no file named model.safetensors"),
        (["model.safetensors"], [], "header too small"),
        (["config.json"], [], "not a valid JSON"),
    ],
)
def test_a_folder_without_a_whole_model(files, without, words, teacher, tokenizer, tmp_path):
    saved(tmp_path, teacher, tokenizer)
    for name in without:
        (tmp_path / name).unlink()
    for name in files:
        (tmp_path / name).write_bytes(b"{")
    is_refused(tmp_path, words)


def test_other_files_beside_a_whole_model_are_ignored(teacher, tokenizer, tmp_path):
    saved(tmp_path, teacher, tokenizer)
    for name in ("pytorch_model.bin", "model.gguf", "training_args.bin"):
        (tmp_path / name).write_bytes(b"{")
    assert hdlib.load_teacher(tmp_path)


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma2", "albert"])
def test_a_folder_without_tokenizer_gets_no_made_up_one(name, tmp_path):
    random_model(name).save_pretrained(tmp_path)
    is_refused(tmp_path, "holds no tokenizer")


def test_the_home_folder_is_expanded(teacher, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "model", teacher, tokenizer)
    assert hdlib.load_teacher("~/model") and hdlib.load_teacher(Path("~/model"))


# --- padding, mask tokens


@pytest.mark.parametrize("name, pad", [("bert", 7), ("roberta", 1), ("gpt2", None), ("llama", 59)])
def test_a_padding_token_that_differs_is_accepted(name, pad, tokenizer, tmp_path):
    assert tokenizer.pad_token_id == 0, "nothing is padded: blocks are packed"
    hdlib.load_teacher(saved(tmp_path, random_model(name, vocabulary=len(tokenizer)), tokenizer, pad_token_id=pad))


def test_a_mask_token_that_is_not_in_the_vocabulary(teacher, tokenizer, tmp_path):
    saved(tmp_path, teacher, tokenizer)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token": None}))
    is_refused(tmp_path, "has no mask token")


# --- models that cannot be distilled


def _quantised(teacher):
    return torch.ao.quantization.quantize_dynamic(teacher, {torch.nn.Linear})


def _in_8_bits(teacher):
    layer = teacher.bert.encoder.layer[0].output.dense
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return teacher


def _untied(teacher):
    teacher.cls.predictions.decoder.weight = torch.nn.Parameter(teacher.cls.predictions.decoder.weight.detach().clone())
    return teacher


NO_TEACHERS = {
    "encoder": (lambda teacher: teacher.bert, "a BertModel is no teacher: .* BertForMaskedLM"),
    "classifier": (lambda teacher: T.BertForSequenceClassification(teacher.config), "is no teacher"),
    "token classifier": (lambda teacher: T.BertForTokenClassification(teacher.config), "is no teacher"),
    "questions": (lambda teacher: T.BertForQuestionAnswering(teacher.config), "is no teacher"),
    "multiple choice": (lambda teacher: T.BertForMultipleChoice(teacher.config), "is no teacher"),
    "pre-training": (lambda teacher: T.BertForPreTraining(teacher.config), "is no teacher"),
    "next sentence": (lambda teacher: T.BertForNextSentencePrediction(teacher.config), "is no teacher"),
    "causal BERT": (lambda teacher: T.BertLMHeadModel(teacher.config), "is no teacher"),
    "causal backbone": (lambda teacher: random_model("gpt2", vocabulary=60).transformer, "GPT2LMHeadModel"),
    "encoder-decoder": (
        lambda teacher: T.T5ForConditionalGeneration(
            T.T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, decoder_start_token_id=0)
        ),
        "architecture 't5'",
    ),
    "compiled": (torch.compile, "OptimizedModule is no Hugging Face model.*_orig_mod"),
    "parallel": (torch.nn.DataParallel, "DataParallel is no Hugging Face model.*module of a parallel wrapper"),
    "on the meta device": (lambda teacher: teacher.to("meta"), "not those of a stock .*without.*device_map"),
    "quantised": (_quantised, "not those of a stock .*attention.self.key.weight.*without quantisation"),
    "in 8 bits": (_in_8_bits, "not those of a stock .*output.dense.weight.*without quantisation"),
    "untied": (_untied, "not those of a stock .*cls.predictions.decoder.weight.*tie_word_embeddings"),
}


@pytest.mark.parametrize("name", NO_TEACHERS)
def test_a_model_that_cannot_be_distilled(name, teacher, tokenizer, blocks, tmp_path):
    change, words = NO_TEACHERS[name]
    with pytest.raises(ValueError, match=words) as refusal:
        hdlib.distill(change(teacher), tokenizer, *blocks, DistillConfig(**SHORT), tmp_path / "run")
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_a_model_with_an_adapter(teacher, tokenizer, blocks, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"])
    for adapted, words in (
        (peft.get_peft_model(teacher, config), "PeftModel is no Hugging Face model.*merge_and_unload"),
        (teacher, "query.base_layer.*an adapter must be merged"),  # the model inside
    ):
        with pytest.raises(ValueError, match=words):
            hdlib.distill(adapted, tokenizer, *blocks, DistillConfig(**SHORT), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("change, words", [(60, "blocks hold token ids outside of 0 to 59"), (-1, "token ids outside")])
def test_blocks_of_another_vocabulary(part, change, words, teacher, tokenizer, blocks, tmp_path):
    columns = [hdlib.data.Blocks(**each.with_format("torch")[:12]) for each in blocks]
    columns[part].columns["input_ids"][2, 3] = change
    with pytest.raises(ValueError, match=words):
        hdlib.distill(teacher, tokenizer, *columns, DistillConfig(**SHORT), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_blocks_of_different_lengths(teacher, tokenizer, blocks, tmp_path):
    train = blocks[0].take(8).map(lambda row, i: {"input_ids": row["input_ids"][: 16 - i]}, with_indices=True)
    with pytest.raises(ValueError, match="training blocks differ in length"):
        hdlib.distill(teacher, tokenizer, train, blocks[1], DistillConfig(**SHORT), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_that_change_only_the_form_of_outputs(teacher, tokenizer, blocks, tmp_path):
    """A config with return_dict=False, output_attentions=True and so on, and a model compiled in place."""
    plain = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**SHORT), tmp_path / "plain")
    teacher.config.return_dict, teacher.config.output_hidden_states = False, True
    changed = hdlib.distill(teacher, tokenizer, *blocks, DistillConfig(**SHORT), tmp_path / "changed")
    assert plain.metrics["total"].equals(changed.metrics["total"])


@pytest.mark.parametrize("variable", ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"])
def test_a_slow_hub_is_waited_for(variable, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, variable, 77)
    waited = []

    def answer(self, name, timeout):
        waited.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    with pytest.raises(FileNotFoundError, match="TimeoutError"):
        hdlib.load_teacher("some/model")
    assert waited == [77]
