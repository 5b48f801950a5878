"""Model folders that are whole or not there at all, and checkpoints that can tell whether they still are.

    config.json, model.safetensors, tokenizer files    what stock classes open
    training.safetensors, training.json                the training state: its tensors, and all that is none
    files.json                                         size and SHA-256 of each; written last

A folder is written under a temporary name, on the disk for good before it gets its own. Nothing in it is pickled:
opening one runs nobody's code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .models import no_progress_bars

TENSORS, REST, FILES = "training.safetensors", "training.json", "files.json"


class BrokenCheckpoint(ValueError):
    """A checkpoint of which something is missing or not what was written; the message names the file."""


def save_folder(folder: Path, model, tokenizer, state: dict | None = None, card: str | None = None) -> None:
    """Write a model folder; with a training state, a checkpoint.

    Raises:
        OSError: it could not be written, for want of room for instance. What had the folder's name stays, and nothing
            of the attempt does.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with no_progress_bars():
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card)
        if state is not None:
            _save_state(temporary, state)
            (temporary / FILES).write_text(json.dumps(_fingerprints(temporary), indent=2) + "\n")
        _to_disk(*temporary.rglob("*"), temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        _to_disk(folder.parent)
    except Exception as error:
        if type(error) in (Exception, SafetensorError):  # what libraries written in Rust make of a full disk
            raise OSError(str(error)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_state(folder: Path, device: torch.device | str = "cpu") -> dict:
    """The training state of a checkpoint. Raises BrokenCheckpoint unless every file of it is as it was written."""
    _check_whole(folder)
    tensors = load_file(folder / TENSORS, device=str(device))
    return _joined(json.loads((folder / REST).read_text()), tensors)


def _save_state(folder: Path, state: dict) -> None:
    tensors: dict[str, Tensor] = {}
    rest = _parted(state, "", tensors)
    save_file(tensors, folder / TENSORS)
    (folder / REST).write_text(json.dumps(rest, allow_nan=False))


def _parted(value, name: str, tensors: dict[str, Tensor]):
    """What JSON can hold of a state, with the tensors put aside under the names of their places."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone().contiguous()  # one of a kind: a file holds no memory that is shared
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs, since keys may be numbers
        return {"pairs": [[key, _parted(part, f"{name}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [_parted(part, f"{name}/{place}", tensors) for place, part in enumerate(value)]
    return value


def _joined(rest, tensors: dict[str, Tensor]):
    if isinstance(rest, list):
        return [_joined(part, tensors) for part in rest]
    if isinstance(rest, dict):
        if "tensor" in rest:
            return tensors[rest["tensor"]]
        return {key: _joined(part, tensors) for key, part in rest["pairs"]}
    return rest


def _fingerprints(folder: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def _check_whole(folder: Path) -> None:
    try:
        expected = json.loads((folder / FILES).read_text())
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{folder / FILES} cannot be read ({error})") from error
    found = _fingerprints(folder)
    for name, written in expected.items():
        if name not in found:
            raise BrokenCheckpoint(f"{folder / name} is missing")
        size, whole = found[name]["bytes"], written["bytes"]
        if size != whole:
            raise BrokenCheckpoint(f"{folder / name} has {size} of {whole} bytes")
        if found[name] != written:
            raise BrokenCheckpoint(f"{folder / name} is not what was written")


def _to_disk(*paths: Path) -> None:
    """Wait until files and folders are on the disk, so that a crash of the machine leaves them whole."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
