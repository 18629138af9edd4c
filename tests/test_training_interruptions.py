"""Signals, dead launchers and dead processes: a training ends with a checkpoint, and goes on from it to the bit."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from images import save_parquets
from networks import tiny_autoencoder
from training import ROOT, SMALL, WEIGHTS, load, same_state

from diffusers_gm.training.folder import LOG_FILE, find_checkpoint, list_checkpoints
from diffusers_gm.training.options import TrainingArguments
from diffusers_gm.training.stopping import INTERRUPTED, Signals, is_launcher

STEPS = f"{SMALL} --max_train_steps 200 --checkpointing_steps 150 --validation_steps 0 --logging_steps 1"
DIRECT = (sys.executable, ROOT / "train_gm_sgm.py")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
ONE = (*ACCELERATE, "--cpu", "--num_processes", "1", ROOT / "train_gm_sgm.py")


def two(port):
    return (*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", port, ROOT / "train_gm_sgm.py")


def start(command, folder, *options):
    """The training as a process of its own, when it has taken some steps."""
    words = [*command, *" ".join(map(str, (STEPS, "--output_dir", folder, *options))).split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        list(map(str, words)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # as a terminal does: its keys reach all processes of the group
    )
    return process


def wait_for(folder, step=3):
    """Until that many steps are logged."""
    end = time.monotonic() + 120
    while not (folder / LOG_FILE).is_file() or (folder / LOG_FILE).read_text().count("\n") < step:
        assert time.monotonic() < end, "it did not start"
        time.sleep(0.05)


def of_training(process):
    """The processes that train: those of the script below the launcher."""
    found = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    return [
        pid
        for pid in found
        if "train_gm_sgm.py" in " ".join(psutil.Process(pid).cmdline())
        and "accelerate_cli" not in " ".join(psutil.Process(pid).cmdline())
    ]


def is_gone(pid):
    """Ended, although a parent may not have asked how."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def finish(process, seconds=60):
    printed, _ = process.communicate(timeout=seconds)
    return printed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same training without an interruption."""
    folder = tmp_path_factory.mktemp("interruptions") / "whole"
    process = start(DIRECT, folder)
    printed = finish(process, 300)
    assert process.returncode == 0, printed
    return folder


def goes_on(folder, whole):
    """One checkpoint more, not of a multiple of --checkpointing_steps; and from there to the same end."""
    (checkpoint,) = list_checkpoints(folder)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < 150
    assert not list(folder.glob("tmp-*"))
    process = start(DIRECT, folder, "--resume_from_checkpoint latest")
    printed = finish(process, 300)
    assert process.returncode == 0, printed
    assert same_state(load(folder / WEIGHTS), load(whole / WEIGHTS))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_with_a_checkpoint(whole, tmp_path, number):
    process = start(DIRECT, tmp_path / "out")
    wait_for(tmp_path / "out")
    process.send_signal(number)
    printed = finish(process)
    assert process.returncode == INTERRUPTED, printed
    said = rf"ended by {number.name} after \d+ of 200 steps: .* with --resume_from_checkpoint latest to go on"
    assert re.search(said, printed)
    assert "Traceback" not in printed
    goes_on(tmp_path / "out", whole)


def test_work_without_steps_is_interrupted_by_signals():
    """At once by one that was noted before; and afterwards they are noted again."""
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt), signals.interrupting():
            signal.raise_signal(signal.SIGTERM)
        assert not signals.received
    with Signals() as signals:
        with signals.interrupting():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt), signals.interrupting():
            pytest.fail("it was to end at once")


@pytest.mark.slow  # processes of their own
def test_ctrl_c_reaches_the_loaders_of_the_data_too(tmp_path, whole):
    process = start(DIRECT, tmp_path / "out", "--dataloader_num_workers 2")
    wait_for(tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)
    printed = finish(process)
    assert process.returncode == INTERRUPTED, printed
    goes_on(tmp_path / "out", whole)


@pytest.mark.slow  # processes of their own
def test_an_error_ends_it_with_loaders_too(tmp_path):
    full = ("bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *DIRECT)  # no larger files, as on a disk that is full
    process = start(full, tmp_path, "--checkpointing_steps", 1, "--dataloader_num_workers", 2)
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, said
    assert "Traceback" in said
    assert "killed by signal" not in said


def test_a_second_sigint_ends_it_at_once(tmp_path):
    """While it is stopped nothing can be finished: what ends it is the second signal."""
    process = start(DIRECT, tmp_path / "out", "--num_validation_images 64 --validation_inference_steps 900 "
                    "--validation_steps 3")  # fmt: skip
    wait_for(tmp_path / "out")
    time.sleep(1)  # in the middle of a grid of samples
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "it was to be busy"
    process.send_signal(signal.SIGINT)
    finish(process, 5)
    assert process.returncode == -signal.SIGINT
    assert not list_checkpoints(tmp_path / "out")


@pytest.mark.slow  # processes of their own
def test_under_the_launcher(tmp_path, whole):
    """One that is ended takes its training along, which is then nobody's child."""
    process = start(ONE, tmp_path / "out")
    wait_for(tmp_path / "out")
    (training,) = of_training(process)
    process.terminate()
    printed = finish(process)  # until the training, too, has closed its output
    assert is_gone(training)
    assert "the end of the launcher: the training ends with a checkpoint" in printed
    goes_on(tmp_path / "out", whole)


def test_the_training_under_the_launcher(tmp_path):
    process = start(ONE, tmp_path / "out")
    wait_for(tmp_path / "out")
    os.kill(of_training(process)[0], signal.SIGTERM)
    assert f"non-zero exit status {INTERRUPTED}" in finish(process)
    assert process.returncode == 1
    assert list_checkpoints(tmp_path / "out")


@pytest.mark.slow  # three trainings of two processes each
@pytest.mark.parametrize("who", ["launcher", "first", "second"])
def test_one_of_two_processes_ends_both(tmp_path, who):
    folder = tmp_path / "out"
    process = start(two(29641), folder)
    wait_for(folder)
    pid = process.pid if who == "launcher" else of_training(process)[who == "second"]
    os.kill(pid, signal.SIGTERM)
    printed = finish(process)
    assert process.returncode == 1, printed
    assert len(list_checkpoints(folder)) == 1, printed
    assert "to go on" in printed
    process = start(two(29641), folder, "--resume_from_checkpoint latest")
    printed = finish(process, 300)
    assert process.returncode == 0, printed
    assert (folder / "model_index.json").is_file()


@pytest.mark.slow
def test_a_process_that_dies_ends_all(tmp_path):
    process = start(two(29643), tmp_path / "out", "--max_train_steps 4000")
    wait_for(tmp_path / "out")
    all_of_them = of_training(process)
    began = time.monotonic()
    os.kill(all_of_them[1], signal.SIGKILL)
    finish(process)
    assert time.monotonic() - began < 30
    assert all(map(is_gone, all_of_them))
    assert process.returncode == 1


# --- Random kills ---

INTERVAL = 10
KILLED = f"{SMALL} --max_train_steps 120 --checkpointing_steps {INTERVAL} --checkpoints_total_limit 2 --logging_steps 1"
MODES = {
    "gm-sgm": (DIRECT, "--dropout 0.1 --random_flip"),
    "ncsnv2": (ONE, "--method ncsnv2 --gradient_accumulation_steps 2 --train_batch_size 8"),
    "cld": (DIRECT, "--method cld --dataloader_num_workers 2"),
    "classes": (DIRECT, "--class_conditional"),
    "latents": (DIRECT, "--vae {vae}"),
    "stream": (DIRECT, "--streaming --num_train_samples 40 --train_data_dir {stream} --dataloader_num_workers 2"),
    "two": (two(29645), "--train_batch_size 8"),
}


@pytest.mark.slow  # dozens of trainings
@pytest.mark.parametrize("mode", MODES)
def test_random_kills_lose_no_more_than_an_interval(mode, tmp_path):
    """Five kills of all processes at once, wherever they are; the end is that of a training that was let alone."""
    places = {"vae": tmp_path / "vae", "stream": tmp_path / "stream"}
    tiny_autoencoder(channels=1).save_pretrained(places["vae"])
    save_parquets(places["stream"])
    command, options = MODES[mode]
    options = f"{KILLED} {options.format(**places)} --validation_steps 25"
    generator, folder, kills = random.Random(mode), tmp_path / "killed", 0
    while kills < 5:
        process = start(command, folder, options, "--resume_from_checkpoint latest")
        before = (find_latest(folder) or 0) if folder.exists() else 0
        step = min(before + generator.randint(1, 30), 119)
        wait_for(folder, step)
        time.sleep(0.3 * generator.random())
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        finish(process)
        kills += 1
        lines = (folder / LOG_FILE).read_text().splitlines()
        reached = max(json.loads(line)["step"] for line in lines if line.endswith("}"))
        assert reached - (find_latest(folder) or 0) <= INTERVAL
    for name in ("killed", "whole"):
        process = start(command, tmp_path / name, options, "--resume_from_checkpoint latest")
        printed = finish(process, 300)
        assert process.returncode == 0, printed
    for name in (WEIGHTS, "checkpoint-120/model.safetensors", "checkpoint-120/custom_checkpoint_1.pkl"):
        assert same_state(*(load(tmp_path / which / name) for which in ("killed", "whole"))), name
    assert not list(folder.glob("tmp-*"))


def find_latest(folder):
    """The step of the newest checkpoint that is whole."""
    args = TrainingArguments(output_dir=str(folder), resume_from_checkpoint="latest")
    checkpoint = find_checkpoint(args)
    return checkpoint and int(checkpoint.name.removeprefix("checkpoint-"))


# --- In this process ---


def test_signals_are_noted_inside_and_only_there():
    before = [signal.getsignal(number) for number in Signals.NOTED]
    assert not is_launcher(os.getppid()), "whatever is exported"
    with Signals() as signals:
        assert not signals.look()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.look()
        assert signals.received == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "the next one kills"
        assert signals.received == "SIGTERM", "the first one"
    assert [signal.getsignal(number) for number in Signals.NOTED] == before
