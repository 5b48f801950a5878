"""All state that changes during training, and the operations of one step on it."""

import warnings
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple, Self

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from .checkpoints import EARLIER, BrokenCheckpoint, load_state
from .config import DistillConfig
from .data import Blocks, micro_batches, on_device
from .discrepancy import Measures, discrepancy
from .fading import fade
from .families import HIDDEN
from .losses import DistillationLoss, LossTerms, Share
from .masks import Masks, applied
from .models import SAFE_LOADING, forward, is_encoder, no_progress_bars, random_student, student_of
from .narrowing import choose, layers_of, narrow
from .precision import cast_once
from .reconstruction import WINDOW, Compensation
from .runs import Run
from .scorers import scorer
from .widths import LAYERS, Widths, all_neurons, renumbered, source_layers, spaced_layers

LAYER_TOKENS = 512  # read to choose a layer that leaves


class Diverged(ArithmeticError):
    """A loss or gradient is not finite, or processes have different weights; the message names the step."""


class Pruned(NamedTuple):
    """The state just before a prune."""

    scores: dict[str, Tensor]  # importance of the student's neurons, by group of the teacher
    kept: dict[str, Tensor]  # their indices in the teacher, by group
    measured: Measures | None  # held-out measures, with `eval_prunes`


class Training:
    """The student and all that is trained with it; the teacher is frozen, on the same device, both in eval mode."""

    def __init__(self, teacher: PreTrainedModel, target: Widths, held_out: Blocks, config: DistillConfig, student):
        self.teacher, self.target, self.held_out, self.config = teacher, target, held_out, config
        self.student, self.cast_teacher = student, cast_once(teacher, config.precision)
        shape = Widths.of(student)
        sizes = teacher.config.hidden_size, shape.layers, shape.heads
        options = config.loss_options() | {"student_hidden_size": shape.hidden}
        self.loss = DistillationLoss(*sizes, **options).to(teacher.device)
        self.masks = Masks(student, self.loss, config.scope, config.recover) if config.under_masks else None
        self.compensation = Compensation() if config.compensate else None
        moments = {"compensation": self.compensation} if config.scorer == "reconstruction" else {}
        self.importance = scorer(config.scorer, **config.scorer_options(), **moments)
        self.optimizer = _optimizer(student, self.loss, config)
        warmup = round(config.warmup * config.steps)
        self.learning_rate = get_linear_schedule_with_warmup(self.optimizer, warmup, config.steps)
        self.step, self.seconds, self.last_seconds, self._started = 0, 0.0, 0.0, 0.0
        self.stop_requested, self._module, self._batch = False, None, {}
        self._leaving: list[int] = []  # the student's layers that leave next, in their order; the first is faded out
        self._kept = all_neurons(student) if config.initial == "teacher" else {}
        self.pool_as_teacher()

    @classmethod
    def begin(cls, teacher, target: Widths, held_out: Blocks, config: DistillConfig, resumed: Run | None) -> Self:
        """The state at step 0, or that of the newest intact checkpoint of a run."""
        for folder in reversed(resumed.checkpoints() if resumed else []):
            try:
                state = load_state(folder, teacher.device)
            except BrokenCheckpoint as error:
                tqdm.write(f"{error}: trying the checkpoint before it, or step 0 if there is none")
                continue
            if "leaving_layers" not in state:
                raise ValueError(EARLIER.format(folder))
            with no_progress_bars():
                student = type(teacher).from_pretrained(folder, dtype=torch.float32, **SAFE_LOADING).to(teacher.device)
            # A copy: how a product is rounded depends on the alignment in memory, which a file does not keep.
            training = cls(teacher, target, held_out, config, student_of(student))
            training.step, training.seconds = state["step"], state["seconds"]
            training._leaving = state["leaving_layers"]
            training._kept = {name: neurons.cpu() for name, neurons in state["kept"].items()}
            training.loss.heads = state["loss"]["heads"]  # fewer where heads are masked
            for name, part in training._parts().items():
                part.load_state_dict(state[name])
            return training
        student = student_of(teacher) if config.initial == "teacher" else random_student(teacher, target, config.seed)
        return cls(teacher, target, held_out, config, student)

    def state(self) -> dict:
        """What a checkpoint stores beside the student's weights."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        own = {"step": self.step, "seconds": self.seconds, "kept": self._kept, "leaving_layers": self._leaving}
        return own | parts

    def _parts(self) -> dict:
        names = ("loss", "importance", "optimizer", "learning_rate", "masks", "compensation")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def start_step(self, step: int) -> None:
        self.step, self._started = step, perf_counter()
        if self.compensation is not None:
            self.compensation.start_step()

    def stop_clock(self) -> None:
        self.last_seconds = perf_counter() - self._started
        self.seconds += self.last_seconds

    def forward_backward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the gradient of the mean loss over the batch of all processes. Returns the loss terms of that batch.

        With several processes, "stop_requested" is the number of those whose stop was requested.
        """
        sums, processes = Counter(), PartialState().num_processes
        label_count = int(batch.get("label_count", 0))
        parts = [*micro_batches(batch, self.config.micro_batch_size)]
        self._module, self._batch = self._module or self._one_module(parts[0][0]), parts[0][0]
        for number, (part, share) in enumerate(parts, 1):
            accumulates = processes > 1 and number < len(parts)
            recording = self._recording(part.get("attention_mask"))
            with applied(self.masks), recording, self._module.no_sync() if accumulates else nullcontext():
                terms = self._module(part, labels_in_batch=label_count, share=share)
                (processes * terms.total).backward()  # the engine averages over processes; shares add up
            sums.update(terms.named())
        if processes > 1:
            sums["stop_requested"] = terms.total.new_full((), self.stop_requested)
            sums = dict(zip(sums, reduce(torch.stack([*sums.values()]), "sum"), strict=True))
        if self.masks is not None:
            self.masks.mask_gradients()
        if "labels" in batch and not label_count:  # the mean over no label is not a number
            over_labels = {"mlm"} if self.loss.positions == "all" else {"mlm", "prediction"}
            sums = {name: value for name, value in sums.items() if name not in over_labels}
        return dict(sums)

    def _recording(self, attention_mask: Tensor | None) -> AbstractContextManager:
        """Moments for the compensation of a prune that is due within a few steps."""
        due = self.compensation and self.config.widths_at(self.step + WINDOW, self.teacher, self.target) != self.widths
        return self.compensation.recording(self.student, attention_mask) if due else nullcontext()

    def _one_module(self, tensors: dict[str, Tensor]) -> nn.Module:
        """Student and loss as one module, whose forward is `_losses`; in several processes PyTorch's engine around it.

        The engine broadcasts the weights of the first process, and averages gradients during the backward pass. It
        must know the parameters without gradient: those without optimiser state, before the first step by a trial.
        """
        module = nn.ModuleDict({"student": self.student, "loss": self.loss})
        module.forward = self._losses
        if PartialState().num_processes == 1:
            return module
        if not self.optimizer.state:
            module(tensors, labels_in_batch=1, share=Share()).total.backward()
        named = [*module.named_parameters(remove_duplicate=False)]  # a tied parameter has several names
        idle = [name for name, each in named if each.grad is None and each not in self.optimizer.state]
        self.optimizer.zero_grad()
        idle += [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, idle)
        return DistributedDataParallel(module, bucket_cap_mb=25)

    def _losses(self, tensors: dict[str, Tensor], **part) -> LossTerms:
        """Both models on the same tokens, from the CPU, (b, S) each; the heads run at the loss positions only."""
        device = self.teacher.device
        if "labels" in tensors:
            tensors = tensors | {"loss_positions": self.loss.loss_positions(tensors["labels"])}
        tensors = dict(zip(tensors, on_device(device, *tensors.values()), strict=True))
        mask, positions = tensors.get("attention_mask"), tensors.get("loss_positions")
        read = {"input_ids": tensors["input_ids"], "positions": positions, "attention_mask": mask, "in_pieces": True}
        part |= {"attention_mask": mask, "loss_positions": positions}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            with torch.no_grad():
                compares = self.loss.compares
                teacher_outputs = forward(self.cast_teacher, **read, layers=self.layers) if compares else None
            outputs = forward(self.student, **read)
            terms = self.loss(outputs, teacher_outputs, tensors.get("labels"), **part)
            if self.is_copy:
                terms = terms._replace(total=terms.total + part["share"].blocks * self._probe(outputs.embeddings))
            return terms

    @property
    def is_copy(self) -> bool:
        """Whether the student is a sentence encoder before its first prune: no label moves it off its teacher."""
        whole = self.config.initial == "teacher" and self.widths == Widths.of(self.teacher)
        return whole and not self._leaving and is_encoder(self.teacher)

    def _probe(self, embeddings: Tensor) -> Tensor:
        """0.0, with the gradient of embeddings (B, E) along a random direction, since that of a copy's loss is 0.

        It is the same for all sentences of a step, so that scores do not depend on how a batch is divided.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        direction = nn.functional.normalize(torch.randn(embeddings.shape[-1], generator=generator), dim=-1)
        along = (embeddings @ direction.to(embeddings)).mean()
        return along - along.detach()

    def score(self) -> None:
        """Add weights and gradients to the importance of the neurons. The gradient of a probe is for scores only."""
        self.importance.update(self.student)
        if self.is_copy:
            self.optimizer.zero_grad()

    def fade(self) -> None:
        """Scale the outputs of the layer that leaves next by what this step leaves of the depth beyond the others."""
        others = self.widths.layers - 1
        depths = (self.config.depth_at(step, self.teacher, self.target) for step in (self.step - 1, self.step))
        before, now = (min(max(depth - others, 0.0), 1.0) for depth in depths)
        if now < 1:
            self.choose_leaving(1)
            fade(self.student, self._leaving[0], now / before if before else 0.0)

    @torch.no_grad()
    def choose_leaving(self, count: int) -> None:
        """Choose the next of the `count` layers that leave: each time the one that the predictions need least.

        Every layer but the first is left out in turn, on tokens of the last batch. The scores of neurons, first-order
        or local, say little of so large a change (ledger, "Fewer layers").
        """
        if len(self._leaving) >= count:
            return
        layers = self.student.get_submodule(layers_of(self.student))
        weights = deepcopy(layers.state_dict())
        for layer in self._leaving:
            fade(self.student, layer, 0.0)
        while len(self._leaving) < count:
            losses = {}
            for layer in {*range(1, len(layers))} - {*self._leaving}:
                before = deepcopy(layers[layer].state_dict())
                fade(self.student, layer, 0.0)
                losses[layer] = self._prediction_loss()
                layers[layer].load_state_dict(before)
            self._leaving.append(min(losses, key=losses.get))
            fade(self.student, self._leaving[-1], 0.0)
        layers.load_state_dict(weights)

    def _prediction_loss(self) -> float:
        """The prediction term on some tokens of the last batch; without it, mlm, which is noisier, or the total."""
        blocks = -(-LAYER_TOKENS // self._batch["input_ids"].shape[1])
        some = {name: each[:blocks] for name, each in self._batch.items()}
        terms = self._losses(some, labels_in_batch=1, share=Share())
        compared = (terms.prediction, terms.similarity, terms.mlm, terms.total)
        return float(reduce(next(term for term in compared if term is not None), "sum"))

    def prune(self, widths: Widths) -> Pruned | None:
        """Keep the neurons and layers of highest importance, as many as `widths` has. None if not due.

        Under masks, neurons are masked instead. A layer that has been faded leaves first.
        """
        due = widths != self.widths if self.masks is None else self.config.chooses_at(self.step)
        if not due or not widths.fits_in(self.widths):
            return None
        self.synchronise()
        measured = self.discrepancy() if self.config.eval_prunes else None
        scores = self._scores()
        pruned = Pruned(renumbered(scores, dict(enumerate(self.layers))), self.kept, measured)
        if self.masks is not None:
            self.masks.choose(widths, scores)
        else:
            self._narrow(widths, scores)
        return pruned

    def _scores(self) -> dict[str, Tensor]:
        """The importance of the student's neurons, by group: in all processes that of the first."""
        scores = {name: score.to(self.teacher.device) for name, score in self.importance.scores().items()}
        if not any(score.any() for score in scores.values()):
            equal = "all scores are 0, because the student still equals its teacher, so the first neurons are kept"
            warnings.warn(f"step {self.step}: {equal}; give mlm a weight, or use scorer='magnitude'", stacklevel=2)
        return broadcast(scores)

    def _narrow(self, widths: Widths, scores: dict[str, Tensor]) -> None:
        """Remove neurons and layers from the student and from all that is trained with it."""
        shape = self.widths
        self.choose_leaving(shape.layers - widths.layers)
        gone = tuple(f"layer.{layer}." for layer in self._leaving[: shape.layers - widths.layers])
        scores = {name: score - score.max() - 1 if name.startswith(gone) else score for name, score in scores.items()}
        if self.compensation is not None:
            self.compensation.apply(self.student, self.loss, choose(scores, shape, widths, source_layers(self.student)))
        kept = narrow(self.student, widths, scores, self.optimizer)
        self.importance.narrow(kept)
        self.loss.narrow(kept, self.optimizer)
        if self._kept:
            names = renumbered(kept, {layer: self.layers[layer] for layer in kept[LAYERS].tolist()})
            self._kept = {name: self._kept[name][indices.cpu()] for name, indices in names.items()}
        if gone:
            self._leaving = []
        self._module = None
        self.pool_as_teacher()

    def synchronise(self) -> None:
        """Share out the moments over all processes. Raise Diverged in all if the weights of one are not the first's."""
        if PartialState().num_processes == 1:
            return
        if self.compensation is not None:
            self.compensation.share()
        bits = torch.stack([parameter.detach().view(torch.int32).sum() for parameter in self.parameters])
        sums = gather(bits.sum()[None]).tolist()  # (processes,)
        if different := [process for process, each in enumerate(sums) if each != sums[0]]:
            raise Diverged(
                f"step {self.step}: the weights of process {different[0]} differ from those of process 0, so that each "
                "trains another model; continue from the last checkpoint with resume=True"
            )

    def pool_as_teacher(self) -> None:
        """Let a sentence encoder pool as its teacher does, and project into the teacher's space as the loss does."""
        if is_encoder(self.teacher):
            projection = self.loss.hidden_projections[-1]
            if len(projection) > self.student.config.hidden_size:  # masked neurons were removed
                projection = projection[self.masks.kept[HIDDEN].to(projection.device)]
            self.student.sentence_pooling = replace(self.teacher.sentence_pooling, projection=projection)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Indices of the teacher's neurons and heads that the student has, by group; empty for a random student."""
        return self._kept if self.masks is None else self.masks.kept

    @property
    def layers(self) -> list[int]:
        """The teacher's layer of each layer of the student; evenly spaced ones for a student of random weights."""
        depths = self.teacher.config.num_hidden_layers, self.student.config.num_hidden_layers
        return self.kept[LAYERS].tolist() if self.kept else spaced_layers(*depths)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters of the optimiser."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def widths(self) -> Widths:
        return Widths.of(self.student) if self.masks is None else self.masks.widths

    @property
    def num_parameters(self) -> int:
        """Parameters of the student, without masked ones."""
        return sum(p.numel() for p in self.student.parameters()) if self.masks is None else self.masks.num_parameters()

    def discrepancy(self) -> Measures:
        """The held-out measures of the student; their time does not count as the step's."""
        started = perf_counter()
        neurons = None if self.masks is None else self.masks.kept.get(HIDDEN)
        with applied(self.masks):
            student = {"neurons": neurons, "heads": self.loss.heads, "layers": self.layers}
            measured = discrepancy(self.student, self.teacher, self.held_out, **student)
        self._started += perf_counter() - started
        return measured


def _optimizer(student: PreTrainedModel, loss: DistillationLoss, config: DistillConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and the projections, which it would pull off the identity."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() == 1] + list(loss.parameters())
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps, fused=True)
