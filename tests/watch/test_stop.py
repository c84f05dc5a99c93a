"""Who was asked to stop, and what becomes of the others."""

import errno
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from distributed.ranks import RankError, run_ranks

from facetrain.watch.stop import STOP_FILE_VARIABLE, StopRequest
from facetrain.world import World


def stop(world: World, numbers: list[int], launchers: list[str]) -> str:
    """The last rank gets signals; returns its own reason, once all have ended."""
    os.environ["GROUP_RANK"] = launchers[world.rank]
    for number in (signal.SIGINT, signal.SIGHUP):  # a test runner in the background may ignore them
        signal.signal(number, signal.SIG_DFL)
    with StopRequest(world) as request:
        if world.rank == world.world_size - 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        while not request.is_due():
            pass
        request.end(7)
        return request.reason


def test_a_file_system_that_hiccups_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: object, **_: object) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setenv(STOP_FILE_VARIABLE, str(tmp_path / "stop"))
    with StopRequest(World()) as request:
        with monkeypatch.context() as broken:
            broken.setattr(os, "stat", stale)
            assert not request.is_due()
        (tmp_path / "stop").touch()
        assert not request.is_due()
        assert request.is_due()


def test_a_stop_that_someone_asked_for_ends_all_ranks() -> None:
    twice = 2  # SLURM and torchrun, or a terminal and torchrun
    assert run_ranks(stop, 2, [signal.SIGUSR1] * twice, ["0", "1"]) == ["", "SIGUSR1"]
    assert run_ranks(stop, 2, [signal.SIGTERM] * twice, ["0", "0"]) == ["", "SIGTERM"]
    assert run_ranks(stop, 2, [signal.SIGHUP] * twice, ["0", "1"]) == ["", "SIGHUP"]
    assert run_ranks(stop, 2, [signal.SIGINT, signal.SIGINT, signal.SIGTERM], ["0", "1"]) == ["", "SIGINT"]


def test_a_stop_by_another_machines_torchrun_is_a_failure_here() -> None:
    with pytest.raises(RankError, match=r"rank 0 failed:(.|\n)*step 7: saved, since the processes on .* got SIGTERM"):
        run_ranks(stop, 2, [signal.SIGTERM], ["0", "1"])


@pytest.fixture
def signals_of_a_terminal():
    """What pytest does on them, and what a background may ignore, is put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_of_a_terminal")
def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facetrain.watch.stop._SAME_REQUEST_S", 0.2)
    with StopRequest(World()) as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "SIGINT"
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGHUP)  # changes nothing
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("signals_of_a_terminal")
def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest(World()) as request:
        os.kill(os.getpid(), signal.SIGHUP)
    assert request.reason == ""


def reason_by_file(world: World, file: Path) -> str:
    os.environ[STOP_FILE_VARIABLE] = str(file / str(world.rank))  # two hosts, of which the second has the file
    with StopRequest(replace(world, local_rank=0)) as request:
        while not request.is_due():
            pass
        return request.reason


def test_a_file_that_another_host_sees_before_that_of_rank_0_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    assert run_ranks(reason_by_file, 2, tmp_path, timeout_s=60.0) == ["", str(tmp_path / "1")]
