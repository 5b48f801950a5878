"""Make the folder that a session on a GPU reads: `python -m experiments.gpu.pack TEACHER TEXT... --validation TEXT`.

The folder holds the teacher in bfloat16 with its tokenizer, and blocks of 128 tokens in `blocks.safetensors`: `train`
(N, S), uint16, and the held-out `validation` with its `labels`, int32. The last line that is printed is the command to
run where the GPU is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hdlib import load_teacher
from hdlib.data import Blocks

LENGTH = 128  # S, tokens a block
HELD_OUT = 1024  # blocks
FOLDER, BLOCKS = Path("runs/gpu_pack"), "blocks.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu.pack", description=__doc__.split(":")[0])
    parser.add_argument("teacher", help="a folder with a masked language model and its tokenizer")
    parser.add_argument("text", nargs="+", help="files to train on, as load_corpus reads them")
    parser.add_argument(
        "--validation", required=True, help='a held-out file with "validation", "valid", "dev" or "test" in its name'
    )
    parser.add_argument("--megabytes", type=float, default=22, help="of training blocks at most (default: 22)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"to make (default: {FOLDER})")
    arguments = parser.parse_args()
    from hdlib import load_corpus  # needs `datasets`, which the machine with the GPU has not

    teacher, tokenizer = load_teacher(arguments.teacher)
    if len(tokenizer) > 2**16:
        parser.error(f"the tokenizer has {len(tokenizer)} entries, and blocks are stored in 16 bits: at most {2**16}")
    train, held_out = load_corpus(
        [*arguments.text, arguments.validation], tokenizer, LENGTH, validation_blocks=HELD_OUT
    )
    train = train[: int(arguments.megabytes * 1e6) // (2 * LENGTH)]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    teacher.to(torch.bfloat16).save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)
    blocks = {"train": np.array(train["input_ids"], dtype=np.uint16)}
    blocks |= {
        "validation": np.array(held_out["input_ids"], np.int32),
        "labels": np.array(held_out["labels"], np.int32),
    }
    save_file(blocks, arguments.folder / BLOCKS)
    size = sum(path.stat().st_size for path in arguments.folder.iterdir())
    print(f"{arguments.folder}: {len(blocks['train'])} blocks to train on, {size / 1e6:.1f} MB in all")
    print(f"python -m experiments.gpu --pack {arguments.folder} --minutes 8")


def load_pack(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Blocks, Blocks]:
    """Teacher, tokenizer, training blocks and held-out blocks."""
    blocks = load_file(Path(folder) / BLOCKS)
    return *load_teacher(folder), Blocks(blocks["train"]), Blocks(blocks["validation"], blocks["labels"])


if __name__ == "__main__":
    main()
