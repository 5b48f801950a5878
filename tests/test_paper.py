"""The paper's configurations, and what a run would cost."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import hdlib
from experiments import cost
from hdlib import DistillConfig, Widths
from hdlib.__main__ import read
from hdlib.widths import set_widths

from models import random_model

PAPER = Path(cost.__file__).with_name("paper")
PUBLISHED = {"base": 65e6, "small": 17.3e6, "xsmall": 15.6e6, "tiny": 14.1e6}  # parameters, in the paper


@pytest.fixture(scope="module")
def bert_base():
    with torch.device("meta"):
        return BertForMaskedLM(BertConfig())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_of_the_paper(name, bert_base):
    """It is one that the command takes, its student has the published size, and every number says where it is from."""
    path = PAPER / f"homobert_{name}.yaml"
    places, config = read(path)
    assert (config.steps, config.batch_size, places["length"]) == (28000, 4096, 128)
    shape = BertConfig()
    set_widths(bert_base, shape, config.shape(bert_base))
    with torch.device("meta"):
        student = BertForMaskedLM(shape)
    assert student.num_parameters() == pytest.approx(PUBLISHED[name], rel=0.03)
    assert config.widths_at(config.steps, bert_base, config.shape(bert_base)) == Widths.of(student)
    for line in path.read_text().splitlines():
        if re.match(r"\w+:", line) and not line.startswith("run_dir"):
            assert re.search(r"# \[(paper|inferred|default)\]", line), line


def test_there_is_one_for_every_student_of_the_paper():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {f"homobert_{name}" for name in PUBLISHED}


@pytest.mark.parametrize("name, causal", [("bert", False), ("qwen3", True)])
def test_a_projection_adds_up(name, causal):
    """By hand: operations, and time that follows steps and devices."""
    teacher = random_model(name, vocabulary=100)
    config = DistillConfig(steps=100, batch_size=8, micro_batch_size=2, target=0.5, precision="float32")
    found = cost.project(teacher, config, 16)
    assert found.tokens_per_second == pytest.approx(100 * 8 * 16 / (found.hours * 3600))
    assert found.operations == pytest.approx(found.operations_per_second * found.hours * 3600)

    def forward(widths):
        shape = type(teacher.config)(**teacher.config.to_dict())
        set_widths(teacher, shape, widths)
        head = 2 * (16 if causal else 2) * shape.hidden_size * (shape.hidden_size + 100)
        return hdlib.cost.flops(shape, 16) + head

    wide, target = Widths.of(teacher), config.shape(teacher)
    at = [wide, *(config.widths_at(step, teacher, target) for step in range(1, 100))]
    assert found.operations == pytest.approx(8 * sum(forward(wide) + 3 * forward(widths) for widths in at))
    assert cost.project(teacher, config, 16, processes=2).operations == pytest.approx(found.operations)


def test_a_line_is_fitted_to_the_steps_and_prunes_come_on_top():
    """Seconds made up as 1 + 2 x operations, and 5 more where a prune was."""
    sizes = [8, 8, 8, 8, 6, 6, 4, 4, 4]  # after steps 0 to 8
    steps = [{"hidden_size": n, "intermediate_size": n, "head_dim": n, "num_heads": 1, "seconds": 0.0} for n in sizes]
    for step, (before, after) in enumerate(pairwise(sizes), 1):
        steps[step]["seconds"] = 1 + 2 * before + 5 * (before != after)
    line, prune = cost._fitted(cost.pd.DataFrame(steps), lambda widths: widths.hidden)
    assert [line(n) for n in (8, 4, 1)] == pytest.approx([17, 9, 3]) and prune == pytest.approx(5)


def test_the_command_says_hours_and_money(tmp_path, monkeypatch, capsys):
    text = "teacher: embedded\nrun_dir: r\nlength: 16\nsteps: 50\nbatch_size: 4\ntarget: 0.5\nprecision: float32\n"
    (tmp_path / "config.yaml").write_text(text)
    asked = ["cost", str(tmp_path / "config.yaml"), "--processes", "2", "--price", "9", "--teraflops", "1e-6"]
    monkeypatch.setattr("sys.argv", asked)
    cost.main()
    said = capsys.readouterr().out
    assert re.search(r"hours on 2 x CPU, \d threads, [\d.,]+ in all, [\d,]+ tokens a second", said)
    hours, money = re.search(
        r"  ([\d,.e+]+) hours on 2 x a device that sustains 1e-06 T .* ([\d,.]+) in all", said
    ).groups()
    assert float(money.replace(",", "")) == pytest.approx(18 * float(hours.replace(",", "")), rel=0.01)
    (tmp_path / "config.yaml").write_text(text.replace("embedded", "no/where/at/all"))
    with pytest.raises(SystemExit, match="no/where"):
        cost.main()
