"""The paper's configurations, and the estimated cost of a run."""

import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import hdlib.lab.cost
from experiments import cost
from hdlib import Widths
from hdlib.__main__ import read
from hdlib.widths import set_widths

PAPER = Path(cost.__file__).with_name("paper")
PUBLISHED = {"base": 65e6, "small": 17.3e6, "xsmall": 15.6e6, "tiny": 14.1e6}  # parameters, in the paper


@pytest.fixture(scope="module")
def bert_base():
    with torch.device("meta"):
        return BertForMaskedLM(BertConfig())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_of_the_paper(name, bert_base):
    """The command accepts it, its student has the published size, and every number has a source."""
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


def test_every_student_of_the_paper_has_a_configuration():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {f"homobert_{name}" for name in PUBLISHED}


def test_the_command_prints_hours_and_money(tmp_path, monkeypatch, capsys):
    text = "teacher: embedded\nrun_dir: r\nlength: 16\nsteps: 50\nbatch_size: 4\ntarget: 0.5\nprecision: float32\n"
    (tmp_path / "config.yaml").write_text(text)
    arguments = ["cost", str(tmp_path / "config.yaml"), "--processes", "2", "--price", "9", "--teraflops", "1e-6"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(hdlib.lab.cost, "STEPS", 12)
    cost.main()
    output = capsys.readouterr().out
    assert re.search(r"hours on 2 x CPU, \d threads, [\d.,]+ in total, [\d,]+ tokens a second", output)
    hours, money = re.search(
        r"  ([\d,.e+]+) hours on 2 x a device with 1e-06 TFLOP/s, ([\d,.]+) in total", output
    ).groups()
    assert float(money.replace(",", "")) == pytest.approx(18 * float(hours.replace(",", "")), rel=0.01)
    (tmp_path / "config.yaml").write_text(text.replace("embedded", "no/where/at/all"))
    with pytest.raises(SystemExit, match="no/where"):
        cost.main()
