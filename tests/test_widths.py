"""Shapes: the published ones, the nearest possible ones, every task head; messages for impossible shapes."""

import copy

import pytest
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

import hdlib
from hdlib import Widths

from conftest import random_batch, random_bert
from models import KINDS, random_model
from reference import zeroed


@pytest.mark.parametrize(
    "hidden, ffn, heads, millions",  # of HomoBERT-base, -small, -xsmall and -tiny: the sizes as published
    [(576, 2304, 9, 65.0), (256, 1024, 4, 17.3), (240, 960, 4, 15.6), (224, 896, 4, 14.1)],
)
def test_the_published_shapes_and_sizes(hidden, ffn, heads, millions):
    with torch.device("meta"):
        base = BertModel(BertConfig())
        widths = Widths.at(base, hidden / 768)
        assert widths == Widths(hidden, ffn, hidden // heads, heads, 12)
        narrow = BertModel(BertConfig(hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads))
    layers_and_tokens = sum(p.numel() for n, p in narrow.named_parameters() if "layer" in n or "word" in n)
    assert layers_and_tokens / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_nearest_possible_shape():
    with torch.device("meta"):
        base = BertModel(BertConfig())
        small = BertModel(BertConfig(hidden_size=180, num_attention_heads=12))
    assert Widths.at(small, 62 / 180).head_dim == 15, "4 heads of 15.5 dimensions would be wider than the model's"
    assert Widths.at(base, 0.29) == Widths(224, 891, 56, 4, 12)
    assert Widths.at(base, 0.29, multiple_of=16) == Widths(224, 896, 56, 4, 12)
    assert Widths.at(base, 0.7, multiple_of=16) == Widths(528, 2144, 48, 11, 12)
    assert Widths.at(base, 0.7, multiple_of=64) == Widths(512, 2176, 64, 8, 12)
    assert Widths.at(base, 1.0) == Widths.of(base) == Widths(768, 3072, 64, 12, 12)
    assert Widths.at(base, 0.001) == Widths(1, 3, 1, 1, 12)


@pytest.mark.parametrize(
    "given, full",
    [
        (Widths(hidden=12), Widths(12, 56, 3, 4, 2)),
        (Widths(ffn=9), Widths(24, 9, 6, 4, 2)),
        (Widths(heads=2), Widths(12, 56, 6, 2, 2)),
        (Widths(head_dim=2), Widths(8, 56, 2, 4, 2)),
        (Widths(hidden=12, head_dim=6), Widths(12, 56, 6, 2, 2)),
        (Widths(layers=1), Widths(24, 56, 6, 4, 1)),
        (Widths(), Widths(24, 56, 6, 4, 2)),
    ],
)
def test_missing_widths_follow(given, full):
    model = random_bert(heads=4, head_dim=6, ffn=56)
    assert given.resolved(model) == full
    hdlib.narrow(model, given)
    assert Widths.of(model) == full


@pytest.mark.parametrize("multiple_of", [1, 8, 16, 100])
def test_the_path_between_two_shapes(multiple_of):
    with torch.device("meta"):
        base = BertModel(BertConfig())
    wide, narrow = Widths(768, 3072, 64, 12, 12), Widths(224, 891, 56, 4, 5)
    assert wide.between(narrow, 0.0, base) == wide and wide.between(narrow, 1.0, base) == narrow
    path = [wide.between(narrow, i / 100, base, multiple_of) for i in range(101)]
    for shape in path[1:-1]:
        assert all(width % multiple_of == 0 or width in (768, 3072) for width in (shape.hidden, shape.ffn))
    assert len(set(path)) > 3
    for name in vars(narrow):
        widths = [getattr(shape, name) for shape in path]
        assert widths == sorted(widths, reverse=True)
    assert all(shape.hidden == shape.heads * shape.head_dim for shape in path)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("ratio", [0.71, 0.33])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_the_path_of_every_family_consists_of_possible_shapes(name, ratio, multiple_of):
    model = random_model(name, heads=12, head_dim=8, ffn=90, hidden=12 * 9, groups=3)
    wide, narrow = Widths.of(model), Widths.at(model, ratio)
    path = [wide.between(narrow, i / 40, model, multiple_of) for i in range(41)]
    assert path[0] == wide and path[-1] == narrow != wide
    for shape in path:
        assert shape.resolved(model) == shape and narrow.fits_in(shape) and shape.fits_in(wide)
    taken = [wide]  # as in the loop, which skips a shape that does not fit in the one before
    for shape in path:
        taken += [shape] if shape.fits_in(taken[-1]) and shape != taken[-1] else []
    assert taken[-1] == narrow and len(taken) > 4


ARCHITECTURES = {kind.config.model_type: name for name, kind in reversed(KINDS.items())}
TASKS = {
    "encoder": transformers.MODEL_MAPPING,
    "classification": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token classification": transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "question answering": transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "pre-training": transformers.MODEL_FOR_PRETRAINING_MAPPING,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_head_narrows_and_loads(architecture, task, tmp_path):
    """The bare encoder and every task head: equal to the masked model, and opened by the stock class."""
    config = random_model(ARCHITECTURES[architecture]).config
    if type(config) not in TASKS[task]:
        pytest.skip(f"Transformers has no {architecture} for {task}")
    config.num_labels, config.pad_token_id = (2 if task == "question answering" else 3), 0
    model = TASKS[task][type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    input_ids, _ = random_batch()
    student = copy.deepcopy(model)
    kept = hdlib.narrow(student, Widths.at(model, 0.5))
    student.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad(), zeroed(model, kept):
        outputs = [each(input_ids)[0] for each in (student, loaded.eval(), model)]
    torch.testing.assert_close(outputs[1], outputs[0])
    wide = outputs[2]
    torch.testing.assert_close(
        outputs[0], wide[..., kept["hidden"]] if task == "encoder" and "hidden" in kept else wide
    )


def test_a_classifier_over_an_embedding_width_of_its_own_narrows():
    config = random_model("opt, projected").config
    model = transformers.OPTForSequenceClassification(config).eval()
    hdlib.narrow(model, Widths.at(model, 0.5))
    assert model.score.weight.shape == (2, config.word_embed_proj_dim) and config.word_embed_proj_dim == 10
    assert model(random_batch(size=1)[0]).logits.shape == (1, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_unusual_berts_narrow_and_load(tied, tmp_path):
    config = random_bert().config
    config.update({"tie_word_embeddings": tied, "type_vocab_size": 1, "hidden_act": "relu"})
    for kind in (BertForPreTraining, BertForMaskedLM):
        model = kind(config).eval()
        hdlib.narrow(model, Widths(hidden=8, ffn=11))
        model.save_pretrained(tmp_path / kind.__name__)
        loaded, report = kind.from_pretrained(tmp_path / kind.__name__, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        input_ids, _ = random_batch()
        for got, expected in zip(loaded.eval()(input_ids).to_tuple(), model(input_ids).to_tuple(), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "name, widths, words",
    [
        (
            "modernbert",
            Widths(head_dim=3),
            "head_dim=3 is impossible for 'modernbert': head_dim stays 6.*remove whole heads",
        ),
        (
            "modernbert",
            Widths(hidden=14),
            "hidden=14 with .*head_dim=6 is impossible.*hidden is heads x head_dim; take hidden=12 or 18",
        ),
        ("qwen3", Widths(head_dim=4), "head_dim stays 6.*remove whole heads"),
        ("qwen3", Widths(heads=3), "heads=3: 2 query heads share a key/value head.*a multiple of 2"),
        ("llama", Widths(hidden=27), "hidden is a multiple of heads; take hidden=24 or 28"),
        ("gemma3", Widths(hidden=14), "hidden=14 is impossible for 'gemma3_text': hidden stays 28, .*sqrt"),
        ("electra", Widths(hidden=12), "hidden=12 is the width of the embeddings.*no projection"),
        ("deberta-v2", Widths(hidden=12), "hidden=12 is the width of the embeddings.*no projection"),
        ("opt", Widths(hidden=12), "hidden=12 is the width of the embeddings.*no projection"),
    ],
)
def test_what_a_family_cannot_become(name, widths, words):
    embeddings = {"electra": "embedding_size", "deberta-v2": "embedding_size", "opt": "word_embed_proj_dim"}
    model = random_model(name, **({embeddings[name]: 12} if name in embeddings else {}))
    with pytest.raises(ValueError, match=words):
        hdlib.narrow(model, widths)


@pytest.mark.parametrize("name, option", [("electra", "embedding_size"), ("opt", "word_embed_proj_dim")])
def test_the_width_of_the_embeddings_is_skipped(name, option):
    """If a student's hidden width equalled that of its embeddings, it would be loaded without their projection."""
    model = random_model(name, **{option: 12})
    assert Widths.at(model, 0.5) == Widths(hidden=10, ffn=28, head_dim=5, heads=2, layers=2)
    least = Widths(8, 17, heads=4).resolved(model)
    path = [Widths.of(model).between(least, i / 40, model) for i in range(41)]
    assert {shape.hidden for shape in path} == {24, 20, 16, 8}
    one_head = Widths.at(model, 0.25)
    path = [Widths.of(model).between(one_head, i / 40, model) for i in range(41)]
    assert {(shape.heads, shape.head_dim) for shape in path} == {(4, 6), (3, 6), (1, 6)}
