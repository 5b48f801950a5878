"""Faults of long runs: kills, full disks, damaged files, other processes. At most the last steps are lost."""

import ctypes
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import hdlib.text.corpus
from hdlib import DistillConfig
from hdlib.checkpoints import FILES, STATE, BrokenCheckpoint, _fingerprints, load_state, save_folder
from hdlib.training import Training

from conftest import ARGUMENTS, full
from models import random_model
from test_loop import weights

KILLS = int(os.environ.get("HDLIB_KILLS", "2"))  # HDLIB_KILLS=100 takes 15 minutes
CLOCKS = ["seconds", "elapsed"]


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return random_model("bert", vocabulary=len(tokenizer))


@pytest.fixture(scope="module")
def run_in(teacher, tokenizer, blocks):
    """A function that distils into a folder: seven prunes, a checkpoint after every step, a few seconds."""
    config = DistillConfig(**ARGUMENTS | {"checkpoint_every": 1})

    def run(folder, changes=None, **options):
        changed = DistillConfig(**config.to_dict() | (changes or {}))
        return hdlib.distill(teacher, tokenizer, *blocks, changed, folder, **options)

    return run


@pytest.fixture(scope="module")
def whole(run_in, tmp_path_factory):
    started = time.monotonic()
    run = run_in(tmp_path_factory.mktemp("whole") / "run")
    assert run.metrics["intermediate_size"].nunique() >= 6, "at least five prunes"
    return run, time.monotonic() - started


def is_undisturbed(run, whole) -> None:
    """Check for bit-equal weights and equal records of every step, apart from the clocks."""
    expected, got = weights(whole), weights(run)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in got)
    assert run.metrics.drop(columns=CLOCKS).equals(whole.metrics.drop(columns=CLOCKS))
    assert run.records("blocks.jsonl") == whole.records("blocks.jsonl")


def stop_at(step):
    def on_step(record):
        if record["step"] == step:
            raise KeyboardInterrupt

    return on_step


@contextmanager
def child(work):
    """A forked process that runs `work`; a fork needs no time to import."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    try:
        yield process
    finally:
        os.waitpid(process, 0)


def outcome(work) -> str:
    """Type and message of the error that `work` raises in a forked process; "" if there is none."""
    reading, writing = os.pipe()

    def report_error():
        try:
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode()[:4000])

    with child(report_error):
        os.close(writing)
        with os.fdopen(reading) as message:
            return message.read()


@pytest.mark.parametrize("seed", [0, *full(*range(1, KILLS))])
def test_killed_anywhere_and_resumed_is_undisturbed(seed, run_in, whole, tmp_path):
    expected, seconds = whole
    pause = random.Random(seed).uniform(0.0, seconds)
    with child(lambda: run_in(tmp_path / "run")) as process:
        time.sleep(pause)
        os.kill(process, signal.SIGKILL)
    is_undisturbed(run_in(tmp_path / "run", resume=True), expected)


def test_killed_while_a_checkpoint_is_written(run_in, whole, tmp_path, monkeypatch):
    """A kill after the files are written and before the folder has its final name."""
    folders = []

    def kill_at_the_fifth(temporary):
        folders.append(temporary)
        if len(folders) == 5:
            raise KeyboardInterrupt
        return _fingerprints(temporary)

    monkeypatch.setattr(hdlib.checkpoints, "_fingerprints", kill_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in hdlib.Run.load(tmp_path / "run").checkpoints()] == ["step_00000003", "step_00000004"]
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


def test_on_sigterm_a_run_ends_after_the_step_with_a_checkpoint(run_in, whole, tmp_path):
    def terminate(record):
        if record["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(hdlib.Stopped, match=r"stopped after step 7\. The last good checkpoint is .*step_00000007"):
        run_in(tmp_path / "run", {"checkpoint_every": 1000}, on_step=terminate)
    assert signal.getsignal(signal.SIGTERM) is before
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


@pytest.fixture(scope="module")
def cut(run_in, tmp_path_factory):
    """A run that was interrupted in step 10, with checkpoints of steps 8 and 9."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, on_step=stop_at(10))
    return folder


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupted(path):
    """Flip one bit near the end; in a file of tensors this changes a value, which no file format detects."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


DAMAGES = {"truncated": truncated, "corrupted": corrupted, "missing": os.remove}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", STATE, FILES])
def test_a_damaged_checkpoint_is_named_and_passed_over(file, damage, cut, teacher, tokenizer, blocks, tmp_path, capsys):
    shutil.copytree(cut, tmp_path / "run")
    run = hdlib.Run.load(tmp_path / "run")
    older, newest = run.checkpoints()
    DAMAGES[damage](newest / file)
    # A damaged files.json may report another file.
    with pytest.raises(BrokenCheckpoint, match=file if file != FILES else newest.name):
        load_state(newest)
    config = DistillConfig(**run.arguments["config"])
    target = config.check(teacher, tokenizer, *blocks)
    training = Training.begin(teacher, target, blocks[1], config, run)
    assert older.name == f"step_{training.step:08d}"
    assert str(newest) in capsys.readouterr().out


def test_without_any_sound_checkpoint_a_run_starts_at_step_0(run_in, cut, whole, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    for folder in hdlib.Run.load(tmp_path / "run").checkpoints():
        truncated(folder / STATE)
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


def sign(checkpoint) -> None:
    """Write the fingerprints of the files as they are now."""
    (checkpoint / FILES).unlink()
    (checkpoint / FILES).write_text(json.dumps(_fingerprints(checkpoint)))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_loading_a_checkpoint_executes_no_code(cut, tmp_path, monkeypatch):
    """A state with a pickled object is refused, also where its fingerprint is right."""
    monkeypatch.chdir(tmp_path)
    checkpoint = shutil.copytree(hdlib.Run.load(cut).checkpoints()[-1], tmp_path / "checkpoint")
    torch.save({"step": 9, "kept": Harmful()}, checkpoint / STATE)
    sign(checkpoint)
    with pytest.raises(BrokenCheckpoint) as refused:
        load_state(checkpoint)
    assert str(refused.value) == f"{checkpoint / STATE} contains a pickled object, which could execute code"
    assert not (tmp_path / "harm").exists()


def test_no_file_of_a_checkpoint_but_the_state_may_hold_pickles(cut):
    files = [path for path in cut.rglob("*") if path.is_file() and path.stat().st_size]
    assert {path.suffix for path in files if path.name != STATE} <= {".json", ".jsonl", ".safetensors", ".txt", ".lock"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_an_earlier_version_is_refused_and_its_run_left_as_it_is(first, run_in, cut, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    run = hdlib.Run.load(tmp_path / "run")
    newest, before = run.checkpoints()[-1], run.records()
    if first:
        (newest / STATE).rename(newest / "training.safetensors")
    else:
        state = torch.load(newest / STATE)
        del state["leaving_layers"]
        torch.save(state, newest / STATE)
    sign(newest)
    with pytest.raises(ValueError, match=rf"{newest} is a checkpoint of an earlier hdlib: resume it with that version"):
        run_in(tmp_path / "run", resume=True)
    assert run.records() == before


def test_the_state_keeps_every_value(teacher, tokenizer, tmp_path):
    """Numbers to the last bit, keys that are numbers, the state of a random generator."""
    generator = torch.Generator().manual_seed(3)
    state = {"generator": generator.get_state(), "nested": {0: [1, 2.5, None, True], "tiny": 1e-300}}
    state["tensors"] = [torch.tensor([1.5], dtype=torch.bfloat16), torch.arange(3), torch.tensor(float("nan"))]
    save_folder(tmp_path / "saved", teacher, tokenizer, state)
    read = load_state(tmp_path / "saved")
    assert read["nested"] == state["nested"]
    for got, expected in zip(read["tensors"], state["tensors"], strict=True):
        assert got.dtype == expected.dtype and torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    again = torch.Generator()
    again.set_state(read["generator"])
    assert torch.equal(torch.rand(5, generator=again), torch.rand(5, generator=generator))


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("file", ["model.safetensors", STATE])
def test_a_file_that_cannot_be_written_stops_the_run(file, run_in, cut, whole, tmp_path):
    """The size of files is limited, so that this file of the next checkpoint does not fit."""
    shutil.copytree(cut, tmp_path / "run")
    before = hdlib.Run.load(tmp_path / "run").checkpoints()[-1]
    limit = (before / file).stat().st_size * 3 // 4
    assert file == "model.safetensors" or (before / "model.safetensors").stat().st_size < limit

    def grow():
        limit_files(limit)
        run_in(tmp_path / "run", resume=True)

    message = outcome(grow)
    assert message.startswith("OSError: the checkpoint of step 10 could not be written") and "too large" in message
    assert f"The last good checkpoint is {before}" in message
    load_state(before)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


@contextmanager
def mounted(folder, options: str):
    """A file system in memory; mounting one needs permission."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, options.encode()):
        pytest.skip(f"no small disk can be mounted: {errno.errorcode[ctypes.get_errno()]}")
    try:
        yield
    finally:
        libc.umount2(str(folder).encode(), 2)


def test_a_full_disk_stops_the_run(run_in, whole, tmp_path):
    with mounted(tmp_path / "disk", "size=1m"):
        with pytest.raises(OSError, match=r"could not be written.*No space left.*The last good checkpoint is .*step_"):
            run_in(tmp_path / "disk" / "run", {"keep_last": 100})
        run = hdlib.Run.load(tmp_path / "disk" / "run")
        for checkpoint in run.checkpoints():
            load_state(checkpoint)
        shutil.copytree(run.folder, tmp_path / "run")  # a larger disk
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


def test_a_folder_that_is_read_only_is_refused_before_the_first_step(run_in, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)

    def without_rights():
        if os.getuid() == 0:  # root may write everywhere
            os.setuid(65534)
        run_in(tmp_path / "locked" / "run", on_step=lambda record: pytest.fail("a step was made"))

    message = outcome(without_rights)
    folder = tmp_path / "locked" / "run"
    assert message == f"OSError: nothing can be written to {folder} (Permission denied): name another folder"


def test_two_runs_in_one_folder_at_the_same_time(run_in, tmp_path):
    def second(record):
        if record["step"] == 2:
            with pytest.raises(FileExistsError, match=r"already holds a run|another process is writing to"):
                run_in(tmp_path / "run")
            message = outcome(lambda: run_in(tmp_path / "run", resume=True))
            assert message.startswith("FileExistsError: another process is writing to ")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "run", on_step=second)
    assert run_in(tmp_path / "run", resume=True).finished


def test_a_shard_that_disappears(tokenizer, text_file, tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        shutil.copy(text_file, tmp_path / name)
    (tmp_path / "c.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match=r"c\.txt.*gone\.txt"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)
    (tmp_path / "c.txt").unlink()
    checked = hdlib.text.corpus._checked

    def check_and_lose(file):
        digest = checked(file)
        if file.name == "b.txt":
            file.unlink()
        return digest

    monkeypatch.setattr(hdlib.text.corpus, "_checked", check_and_lose)
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        hdlib.load_corpus(tmp_path, tokenizer, 16)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_names_the_settings_to_lower(error, run_in, tmp_path):
    def exhausted(record):
        if record["step"] == 3:
            raise error

    advice = (
        r"Lower micro_batch_size .* length of the blocks or eval_blocks. The last good checkpoint is .*step_00000002"
    )
    with pytest.raises(MemoryError, match=advice):
        run_in(tmp_path / "run", on_step=exhausted)


def test_after_too_little_memory_a_run_resumes_with_smaller_micro_batches(run_in, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "run", on_step=stop_at(9))
    resumed = run_in(tmp_path / "run", {"micro_batch_size": 3}, resume=True)
    assert resumed.metrics["hidden_size"].equals(whole[0].metrics["hidden_size"])
    for name, tensor in weights(whole[0]).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulation over 4 steps.*set micro_batch_size"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed precision bf16.*set precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "torch.compile"),
    ],
)
def test_the_environment_changes_nothing_in_silence(variable, value, message, run_in, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(ValueError, match=f"ACCELERATE_ environment variable asks for.*{message}"):
            run_in(tmp_path / "run")
        assert not (tmp_path / "run").exists()
        monkeypatch.delenv(variable)
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
        AcceleratorState._reset_state(True)
        machine = run_in(tmp_path / "run").description["machine"]
        assert machine["environment"]["ONEDNN_DEFAULT_FPMATH_MODE"] == "STRICT"
        assert machine["float32_products"] == "highest"
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused(kind, run_in, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match=f"{kind} shards it over the devices: launch without it"):
        run_in(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_clock_that_goes_backwards_changes_nothing(run_in, whole, tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(now))
    run = run_in(tmp_path / "run")
    monkeypatch.undo()
    is_undisturbed(run, whole[0])
    assert (run.metrics["seconds"] >= 0).all() and run.metrics["elapsed"].is_monotonic_increasing


def launched(tokenizer, text_file, folder, **changes):
    """Start the command line in two processes."""
    if not (folder / "teacher").exists():
        random_model("bert", vocabulary=len(tokenizer)).save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
    inputs = {"teacher": str(folder / "teacher"), "corpus": str(text_file), "length": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(ARGUMENTS | inputs | {"run_dir": str(folder / "run")} | changes))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launch, "-m", "hdlib", str(folder / "config.yaml"), "--resume"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **output)


def wait_for_steps(processes, metrics, steps):
    deadline = time.monotonic() + 1200  # a hang
    while not (metrics.exists() and metrics.read_text().count("\n") > steps):
        assert time.monotonic() < deadline and processes.poll() is None
        time.sleep(0.05)


@pytest.mark.full
def test_when_a_process_dies_the_others_stop_and_name_the_signal(tokenizer, text_file, tmp_path):
    with launched(tokenizer, text_file, tmp_path, steps=100_000) as processes:
        wait_for_steps(processes, tmp_path / "run" / "metrics.jsonl", 3)
        workers = subprocess.run(["pgrep", "-P", str(processes.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        output, _ = processes.communicate(timeout=1200)
    assert processes.returncode != 0
    assert "Signal 9" in output or "SIGKILL" in output


@pytest.mark.full
def test_two_processes_stop_after_the_same_step_and_resume(tokenizer, text_file, tmp_path):
    """As batch systems do: SIGTERM to the launcher, later the same command again."""
    with launched(tokenizer, text_file, tmp_path, steps=80, checkpoint_every=1000) as processes:
        wait_for_steps(processes, tmp_path / "run" / "metrics.jsonl", 5)
        processes.terminate()
        processes.communicate(timeout=1200)
    run = hdlib.Run.load(tmp_path / "run")
    (checkpoint,) = run.checkpoints()
    assert not run.finished and load_state(checkpoint)["step"] == run.metrics.index[-1] < 80
    with launched(tokenizer, text_file, tmp_path, steps=80, checkpoint_every=1000) as processes:
        output, _ = processes.communicate(timeout=1200)
    assert processes.returncode == 0, output[-2000:]
    assert [*run.metrics.index] == [*range(81)]
    (tmp_path / "undisturbed").mkdir()
    shutil.copytree(tmp_path / "teacher", tmp_path / "undisturbed" / "teacher")
    with launched(tokenizer, text_file, tmp_path / "undisturbed", steps=80) as processes:
        processes.communicate(timeout=1200)
    is_undisturbed(run, hdlib.Run.load(tmp_path / "undisturbed" / "run"))
