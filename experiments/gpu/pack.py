"""Make the folder that a session on a GPU reads: `python -m experiments.gpu.pack TEACHER TEXT... --validation TEXT`.

The folder holds the teacher in bfloat16 with its tokenizer, and tokens of the text. For a language model they are
blocks of 128 tokens: `train` (N, S), uint16, and the held-out `validation` with its `labels`, int32. For a sentence
encoder they are sentences one after the other, uint16, with their lengths: `train`, `train_lengths`, and the same for
`validation`. The last line that is printed is the command to run where the GPU is.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hdlib import load_teacher
from hdlib.checkpoints import save_folder
from hdlib.data import Blocks, Sentences
from hdlib.models import is_encoder

LENGTH = 128  # S, tokens a block
HELD_OUT = 1024  # blocks or sentences
FOLDER, TOKENS = Path("runs/gpu_pack"), "tokens.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu.pack", description=__doc__.split(":")[0])
    parser.add_argument("teacher", help="a folder with a masked language model or a sentence encoder")
    parser.add_argument("text", nargs="+", help="files to train on, as load_corpus reads them")
    parser.add_argument(
        "--validation", required=True, help='a held-out file with "validation", "valid", "dev" or "test" in its name'
    )
    parser.add_argument("--megabytes", type=float, default=22, help="of training tokens at most (default: 22)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"to make (default: {FOLDER})")
    arguments = parser.parse_args()
    teacher, tokenizer = load_teacher(arguments.teacher)
    if len(tokenizer) > 2**16:
        parser.error(f"the tokenizer has {len(tokenizer)} entries, and tokens are stored in 16 bits: at most {2**16}")
    text = [*arguments.text, arguments.validation]
    tokens = (_sentences if is_encoder(teacher) else _blocks)(text, tokenizer, int(arguments.megabytes * 5e5))
    save_folder(arguments.folder, deepcopy(teacher).to(torch.bfloat16), tokenizer)
    save_file(tokens, arguments.folder / TOKENS)
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    print(f"{arguments.folder}: {tokens['train'].size} tokens to train on, {size / 1e6:.1f} MB in all")
    print(f"python -m experiments.gpu --pack {arguments.folder} --minutes 8")


def _blocks(text: list[str], tokenizer, most: int) -> dict[str, np.ndarray]:
    from hdlib import load_corpus  # needs `datasets`, which the machine with the GPU has not

    train, held_out = load_corpus(text, tokenizer, LENGTH, validation_blocks=HELD_OUT)
    blocks = {"validation": np.array(held_out["input_ids"], np.int32), "labels": np.array(held_out["labels"], np.int32)}
    return blocks | {"train": np.array(train[: most // LENGTH]["input_ids"], np.uint16)}


def _sentences(text: list[str], tokenizer, most: int) -> dict[str, np.ndarray]:
    from hdlib import load_sentences

    train, held_out = load_sentences(text, tokenizer, LENGTH, validation_sentences=HELD_OUT)
    train = train.select(torch.arange(int((train.lengths.cumsum(0) <= most).sum())))
    parts = {"train": train, "validation": held_out}
    tokens = {name: part.token_ids.astype(np.uint16) for name, part in parts.items()}
    return tokens | {f"{name}_lengths": part.lengths.numpy().astype(np.int32) for name, part in parts.items()}


def load_pack(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Blocks, Blocks]:
    """Teacher, tokenizer, training part and held-out part."""
    teacher, tokenizer = load_teacher(folder)
    tokens = load_file(Path(folder) / TOKENS)
    if is_encoder(teacher):
        train, held_out = (
            Sentences(tokens[name], tokens[f"{name}_lengths"], tokenizer.pad_token_id)
            for name in ("train", "validation")
        )
        return teacher, tokenizer, train, held_out
    return teacher, tokenizer, Blocks(tokens["train"]), Blocks(tokens["validation"], tokens["labels"])


if __name__ == "__main__":
    main()
