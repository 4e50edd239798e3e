"""What a command says, and its exit status, when it is stopped."""

import sys

import pytest

from flowkit.stopping import Stopped, stops_in_a_line


def _stopped(recipe, stop):
    with pytest.raises(SystemExit) as stopped, stops_in_a_line(recipe):
        stop()
    return stopped.value.code


def _press():
    raise KeyboardInterrupt


def _as_lightning():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def _in_training():
    raise Stopped(15, "stopped at step 3; continue with resume=r")


@pytest.mark.parametrize(
    ("recipe", "stop", "code", "said"),
    [
        *((r, _press, 130, "the same command continues") for r in ("sample", "pairs", "report")),
        *((r, _press, 130, "the same command continues") for r in ("encode", "evaluate")),
        ("compare", _in_training, 143, "the same command continues"),
        ("compare", _as_lightning, 130, "the same command continues"),
        ("train", _in_training, 143, "stopped at step 3; continue with resume=r"),
        ("train", _as_lightning, 130, "a run with a checkpoint continues with resume="),
        ("autoencoder", _press, 130, "a run with a checkpoint continues with resume="),
        ("boss", _press, 130, "the same command starts again"),
    ],
)
def test_a_stop_is_one_line_and_a_status(recipe, stop, code, said, capsys):
    assert _stopped(recipe, stop) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


@pytest.mark.parametrize("code", [0, 2, None])
def test_other_ends_stay_as_they_are(code, capsys):
    assert _stopped("train", lambda: sys.exit(code)) == code
    quiet = Stopped(15, "told by another process")
    quiet.code = 0

    def stop():
        raise quiet

    assert _stopped("train", stop) == 0
    assert capsys.readouterr().err == ""
