"""What a prune saw and did: the importance of every neuron and which of them stayed, in the teacher's numbering."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

RECORDED = 100  # prunes of a run, about; of those between two only the widths are known
IMPORTANCE, STAYS = "importance.", "stays."


@dataclass(frozen=True)
class Prune:
    """One prune of a run, or the last of several that are recorded as one."""

    step: int
    importance: Mapping[str, Tensor]  # by group (N,), at least 0; not a number where the neuron had gone before
    stays: Mapping[str, Tensor]  # by group (N,), whether the student still has the neuron afterwards

    @classmethod
    def of(cls, step: int, sizes: Mapping[str, int], scores, before, after) -> Prune:
        """From what the loop holds.

        Args:
            sizes: neurons of the teacher, by group.
            scores: by group, of the neurons that were there before the prune (under masks: of all).
            before, after: which of the teacher's neurons these are, by group.
        """
        importance, stays = {}, {}
        for name, score in scores.items():
            there = before[name].cpu() if len(score) < sizes[name] else torch.arange(sizes[name])
            importance[name] = torch.full((sizes[name],), torch.nan).index_copy(0, there, score.float().cpu())
            stays[name] = torch.zeros(sizes[name], dtype=torch.bool).index_fill(0, after[name].cpu(), True)
        return cls(step, importance, stays)

    @classmethod
    def load(cls, path: Path) -> Prune:
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged and cannot be read: {error}") from error

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}

        importance = {name: values.float() for name, values in part(IMPORTANCE).items()}
        return cls(step_of(path), importance, part(STAYS))

    def save(self, folder: Path) -> None:
        """To `step_N.safetensors`; importances as bfloat16, three bytes a neuron in all."""
        folder.mkdir(exist_ok=True)
        tensors = {IMPORTANCE + name: values.bfloat16() for name, values in self.importance.items()}
        tensors |= {STAYS + name: values for name, values in self.stays.items()}
        path = folder / f"step_{self.step:08d}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        os.replace(temporary, path)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
