"""Training runs that are stopped where it hurts go on as if they had not been."""

import multiprocessing
import os
import resource
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from flowkit.modules import LastCheckpoint, load_run
from flowkit.modules.callbacks import StopOnInterrupt
from flowkit.modules.checkpoints import read_checkpoint
from flowkit.recipes.train import train
from flowkit.runs.resuming import resumed
from tests.recipes.conftest import TINY
from tests.recipes.test_train import _losses, _state

OPTIONS = [*TINY, "trainer.log_every_n_steps=1", "trainer.max_steps=15"]
OPTIONS += ["trainer.val_check_interval=5", "lr_scheduler=cosine"]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class KillInWrite(Callback):
    """Kills the process in the writing of its second checkpoint, or two steps after the first."""

    def __init__(self, when):
        self.when = when

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 7:
            if self.when == "between checkpoints":
                kill()
            if self.when == "before the last move":
                os.replace = lambda *args: kill()
            if self.when == "within the file":
                trainer.strategy.checkpoint_io.save_checkpoint = self.half

    @staticmethod
    def half(checkpoint, path, **kwargs):
        torch.save(checkpoint, path)
        os.truncate(path, os.path.getsize(path) // 2)
        kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    from hydra import compose, initialize_config_dir

    from tests.conftest import CONF

    folder = tmp_path_factory.mktemp("whole")
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", [*OPTIONS, f"run_dir={folder}"])
    train(cfg)
    return folder


def assert_same(run, whole):
    assert dict(_losses(run)) == dict(_losses(whole))
    ours, expected = _state(run), _state(whole)
    for part in ("state_dict", "current_model_state"):
        for name, value in expected[part].items():
            assert torch.equal(value, ours[part][name]), (part, name)
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("when", ["between checkpoints", "within the file", "before the last move"])
def test_a_killed_process_is_resumed_exactly(configure, tmp_path, whole, when):
    """SIGKILL after step 7 or in the writing of step 10: the checkpoint of step 5 is whole."""
    node = f"+callback.kill={{_target_: tests.recipes.test_robust.KillInWrite, when: '{when}'}}"
    cfg = configure("train", *OPTIONS, f"run_dir={tmp_path}", node)
    process = multiprocessing.get_context("fork").Process(target=train, args=(cfg,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert _state(tmp_path)["global_step"] == 5
    train(resumed(configure("train", f"resume={tmp_path}"), ["callback.kill=null"]))
    assert_same(tmp_path, whole)


def test_a_resumed_step_is_not_saved_again_amid_gradients_of_the_next(tmp_path):
    saved = []
    trainer = SimpleNamespace(
        global_step=4,
        max_steps=8,
        should_stop=False,
        is_global_zero=True,
        save_checkpoint=saved.append,
    )
    callback = LastCheckpoint(tmp_path, 2)
    callback.on_train_start(trainer, None)
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert not saved


def test_what_a_killed_process_left_is_cleared_by_the_first_of_the_next(tmp_path):
    for name in ("last.ckpt", "last.ckpt.17.partial"):
        (tmp_path / name).touch()
    for first, left in ((False, 2), (True, 1)):
        trainer = SimpleNamespace(global_step=4, is_global_zero=first)
        LastCheckpoint(tmp_path, 2).on_train_start(trainer, None)
        assert len(list(tmp_path.iterdir())) == left
    assert (tmp_path / "last.ckpt").is_file()


def test_a_training_that_ends_by_the_clock_can_go_on(configure, tmp_path):
    options = [*TINY, "trainer.max_steps=1000000", "trainer.val_check_interval=1000000"]
    options += [f"run_dir={tmp_path}", "+trainer.max_time='00:00:00:02'"]
    train(configure("train", *options))
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert state["global_step"] > 0
    assert load_run(tmp_path).weights["step"] == state["global_step"]


@pytest.fixture
def _keyboard():
    """A process that Ctrl-C reaches, as it does not those that a script starts with ``&``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressCtrlC(Callback):
    """Signals its own process after an optimizer step, or amid the accumulation for the next."""

    def __init__(self, step, batch, times=1, number=signal.SIGINT):
        self.step, self.batch, self.times, self.number = step, batch, times, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx % 2 == self.batch:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                time.sleep(0.2)  # two at once are one to Python


def _press(step, batch, times=1, number=signal.SIGINT):
    node = f"_target_: tests.recipes.test_robust.PressCtrlC, number: {int(number)}"
    return f"+callback.press={{{node}, step: {step}, batch: {batch}, times: {times}}}"


@pytest.mark.usefixtures("_keyboard")
@pytest.mark.parametrize(
    ("batch", "number", "times"), [(0, signal.SIGINT, 1), (1, signal.SIGTERM, 2)]
)
def test_a_signal_ends_after_the_step_which_is_saved(
    configure, tmp_path, batch, number, times, capsys
):
    """SIGTERM may come twice, as from ``timeout``."""
    options = [*OPTIONS, "trainer.accumulate_grad_batches=2"]
    train(configure("train", *options, f"run_dir={tmp_path / 'whole'}"))
    run, before = tmp_path / "run", signal.getsignal(number)
    with pytest.raises(
        SystemExit, match=f"stopped at step 8; continue with resume={run}"
    ) as stopped:
        train(configure("train", *options, f"run_dir={run}", _press(7, batch, times, number)))
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err.count("stopping after this step") == 1
    assert signal.getsignal(number) is before
    assert _state(run)["global_step"] == 8
    train(resumed(configure("train", f"resume={run}"), ["callback.press=null"]))
    assert_same(run, tmp_path / "whole")


class PressAtStart(Callback):
    """Signals before the first step, when the handler of `StopOnInterrupt` is not yet there."""

    def on_train_start(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_the_first_step_is_not_lost(configure, tmp_path):
    node = "+callback.press={_target_: tests.recipes.test_robust.PressAtStart}"
    with pytest.raises(SystemExit, match="stopped at step 1") as stopped:
        train(configure("train", *OPTIONS, f"run_dir={tmp_path}", node))
    assert stopped.value.code == 143
    assert _state(tmp_path)["global_step"] == 1


def test_two_processes_stop_at_one_step_and_the_first_tells(tmp_path):
    """The second process of two gets the signal: both stop, and only the first has a status."""
    codes = []
    for first in (True, False):
        callback = StopOnInterrupt(tmp_path)
        strategy = SimpleNamespace(reduce_boolean_decision=lambda asked, all: True)
        trainer = SimpleNamespace(
            world_size=2,
            strategy=strategy,
            should_stop=False,
            accumulate_grad_batches=1,
            global_step=3,
            max_steps=9,
            is_global_zero=first,
        )
        trainer.fit_loop = SimpleNamespace(epoch_loop=_Seen)
        callback.on_train_batch_end(trainer, None, None, None, 0)
        assert trainer.should_stop
        with pytest.raises(SystemExit, match="stopped at step 3") as stopped:
            callback.on_fit_end(trainer, None)
        codes.append(stopped.value.code)
    assert codes == [143, 0]


class _Seen:
    batch_progress = SimpleNamespace(total=SimpleNamespace(processed=3))


@pytest.mark.usefixtures("_keyboard")
def test_ctrl_c_in_the_last_step_is_an_end_like_any(configure, tmp_path):
    train(configure("train", *OPTIONS, f"run_dir={tmp_path}", _press(14, 0)))
    assert _state(tmp_path)["global_step"] == 15


@pytest.mark.usefixtures("_keyboard")
def test_where_ctrl_c_is_ignored_it_stays_ignored(configure, tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    train(configure("train", *OPTIONS, f"run_dir={tmp_path}", _press(7, 1)))
    assert _state(tmp_path)["global_step"] == 15


@pytest.mark.usefixtures("_keyboard")
def test_ctrl_c_twice_ends_at_once(configure, tmp_path):
    with pytest.raises(SystemExit, match=f"stopped at once; .* resume={tmp_path}") as stopped:
        train(configure("train", *OPTIONS, f"run_dir={tmp_path}", _press(7, 1, times=2)))
    assert stopped.value.code == 130
    assert _state(tmp_path)["global_step"] == 5


class NoRoom(Callback):
    """Lets no file grow beyond half a checkpoint, once there is one."""

    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 7:
            limit = os.path.getsize(self.file) // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint(configure, tmp_path, whole):
    file = tmp_path / "checkpoints" / "last.ckpt"
    node = f"+callback.room={{_target_: tests.recipes.test_robust.NoRoom, file: {file}}}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"folder must have room .* got .*checkpoints at step 10: .*; last.ckpt is unchanged"
    try:
        with pytest.raises(RuntimeError, match=message):
            train(configure("train", *OPTIONS, f"run_dir={tmp_path}", node))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _state(tmp_path)["global_step"] == 5
    train(resumed(configure("train", f"resume={tmp_path}"), ["callback.room=null"]))
    assert_same(tmp_path, whole)


def test_a_folder_that_cannot_be_written_is_named(configure, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run.dir must be a writable folder, got .*file/run"):
        train(configure("train", *OPTIONS, f"run_dir={tmp_path / 'file' / 'run'}"))


@pytest.mark.parametrize("content", [torch.zeros(3), {"weight": torch.zeros(3)}])
def test_a_foreign_checkpoint_is_named(configure, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    cfg = configure("train", *OPTIONS, f"resume={tmp_path / 'other.pt'}", f"run_dir={tmp_path}/run")
    with pytest.raises(RuntimeError, match=r"checkpoint must fit .* format in .*other.pt"):
        train(cfg)
    assert not (tmp_path / "run").exists()


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def test_checkpoints_run_no_code(tmp_path):
    torch.save({"state_dict": Touch(str(tmp_path / "made"))}, tmp_path / "bad.ckpt")
    with pytest.raises(RuntimeError, match=r"checkpoint must be readable, got .*bad.ckpt"):
        read_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "made").exists()


class Stopped(Callback):
    """Signals as a SLURM cluster does before a time limit, and ends the process a step later."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
        if trainer.global_step == 8:
            raise ConnectionError("the time is up")


def test_a_requeued_job_goes_on_in_its_folder(configure, tmp_path, monkeypatch, whole):
    """At the signal Lightning saves step 7 and requeues; the next start goes on from there."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    slurm = {"NTASKS": 1, "JOB_ID": 71, "JOB_NAME": "train", "NODELIST": "here"}
    for name, value in {**slurm, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    run = tmp_path / "run"
    options = [*OPTIONS, f"run_dir={run}"]
    stop = "+callback.stop={_target_: tests.recipes.test_robust.Stopped}"
    with pytest.raises(ConnectionError):
        train(configure("train", *options, stop))
    assert (tmp_path / "asked").read_text() == "requeue 71\n"
    (saved,) = run.glob("hpc_ckpt_*.ckpt")
    assert read_checkpoint(saved)["global_step"] == 7
    assert _state(run)["global_step"] == 5

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(configure("train", *options))
    assert_same(run, whole)
    assert not saved.exists()
