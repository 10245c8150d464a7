"""The files of a run: nothing of others is touched, and a run is taken up wherever it ended."""

import filecmp
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_llama_sampling import batch
from hf_llama_sampling.batch import Refused, runner, store
from hf_llama_sampling.batch.engine import Engine
from hf_llama_sampling.batch.fingerprint import fingerprint
from hf_llama_sampling.batch.requests import InputIndex, RecordReader
from hf_llama_sampling.batch.settings import RunSettings
from hf_llama_sampling.cli import main
from tests.batch.helpers import SETTINGS, ask_all, read, some_records, stop_after, stopped, write

pytestmark = pytest.mark.slow


def test_a_complete_output_is_left_alone(llama, tmp_path, monkeypatch):
    """The same command again asks the model nothing and touches nothing."""
    first = ask_all(llama, tmp_path, some_records(5))
    before = (tmp_path / "out").stat()
    monkeypatch.setattr(Engine, "run", None)
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS)
    assert (summary.records, summary.answered, summary.errors) == (5, 0, 0)
    assert (tmp_path / "out").stat() == before and read(tmp_path / "out") == first
    assert sorted(os.listdir(tmp_path / "out.run")) == ["keys", "run.json"]


@pytest.mark.parametrize("complete", [True, False])
def test_changed_input_or_settings_are_refused_with_the_ways_out(llama, tmp_path, monkeypatch, complete):
    """Complete or not, nothing is mixed and nothing replaced unless asked for; the refusal names what changed."""
    records = some_records(6)
    source = write(tmp_path / "in", records)
    run = {**SETTINGS, "batch_size": 2}
    if complete:
        batch.run(llama, source, tmp_path / "out", **run)
    else:
        stop_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            batch.run(llama, source, tmp_path / "out", **run)
        monkeypatch.undo()
    for changed, words in [
        ({"temperature": 0.7}, "temperature was 0.6 and is 0.7"),
        ({"seed": 4, "logprobs": True}, "logprobs was False and is True; seed was 3 and is 4"),
        ({"score": True, "existing": "reuse"}, "mode was 'generate'"),
    ]:
        with pytest.raises(Refused, match=words) as caught:
            batch.run(llama, source, tmp_path / "out", **{**run, **changed})
        assert "name another output" in str(caught.value) and "--existing restart" in str(caught.value)
    write(source, [*records, {"prompt": "more"}])
    with pytest.raises(Refused, match="records was 6 and is 7") as caught:
        batch.run(llama, source, tmp_path / "out", **run)
    assert "--existing reuse" in str(caught.value)

    summary = batch.run(llama, source, tmp_path / "out", **run, existing="reuse")
    assert (summary.records, summary.answered) == (7, 1 if complete else 5)
    assert read(tmp_path / "out") == ask_all(llama, tmp_path, [*records, {"prompt": "more"}], name="other")
    summary = batch.run(llama, source, tmp_path / "out", **{**run, "temperature": 0}, existing="restart")
    assert (summary.records, summary.answered) == (7, 7)


def test_reuse_makes_errors_again(llama, tmp_path):
    """A mended record is answered, the others are kept, and those that are gone are left out."""
    records = [{"prompt": "a", "top_p": 5}, *some_records(4)]
    ask_all(llama, tmp_path, records)
    mended = [{"prompt": "a", "top_p": 0.5}, *some_records(4)[1:]]
    summary = batch.run(llama, write(tmp_path / "in", mended), tmp_path / "out", **SETTINGS, existing="reuse")
    assert (summary.records, summary.answered, summary.errors) == (4, 1, 0)
    assert read(tmp_path / "out") == ask_all(llama, tmp_path, mended, name="other")


def test_files_of_others_are_not_touched(llama, tmp_path):
    """An output that no run made, or that was edited since, or that is no file, is refused."""
    source = write(tmp_path / "in", some_records(2))
    mine = tmp_path / "mine"
    mine.write_text("precious")
    with pytest.raises(Refused, match="no run made it as it is"):
        batch.run(llama, source, mine, **SETTINGS)
    assert mine.read_text() == "precious"
    batch.run(llama, source, tmp_path / "out", **SETTINGS)
    with open(tmp_path / "out", "a") as file:
        file.write("edited")
    with pytest.raises(Refused, match="no run made it as it is"):
        batch.run(llama, source, tmp_path / "out", **SETTINGS)
    (tmp_path / "out.run" / "run.json").write_text("{")
    with pytest.raises(Refused, match=r"run\.json.* is corrupted"):
        batch.run(llama, source, tmp_path / "out", **SETTINGS)
    for place, words in [(tmp_path, "must be a file"), (tmp_path / "no" / "out", "folder does not exist")]:
        with pytest.raises(Refused, match=words):
            batch.run(llama, source, place, **SETTINGS)
    with pytest.raises(Refused, match="input cannot be read"):
        batch.run(llama, tmp_path / "nothing", tmp_path / "new", **SETTINGS)


def test_one_run_at_a_time(llama, tmp_path):
    """A second run into the same output is told so."""
    folder = store.RunDirectory(tmp_path / "out")
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "shard-00003").touch()
    with folder.open_shard(0), pytest.raises(BlockingIOError, match="another run is writing"):
        ask_all(llama, tmp_path, some_records(2))
    with folder.open_shard(3), pytest.raises(BlockingIOError, match="another run is writing"):
        ask_all(llama, tmp_path, some_records(2))
    assert len(ask_all(llama, tmp_path, some_records(2))) == 2


def test_machines_that_share_no_file_system_are_told_so(tmp_path, monkeypatch):
    """A process that does not see what the main one made waits for it, and then says what is wrong."""
    monkeypatch.setattr(store, "_CACHED", 0.3)
    with pytest.raises(FileNotFoundError, match=r"process 1 does not see .*: name an output on a file system that all"):
        store.RunDirectory(tmp_path / "out").open_shard(1)


def test_a_stopped_run_is_taken_up(llama, tmp_path, monkeypatch):
    """What was answered is not asked again, and the output is the same."""
    stopped(llama, tmp_path, monkeypatch)
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert summary.answered == 6
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


def test_shards_of_processes_that_are_no_more_are_read(llama, tmp_path, monkeypatch):
    """A run of eight processes is taken up by one."""
    shard, _ = stopped(llama, tmp_path, monkeypatch)
    shard.rename(shard.with_name("shard-00007"))
    summary = batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert summary.answered == 6
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


@pytest.mark.parametrize("when", ["between runs", "at a batch", "before the merge"])
def test_a_vanished_shard(llama, tmp_path, monkeypatch, when):
    """Between runs its answers are made again; during one an error says so, and the next run completes the output."""
    shard, _ = stopped(llama, tmp_path, monkeypatch)
    work = runner.Worker.work
    if when == "between runs":
        shard.unlink()
    else:
        ask = Engine.run

        def vanishing(self, requests):
            shard.unlink(missing_ok=True)
            return ask(self, requests)

        def vanished(self, *rest):
            work(self, *rest)
            shard.unlink()

        if when == "at a batch":
            monkeypatch.setattr(Engine, "run", vanishing)
        else:
            monkeypatch.setattr(runner.Worker, "work", vanished)
        with pytest.raises(FileNotFoundError, match="the same command makes"):
            batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
    batch.run(llama, tmp_path / "out.in", tmp_path / "out", **SETTINGS, batch_size=2)
    assert filecmp.cmp(tmp_path / "out", tmp_path / "whole", shallow=False)


@pytest.mark.parametrize("step", ["merge", "keys", "manifest", "shards"])
def test_killed_between_the_last_steps(llama, tmp_path, monkeypatch, step):
    """Wherever the end is cut short, the next run completes it without asking the model."""
    records = some_records(4)
    expected = ask_all(llama, tmp_path, records, name="whole")
    writing, replacing = store.RunDirectory._write, store.RunDirectory._replacing

    def no_write(self, path, content):
        if (step, path.name) == ("keys", "keys") or (step == "manifest" and b'"complete": true' in content):
            raise KeyboardInterrupt
        writing(self, path, content)

    def no_replace(self, path, temporary=None):
        if step == "merge" and path.name == "out":
            raise KeyboardInterrupt
        return replacing(self, path, temporary)

    def no_clean_up(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.RunDirectory, "_write", no_write)
    monkeypatch.setattr(store.RunDirectory, "_replacing", no_replace)
    monkeypatch.setattr(store.RunDirectory, "clean_up", no_clean_up)
    with pytest.raises(KeyboardInterrupt):
        ask_all(llama, tmp_path, records)
    monkeypatch.undo()
    monkeypatch.setattr(Engine, "run", None)
    assert ask_all(llama, tmp_path, records) == expected
    assert sorted(os.listdir(tmp_path / "out.run")) == ["keys", "run.json"]


def test_killed_as_it_began(llama, tmp_path):
    """A manifest that had not got its name yet is a run's own: the next run begins anew."""
    expected = ask_all(llama, tmp_path, some_records(2), name="whole")
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "run.json.new").write_text("{")
    (tmp_path / "out.run" / "shard-00000").touch()
    assert ask_all(llama, tmp_path, some_records(2)) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(llama, tmp_path, small_disk, launch):
    """Too little room for the answers, and then for the output: one sentence; with room the run is completed."""
    records = some_records(200)
    source = write(tmp_path / "in", records)
    options = {**SETTINGS, "batch_size": 20}
    batch.run(llama, source, tmp_path / "whole", **options)
    fill = small_disk / "fill"
    for free in (8, 28):  # KB; the answers take some 40, and the output 30
        fill.write_bytes(bytes((128 - free) << 10))
        ended = launch(count=1, input=source, output=small_disk / "out", options=options)
        assert ended.codes == [2] and "No space left on device: free some space" in ended.stderr
        assert not (small_disk / "out").exists()
        fill.unlink()
    fill.write_bytes(bytes(64 << 10))
    with pytest.raises(OSError, match=r"'.*/disk/out' cannot be written: No space left on device"):
        batch.run(llama, source, small_disk / "out", **options)
    kept = sum(store.RunDirectory(small_disk / "out").answered(index_of(llama, source, options)))
    assert kept == 200
    fill.unlink()
    batch.run(llama, source, small_disk / "out", **options)
    assert filecmp.cmp(tmp_path / "whole", small_disk / "out", shallow=False)


def index_of(llama, source, options):
    """The index of a run's input."""
    settings = RunSettings(max_gen_len=options["max_gen_len"], seed=options["seed"])
    with open(source, "rb") as file:
        reader = RecordReader(llama, settings)
        return InputIndex(file, reader, {**fingerprint(llama), **settings.as_dict()})


def test_a_read_only_folder(llama, tmp_path, small_disk):
    """One sentence before the model is asked; what was answered there before is kept."""
    source = write(tmp_path / "in", some_records(4))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="cannot be written: Read-only file system: name an output where"):
        batch.run(llama, source, small_disk / "out", **SETTINGS)
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("existing", ["check", "reuse", "restart"])
def test_no_output_stands_on_an_input_or_on_a_file_of_others(llama, tmp_path, existing):
    """Whatever `existing` says, and by whatever name: inputs and files of others stay as they are."""
    source = write(tmp_path / "in", some_records(2))
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    before = Path(source).read_bytes()
    for name in ("in", "link", "hard"):
        with pytest.raises(Refused, match="must not stand on the input") as caught:
            batch.run(llama, source, tmp_path / name, **SETTINGS, existing=existing)
        assert "restart" not in str(caught.value)
    batch.run(llama, source, tmp_path / "out", **SETTINGS)
    with pytest.raises(Refused, match="must not stand on the input"):
        batch.run(llama, tmp_path / "out", tmp_path / "out", **SETTINGS, existing=existing)
    with pytest.raises(Refused, match="must not stand on the input"):
        batch.run(llama, tmp_path / "out.run" / "run.json", tmp_path / "out", **SETTINGS, existing=existing)
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "taken.run").mkdir()
    (tmp_path / "taken.run" / "keys").write_text("precious")
    for name in ("mine", "taken"):
        with pytest.raises(Refused, match="name another output, or move the f"):
            batch.run(llama, source, tmp_path / name, **SETTINGS, existing=existing)
    edited = (tmp_path / "out").read_bytes().replace(b"tokens", b"tokenz")
    (tmp_path / "out").write_bytes(edited)
    with pytest.raises(Refused, match="no run made it as it is"):
        batch.run(llama, source, tmp_path / "out", **SETTINGS, existing=existing)
    assert (tmp_path / "out").read_bytes() == edited
    assert Path(source).read_bytes() == before
    assert {(tmp_path / "mine").read_text(), (tmp_path / "taken.run" / "keys").read_text()} == {"precious"}


@pytest.mark.launches
def test_no_output_stands_on_the_file_behind_standard_input(tmp_path, capsys):
    """`batch - FILE < FILE` is refused too, by the command, before a model is loaded."""
    source = write(tmp_path / "in", some_records(2))
    before = Path(source).read_bytes()
    command = ["batch", str(source), str(source), "--existing", "restart"]
    assert main(command) == 2 and "must not stand on the input" in capsys.readouterr().err
    command[1] = "-"
    with open(source, "rb") as stdin:
        started = [sys.executable, "-m", "hf_llama_sampling", *command]
        ran = subprocess.run(started, stdin=stdin, capture_output=True, text=True)
    assert ran.returncode == 2 and "must not stand on the input" in ran.stderr
    assert Path(source).read_bytes() == before


# Who may read what


def modes(folder):
    """Permission bits of an output and of all files of its run."""
    paths = [folder / "out.run", *(folder / "out.run").iterdir()]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder / "out", *paths) if path.exists()}


@pytest.mark.parametrize(
    ("mode", "folder", "file"),
    [(0o644, 0o755, 0o644), (0o600, 0o700, 0o600), (0o640, 0o750, 0o640), (0o400, 0o700, 0o600)],
)
def test_nobody_reads_a_run_who_may_not_read_its_input(llama, tmp_path, monkeypatch, mode, folder, file):
    """Stopped or complete, all files have the permissions of ordinary new files, less what the input has not."""
    before = os.umask(0o022)
    try:
        source = write(tmp_path / "out.in", some_records(4))
        source.chmod(mode)
        stop_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            batch.run(llama, source, tmp_path / "out", **SETTINGS, batch_size=2)
        expected = {"out.run": folder, "run.json": file}
        assert modes(tmp_path) == expected | {"shard-00000": file}
        monkeypatch.undo()
        batch.run(llama, source, tmp_path / "out", **SETTINGS, batch_size=2)
        assert modes(tmp_path) == expected | {"out": file, "keys": file}
    finally:
        os.umask(before)


def test_permissions_follow_an_input_that_became_private(llama, tmp_path, monkeypatch):
    """A run taken up after `chmod 600` closes its files; an output that its owner closed stays closed."""
    before = os.umask(0o022)
    try:
        source = write(tmp_path / "in", some_records(6))
        stop_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            batch.run(llama, source, tmp_path / "out", **SETTINGS, batch_size=2)
        source.chmod(0o600)
        with pytest.raises(KeyboardInterrupt):
            batch.run(llama, source, tmp_path / "out", **SETTINGS, batch_size=2)
        assert modes(tmp_path) == {"out.run": 0o700, "run.json": 0o600, "shard-00000": 0o600}
        monkeypatch.undo()
        source.chmod(0o644)
        batch.run(llama, source, tmp_path / "out", **SETTINGS, batch_size=2)
        (tmp_path / "out").chmod(0o640)
        batch.run(llama, source, tmp_path / "out", **SETTINGS, existing="restart")
        assert modes(tmp_path)["out"] == 0o640
    finally:
        os.umask(before)
