"""Model folders that are written completely or not at all; checkpoints that detect damage.

A checkpoint is a model folder with the training state (training.pt) and the size and SHA-256 of each file (files.json).
Loading never executes code: weights are safetensors, and the training state is read with `weights_only=True`.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from .models import no_progress_bars
from .sentences import write_pooling

STATE, FILES = "training.pt", "files.json"
EARLIER = "{} is a checkpoint of an earlier hdlib: resume it with that version, or name another folder"


class BrokenCheckpoint(ValueError):
    """A file of a checkpoint is missing, damaged or unsafe to load. The message names the file."""


def save_folder(folder: Path, model, tokenizer, state: dict | None = None, card: str | None = None) -> None:
    """Write a model folder (with `state`: a checkpoint) under a temporary name, flush it to the disk, then rename it.

    That of a sentence encoder has the format of sentence-transformers.

    Raises OSError if that fails, for example on a full disk. An older `folder` stays; the temporary one is removed.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with no_progress_bars():
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if pooling := getattr(model, "sentence_pooling", None):
            write_pooling(temporary, model, pooling, tokenizer.model_max_length)
        if card is not None:
            (temporary / "README.md").write_text(card)
        if state is not None:
            with (temporary / STATE).open("wb") as file:
                torch.save(state, file)
            (temporary / FILES).write_text(json.dumps(_fingerprints(temporary), indent=2) + "\n")
        _flush(*temporary.rglob("*"), temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        _flush(folder.parent)
    except Exception as error:
        # tokenizers, torch and safetensors raise these on a full disk; torch gives the reason in the context only.
        if type(error) in (Exception, RuntimeError, SafetensorError):
            raise OSError(str(error.__context__ or error)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_state(folder: Path, device: torch.device | str = "cpu") -> dict:
    """Check every file of a checkpoint, then read its training state.

    Raises BrokenCheckpoint for a missing, damaged or unsafe file, ValueError for a checkpoint of hdlib 0.1.
    """
    try:
        expected = json.loads((folder / FILES).read_text())
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{folder / FILES} cannot be read ({error})") from error
    found = _fingerprints(folder)
    for name, written in expected.items():
        if found.get(name) != written:
            raise BrokenCheckpoint(f"{folder / name} is missing or damaged: found {found.get(name)}, not {written}")
    if STATE not in expected:
        raise ValueError(EARLIER.format(folder))
    try:
        return torch.load(folder / STATE, map_location=device, weights_only=True)
    except UnpicklingError as error:
        raise BrokenCheckpoint(f"{folder / STATE} contains a pickled object, which could execute code") from error


def _fingerprints(folder: Path) -> dict[str, dict]:
    fingerprints = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        fingerprints[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return fingerprints


def _flush(*paths: Path) -> None:
    """Wait until files and folders are on the disk, so that they survive a crash of the machine."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
