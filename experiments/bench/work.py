"""The step of distillation that the tables measure, on random models of a real shape."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

import hdlib
from hdlib.losses import IGNORED, TERMS, DistillationLoss, LossTerms
from hdlib.models import base_model, forward, head, recording, student_of
from hdlib.precision import cast_once, recompute_casts

SHAPES = {
    "base": {},  # BERT-base: 12 layers of 768 / 3072, 12 heads
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96},  # for tests
}


@dataclass(frozen=True)
class Setting:
    """Model shape, tokens a step, precision and device of a measurement."""

    shape: str = "base"
    batch_size: int = 8
    length: int = 128
    precision: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    turns: int = 5

    def __str__(self) -> str:
        return f"{self.shape}, {self.batch_size} x {self.length} tokens, {self.precision}, {self.device.type}"

    def teacher(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return BertForMaskedLM(BertConfig(**SHAPES[self.shape])).eval().requires_grad_(False).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def all_heads(model: PreTrainedModel, ratio: float) -> hdlib.Widths:
    """A shape in which every head is narrower."""
    wide = hdlib.Widths.of(model)
    return hdlib.Widths(ffn=round(ratio * wide.ffn), head_dim=max(1, round(ratio * wide.head_dim)))


class Work:
    """A teacher, a student of a kept fraction of its widths, and a batch with 15 % of its tokens masked."""

    def __init__(self, setting: Setting, ratio: float = 1.0):
        self.setting = setting
        teacher = setting.teacher()
        self.student = student_of(teacher)
        self.teacher = cast_once(teacher, setting.precision)
        if ratio < 1:
            hdlib.narrow(self.student, all_heads(self.student, ratio))  # the naive step compares all of them
        self.read(setting.batch_size, setting.length)
        sizes = self.student.config.hidden_size, self.teacher.config.hidden_size
        layers = self.teacher.config.num_hidden_layers
        self.projections = [torch.eye(*sizes, device=setting.device, requires_grad=True) for _ in range(layers + 1)]
        self.importance = hdlib.scorer("sensitivity")
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6)

    def read(self, batch_size: int, length: int) -> None:
        """Draw another batch of random tokens, with 15 % to predict."""
        device = self.setting.device
        self.input_ids = torch.randint(1000, 30000, (batch_size, length), device=device)
        self.labels = torch.where(torch.rand(self.input_ids.shape, device=device) < 0.15, self.input_ids, IGNORED)

    def loss(self, *terms: str) -> DistillationLoss:
        """The distillation loss with these terms only; without names, all five."""
        config = self.teacher.config
        weights = {term: float(term in (terms or TERMS)) for term in TERMS}
        sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
        loss = DistillationLoss(*sizes, student_hidden_size=self.student.config.hidden_size, **weights)
        return loss.to(self.setting.device)

    def backward(self, loss: DistillationLoss) -> LossTerms:
        """Both forward passes, the loss and the backward pass, as in the loop; call within `recording`."""
        self.student.zero_grad()
        loss.zero_grad()
        positions = loss.loss_positions(self.labels)
        with self.setting.autocast():
            with torch.no_grad():
                teacher_outputs = forward(self.teacher, self.input_ids, positions)
            terms = loss(forward(self.student, self.input_ids, positions), teacher_outputs, self.labels)
        del teacher_outputs
        terms.total.backward()
        return terms

    def floor(self) -> None:
        """The least work of a step: the teacher's forward, and the student's masked-language-model step."""
        self.student.zero_grad()
        positions = self.labels != IGNORED
        with self.setting.autocast():
            with torch.no_grad():
                self._logits(self.teacher, positions)
            logits = self._logits(self.student, positions)
            loss = F.cross_entropy(logits.float(), self.labels[positions])
        loss.backward()

    def _logits(self, model: PreTrainedModel, positions: torch.Tensor) -> torch.Tensor:
        return head(model, base_model(model)(self.input_ids).last_hidden_state[positions])

    def naive(self) -> None:
        """The same five terms written in the usual way: eager attention, logits at all positions."""
        self.student.zero_grad()
        recorded = {"output_hidden_states": True, "output_attentions": True}
        with self.setting.autocast():
            with torch.no_grad():
                teacher_outputs = self.teacher(self.input_ids, **recorded)
            student_outputs = self.student(self.input_ids, labels=self.labels, **recorded)
            both = (student_outputs, teacher_outputs)
            log_probs = [F.log_softmax(outputs.logits, -1) for outputs in both]
            prediction = F.kl_div(*log_probs, reduction="batchmean", log_target=True)
            states, targets = (outputs.hidden_states for outputs in both)
            projected = [state @ projection for state, projection in zip(states, self.projections, strict=True)]
            hidden = map(F.mse_loss, projected, targets)
            attention = map(F.mse_loss, *(outputs.attentions for outputs in both))
            total = student_outputs.loss + prediction + sum(hidden) + sum(attention)
        total.backward()

    @contextmanager
    def recording(self):
        """Record queries and keys of both models, as in the loop."""
        with recording(self.teacher, self.student), recompute_casts(self.student):
            yield

    def eager(self) -> None:
        for model in (self.teacher, self.student):
            model.set_attn_implementation("eager")
