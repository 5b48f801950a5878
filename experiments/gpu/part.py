"""One part of a session on a GPU, in a process of its own: items one after the other, the results in one JSON file.

The file is written again after every item, so that a part that is killed keeps what it has. An item that fails is
recorded with its traceback. A part that is started a second time skips the items in its file.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from time import monotonic

import torch
from transformers.utils import logging

from hdlib.data import sample
from hdlib.runs import write_whole

from .pack import load_pack


@dataclass(frozen=True)
class Plan:
    """What a part is given."""

    name: str  # of the module in this folder whose `run` does the work, and of the file of results
    pack: str  # the folder that experiments.gpu.pack made
    out: str  # the folder of the results
    until: float  # on the clock `monotonic`, which all processes of a machine share; later no item begins
    dry: bool = False  # toy shapes
    module: str = ""  # of the work, where it is not `name`


class Part:
    """The results of one part, and the time that is left for it."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.path = Path(plan.out) / f"{plan.name}.json"
        self.items: dict[str, dict] = json.loads(self.path.read_text())["items"] if self.path.exists() else {}
        self.not_reached: list[str] = []
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def data(self) -> tuple:
        """Teacher, tokenizer, training part and held-out part of the pack; in a dry session little is held out."""
        teacher, tokenizer, train, held_out = load_pack(self.plan.pack)
        return teacher, tokenizer, train, sample(held_out, 4) if self.plan.dry else held_out

    @property
    def seconds_left(self) -> float:
        return self.plan.until - monotonic()

    def item(self, name: str, measure: Callable[[], dict]) -> None:
        """Run `measure` and write what it returns, unless the item is there already or the time is over."""
        if name in self.items:
            return
        if self.seconds_left <= 0:
            self.not_reached.append(name)
            return self.write()
        self.items[name] = {"error": "the process ended while this item ran"}
        self.write()
        started = monotonic()
        try:
            value = measure()
            json.dumps(value, allow_nan=False)
            self.items[name] = {"value": value}
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            self.items[name] = {"error": message[:1000], "traceback": traceback.format_exc()[-6000:]}
        self.items[name]["seconds"] = round(monotonic() - started, 2)
        self.write()
        print(f"{self.plan.name}: {name}: {self.items[name].get('error', 'done')[:200]}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # raises after an error of the device; a new process then runs the other items
            torch.cuda.empty_cache()

    def write(self) -> None:
        text = json.dumps({"plan": asdict(self.plan), "items": self.items, "not_reached": self.not_reached}, indent=1)
        write_whole(self.path, text + "\n")


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    logging.disable_progress_bar()
    import_module(f"{__package__}.{plan.module or plan.name}").run(Part(plan))


if __name__ == "__main__":
    main()
