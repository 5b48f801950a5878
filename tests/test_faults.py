"""What happens to long runs: kills, full disks, broken files, other processes. Nothing is lost but the last steps."""

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
from accelerate.utils import DistributedType

import hdlib
from hdlib import DistillConfig
from hdlib.checkpoints import FILES, REST, TENSORS, BrokenCheckpoint, load_state
from hdlib.training import Training

from models import random_model
from test_loop import ARGUMENTS, weights

KILLS = int(os.environ.get("HDLIB_KILLS", "6"))  # HDLIB_KILLS=100 takes a quarter of an hour
CLOCKS = ["seconds", "elapsed"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums come out differently with another number of threads, and a child by fork has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return random_model("bert", vocabulary=len(tokenizer))


@pytest.fixture(scope="module")
def run_in(teacher, tokenizer, blocks):
    """Distils to a folder: seven prunes, a checkpoint after every step, at most a few seconds."""
    config = DistillConfig(**ARGUMENTS | {"checkpoint_every": 1})

    def run(folder, changed=None, **options):
        asked = config if changed is None else DistillConfig(**config.to_dict() | changed)
        return hdlib.distill(teacher, tokenizer, *blocks, asked, folder, **options)

    return run


@pytest.fixture(scope="module")
def whole(run_in, tmp_path_factory):
    started = time.monotonic()
    run = run_in(tmp_path_factory.mktemp("whole") / "run")
    assert run.metrics["intermediate_size"].nunique() >= 6, "at least five prunes"
    return run, time.monotonic() - started


def is_undisturbed(run, whole) -> None:
    """Bit-equal weights, and the same record of every step."""
    expected, got = weights(whole), weights(run)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in got)
    assert run.metrics.drop(columns=CLOCKS).equals(whole.metrics.drop(columns=CLOCKS))


def stop_at(step):
    def on_step(record):
        if record["step"] == step:
            raise KeyboardInterrupt

    return on_step


@contextmanager
def child(work):
    """A process that is a copy of this one, where everything is loaded already; it does `work` and ends."""
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
    """What an error said in a process of its own; "" if there was none."""
    reading, writing = os.pipe()

    def told():
        try:
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode()[:4000])

    with child(told):
        os.close(writing)
        with os.fdopen(reading) as said:
            return said.read()


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_anywhere_and_resumed_is_undisturbed(seed, run_in, whole, tmp_path):
    expected, seconds = whole
    pause = random.Random(seed).uniform(0.0, seconds)
    with child(lambda: run_in(tmp_path / "run")) as process:
        time.sleep(pause)
        os.kill(process, signal.SIGKILL)
    is_undisturbed(run_in(tmp_path / "run", resume=True), expected)


def test_killed_while_a_checkpoint_is_written(run_in, whole, tmp_path, monkeypatch):
    """At every file of it, and between its renaming and that of the next."""
    steps = []

    def write_less(temporary):
        steps.append(temporary)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return fingerprints(temporary)

    fingerprints = hdlib.checkpoints._fingerprints
    monkeypatch.setattr(hdlib.checkpoints, "_fingerprints", write_less)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in hdlib.Run.load(tmp_path / "run").checkpoints()] == ["step_00000003", "step_00000004"]
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


def test_asked_to_stop_a_run_ends_after_the_step_with_a_checkpoint(run_in, whole, tmp_path):
    def ask(record):
        if record["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(hdlib.Stopped, match=r"stopped after step 7\. The last good checkpoint is .*step_00000007"):
        run_in(tmp_path / "run", {"checkpoint_every": 1000}, on_step=ask)
    assert signal.getsignal(signal.SIGTERM) is before
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


@pytest.fixture(scope="module")
def cut(run_in, tmp_path_factory):
    """A run that was cut off in its tenth step, with checkpoints of the eighth and the ninth."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, on_step=stop_at(10))
    return folder


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupted(path):
    """One bit of the last byte but 20: of a tensor's file a weight, which no format notices."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


DAMAGES = {"truncated": truncated, "corrupted": corrupted, "missing": os.remove}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", TENSORS, REST, FILES])
def test_a_broken_checkpoint_is_named_and_passed_over(file, damage, cut, teacher, tokenizer, blocks, tmp_path, capsys):
    shutil.copytree(cut, tmp_path / "run")
    run = hdlib.Run.load(tmp_path / "run")
    older, newest = run.checkpoints()
    DAMAGES[damage](newest / file)
    with pytest.raises(BrokenCheckpoint, match=file if file != FILES else newest.name):  # which may blame another
        load_state(newest)
    config = DistillConfig(**run.arguments["config"])
    target = config.check(teacher, tokenizer, *blocks)
    training = Training.begin(teacher, target, blocks[1], config, run)
    assert older.name == f"step_{training.step:08d}"
    assert str(newest) in capsys.readouterr().out


def test_without_any_sound_checkpoint_a_run_begins_again(run_in, cut, whole, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    for folder in hdlib.Run.load(tmp_path / "run").checkpoints():
        truncated(folder / TENSORS)
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


def test_nothing_in_a_checkpoint_is_pickled(cut):
    """Every file is JSON, text or safetensors, of which opening runs nobody's code."""
    files = [path for path in cut.rglob("*") if path.is_file() and path.stat().st_size]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".txt", ".lock"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_that_cannot_be_written_whole_stops_the_run_in_words(run_in, cut, whole, tmp_path):
    """Files may become no larger than what is there: the next checkpoint does not fit."""
    shutil.copytree(cut, tmp_path / "run")
    before = hdlib.Run.load(tmp_path / "run").checkpoints()[-1]

    def grow():
        limit_files(10_000)
        run_in(tmp_path / "run", resume=True)

    said = outcome(grow)
    assert said.startswith("OSError: the checkpoint of step 10 could not be written") and "too large" in said
    assert f"The last good checkpoint is {before}" in said
    load_state(before)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    is_undisturbed(run_in(tmp_path / "run", resume=True), whole[0])


@contextmanager
def mounted(folder, options: str):
    """A file system in memory; only who may mount one can have it."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, options.encode()):
        pytest.skip(f"no small disk can be mounted here: {errno.errorcode[ctypes.get_errno()]}")
    try:
        yield
    finally:
        libc.umount2(str(folder).encode(), 2)


def test_a_full_disk_stops_the_run_in_words(run_in, whole, tmp_path):
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

    def as_nobody():
        if os.getuid() == 0:  # whom nothing is forbidden
            os.setuid(65534)
        run_in(tmp_path / "locked" / "run", on_step=lambda record: pytest.fail("a step was made"))

    said = outcome(as_nobody)
    assert said == f"OSError: nothing can be written to {tmp_path}/locked/run (Permission denied): name another folder"


def test_two_runs_in_one_folder_at_once(run_in, tmp_path):
    def second(record):
        if record["step"] == 2:
            with pytest.raises(FileExistsError, match=r"already holds a run|another process is writing to"):
                run_in(tmp_path / "run")
            said = outcome(lambda: run_in(tmp_path / "run", resume=True))
            assert said.startswith("FileExistsError: another process is writing to ")
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
    checked = hdlib.corpus._checked

    def check_and_lose(file):
        digest = checked(file)
        if file.name == "b.txt":
            file.unlink()
        return digest

    monkeypatch.setattr(hdlib.corpus, "_checked", check_and_lose)
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

    words = (
        r"Lower micro_batch_size .* length of the blocks or eval_blocks. The last good checkpoint is .*step_00000002"
    )
    with pytest.raises(MemoryError, match=words):
        run_in(tmp_path / "run", on_step=exhausted)


def test_a_run_that_met_too_little_memory_goes_on_in_smaller_parts(run_in, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "run", on_step=stop_at(9))
    resumed = run_in(tmp_path / "run", {"micro_batch_size": 3}, resume=True)
    assert resumed.metrics["hidden_size"].equals(whole[0].metrics["hidden_size"])
    for name, tensor in weights(whole[0]).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=1e-4)


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
    """The command in two processes, and the file that says how far they are."""
    if not (folder / "teacher").exists():
        random_model("bert", vocabulary=len(tokenizer)).save_pretrained(folder / "teacher")
        tokenizer.save_pretrained(folder / "teacher")
    places = {"teacher": str(folder / "teacher"), "corpus": str(text_file), "length": 16}
    (folder / "config.yaml").write_text(yaml.safe_dump(ARGUMENTS | places | {"run_dir": str(folder / "run")} | changes))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launch, "-m", "hdlib", str(folder / "config.yaml"), "--resume"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **told)


def wait_for_steps(processes, metrics, steps):
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > steps):
        assert time.monotonic() < deadline and processes.poll() is None
        time.sleep(0.05)


def test_when_a_process_dies_the_others_stop_and_say_why(tokenizer, text_file, tmp_path):
    with launched(tokenizer, text_file, tmp_path, steps=100_000) as processes:
        wait_for_steps(processes, tmp_path / "run" / "metrics.jsonl", 3)
        workers = subprocess.run(["pgrep", "-P", str(processes.pid)], capture_output=True, text=True).stdout.split()
        died = time.monotonic()
        os.kill(int(workers[-1]), signal.SIGKILL)
        said, _ = processes.communicate(timeout=60)
    assert processes.returncode != 0 and time.monotonic() - died < 60
    assert "Signal 9" in said or "SIGKILL" in said


def test_two_processes_stop_after_the_same_step_and_go_on(tokenizer, text_file, tmp_path):
    """What batch systems do: SIGTERM to the launcher, later the same line again."""
    with launched(tokenizer, text_file, tmp_path, steps=80, checkpoint_every=1000) as processes:
        wait_for_steps(processes, tmp_path / "run" / "metrics.jsonl", 5)
        processes.terminate()
        processes.communicate(timeout=60)
    run = hdlib.Run.load(tmp_path / "run")
    (checkpoint,) = run.checkpoints()
    assert not run.finished and load_state(checkpoint)["step"] == run.metrics.index[-1] < 80
    with launched(tokenizer, text_file, tmp_path, steps=80, checkpoint_every=1000) as processes:
        said, _ = processes.communicate(timeout=200)
    assert processes.returncode == 0, said[-2000:]
    assert [*run.metrics.index] == [*range(81)]
    (tmp_path / "undisturbed").mkdir()
    shutil.copytree(tmp_path / "teacher", tmp_path / "undisturbed" / "teacher")
    with launched(tokenizer, text_file, tmp_path / "undisturbed", steps=80) as processes:
        processes.communicate(timeout=200)
    is_undisturbed(run, hdlib.Run.load(tmp_path / "undisturbed" / "run"))
