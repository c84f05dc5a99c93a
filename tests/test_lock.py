"""One job at a time on a folder, whatever becomes of the one before."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import ROOT, assert_user_error, facetrain

from facetrain.lock import LOCK_FILE, hold_folder

HOLD = """
import os, sys, time
from pathlib import Path
from facetrain.lock import hold_folder
with hold_folder(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2:] else 1  # as a process that reads data
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def start_holder(folder: Path, *words: str) -> tuple[subprocess.Popen[str], int]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None
    return holder, int(holder.stdout.readline())


def test_a_held_folder_is_refused_until_its_owner_ends_however_it_does(tmp_path: Path) -> None:
    holder, _ = start_holder(tmp_path)
    refused = rf"{tmp_path}: in use by process {holder.pid} on {socket.gethostname()} since 20.*; wait for it, stop it"
    with pytest.raises(ValueError, match=refused), hold_folder(tmp_path):
        pass
    holder.send_signal(signal.SIGSTOP)  # a stopped owner is an owner
    with pytest.raises(ValueError, match="in use by"), hold_folder(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_job_waits_for_the_lock_as_long_as_it_is_told(tmp_path: Path) -> None:
    holder, _ = start_holder(tmp_path)
    with pytest.raises(ValueError, match="in use by"), hold_folder(tmp_path, wait_s=1.5):
        pass
    ending = threading.Timer(1.0, holder.kill)
    ending.start()
    with hold_folder(tmp_path, wait_s=60.0):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    holder.wait()


def test_a_process_that_outlives_the_owner_holds_nothing(tmp_path: Path) -> None:
    holder, child = start_holder(tmp_path, "fork")
    try:
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is alive
        with hold_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_owner_on_another_host_is_named_with_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder, _ = start_holder(tmp_path)
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "node7", "pid": 12, "since": 0.0}))
    try:
        advice = rf"if node7 is down, its lock may stay: then remove {tmp_path / LOCK_FILE}"
        with pytest.raises(ValueError, match=advice), hold_folder(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with hold_folder(tmp_path):
        assert "taken over from process 12 on node7" in caplog.text


def test_a_second_job_on_a_run_folder_and_a_second_packing_are_refused(synthetic: Path, tmp_path: Path) -> None:
    run_dir, shards = tmp_path / "run", tmp_path / "shards"
    run_dir.mkdir()
    (shards / ".pack").mkdir(parents=True)
    with hold_folder(run_dir):
        words = ("--data.shards", synthetic / "shards", "--train.global_pairs", "8")
        second = facetrain("train", "--run.dir", run_dir, *words)
        assert_user_error(second, f"run.dir: {run_dir}: in use by process {os.getpid()}")
    with hold_folder(shards / ".pack"):
        second = facetrain("pack", synthetic / "faces" / "heldout", shards)
        assert_user_error(second, f"{shards}: in use by process {os.getpid()}")
    assert [path.name for path in run_dir.iterdir()] == [LOCK_FILE]
