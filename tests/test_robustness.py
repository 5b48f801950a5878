"""Models that were altered after loading: each works, or is refused before anything is changed."""

import copy
import os

import peft
import pytest
import torch
from accelerate import cpu_offload
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hdlib
from hdlib import DistillConfig, Widths

from conftest import random_batch, random_bert

NARROW = Widths(hidden=12, ffn=20)


@pytest.fixture
def model():
    return random_bert()


def refuses(model, words: str, error=ValueError) -> None:
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    with pytest.raises(error, match=words):
        hdlib.narrow(model, NARROW)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before


def logits(model) -> torch.Tensor:
    return model(random_batch()[0]).logits


def narrowed(model) -> torch.nn.Module:
    hdlib.narrow(model, NARROW)
    return model


def test_frozen_parameters_work_and_stay_frozen(model):
    model.bert.embeddings.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    hdlib.narrow(model, NARROW, None, optimizer)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "embeddings" in name}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    logits(model).sum().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and not moved & frozen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_work(model, dtype):
    expected = logits(narrowed(copy.deepcopy(model)))
    got = logits(narrowed(model.to(dtype)))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)


def test_gradient_checkpointing_works(model):
    plain = narrowed(copy.deepcopy(model))
    model.gradient_checkpointing_enable()
    for each in (narrowed(model), plain):
        torch.manual_seed(0)
        logits(each.train()).square().sum().backward()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


@pytest.mark.full
def test_a_model_compiled_in_place_works(model):
    expected = logits(narrowed(copy.deepcopy(model)))
    model.compile(backend="eager")
    logits(model)  # compiled at the old widths
    torch.testing.assert_close(logits(narrowed(model)), expected)


def test_a_wrapper_of_torch_compile_is_refused(model):
    refuses(torch.compile(model, backend="eager"), "OptimizedModule is no .*_orig_mod", hdlib.UnsupportedArchitecture)


def test_a_wrapper_of_peft_is_refused_and_works_when_merged(model):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    refuses(wrapped, "PeftModel is no .*merge_and_unload", hdlib.UnsupportedArchitecture)
    refuses(wrapped.base_model.model, "query.base_layer.weight.*adapter must be merged", hdlib.UnsupportedArchitecture)
    with torch.no_grad():
        expected = logits(wrapped)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected)
    assert logits(narrowed(merged)).shape == expected.shape


def test_an_adapter_inside_the_model_is_refused(model):
    model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    refuses(model, "query.base_layer.weight.*adapter must be merged", hdlib.UnsupportedArchitecture)


def test_quantised_weights_are_refused(model):
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
    refuses(dynamic, "differ: bert.encoder.layer.0.attention", hdlib.UnsupportedArchitecture)
    for dtype in (torch.int8, torch.uint8):
        packed = copy.deepcopy(model)
        weights = torch.zeros(24, 56, dtype=dtype)
        packed.bert.encoder.layer[0].output.dense.weight = torch.nn.Parameter(weights, requires_grad=False)
        refuses(packed, "layer.0.output.dense.weight is a .*int8, quantised")
    model.is_quantized = True  # as the quantisers of Transformers set it
    refuses(model, "the model is quantised")


def test_weights_on_the_meta_device_are_refused(model):
    refuses(copy.deepcopy(model).to("meta"), "meta device.*load the model into memory")
    refuses(cpu_offload(model), "meta device.*offloaded")


@pytest.fixture
def process_group(tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(environment)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    for name in environment:
        del os.environ[name]


def test_sharded_weights_are_refused(model, process_group):
    refuses(fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,))), "is a DTensor .*sharded")
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    refuses(wrapped, "DistributedDataParallel is no .*module of a parallel wrapper", hdlib.UnsupportedArchitecture)
    emptied = model.bert.encoder.layer[1].output.dense  # a parameter of ZeRO between two uses
    emptied.weight = torch.nn.Parameter(torch.empty(0))
    refuses(model, "output.dense.weight of shape \\(0,\\).*sharded", hdlib.UnsupportedArchitecture)


def test_ties_that_were_cut_are_refused(model):
    decoder = model.cls.predictions.decoder
    decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
    refuses(model, "decoder.weight.*Restore ties", hdlib.UnsupportedArchitecture)


def test_a_run_is_refused_before_it_starts(model, teacher, tokenizer, blocks, tmp_path):
    teacher.is_quantized = True
    config = DistillConfig(steps=2, batch_size=4, target=0.5, eval_blocks=2, precision="float32")
    with pytest.raises(ValueError, match="the model is quantised"):
        hdlib.distill(teacher, tokenizer, *blocks, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
