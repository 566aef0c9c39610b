"""The caching tool as users start it: on several processes, killed, and with bad input."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import save_photos, save_vae
from PIL import Image

from meanflow.data.latents import read_metadata
from tools.cache_latents import Options, cache, main

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture
def options(photos, vae, tmp_path) -> Options:
    return Options(
        out=tmp_path / "latents", images=str(photos), vae=str(vae), resolution=32, shard_size=8, batch_size=4, workers=0
    )


def launch(options: Options, num_processes: int) -> subprocess.Popen:
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("out", "vae", "resolution")]
    flags += [f"--shard-size={options.shard_size}", f"--batch-size={options.batch_size}", "--workers=1"]
    command = [
        str(BIN / "accelerate"),
        "launch",
        "-q",
        "--num_processes",
        str(num_processes),
        "--main_process_port",
        "0",
    ]
    command += ["--multi_gpu"] * (num_processes > 1) + ["tools/cache_latents.py", options.images, *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.arrow")}


@pytest.mark.slow
def test_two_processes_killed_five_times_write_the_bytes_of_one_undisturbed(vae, tmp_path):
    """SIGKILL to the launcher, both processes and their loaders, amid shards, of which nothing may stay in sight."""
    save_photos(tmp_path / "photos", 300)
    sizes = {"vae": str(vae), "resolution": 64, "shard_size": 20, "batch_size": 4}
    one = Options(out=tmp_path / "one", images=str(tmp_path / "photos"), **sizes)
    shown = launch(one, 1)
    text, _ = shown.communicate()
    assert shown.returncode == 0, text
    two, finished, amid = replace(one, out=tmp_path / "two"), [], 0
    progress = two.out / ".progress"
    for kill in range(5):
        running = launch(two, 2)
        before = len(list(progress.glob("0*.json")))
        while running.poll() is None and len(list(progress.glob("0*.json"))) < before + 1 + kill % 2:
            time.sleep(0.005)
        assert running.poll() is None, running.communicate()[0]
        for process in [*psutil.Process(running.pid).children(recursive=True), running]:
            process.kill()
        running.communicate()
        finished.append(len(list(progress.glob("0*.json"))))
        # Each process was at its next shard: what it had encoded of that is nowhere to be read.
        amid += finished[-1] < 30
        assert len(shards(two.out)) - finished[-1] <= 2 and not (two.out / "latents.json").exists()
    assert finished == sorted(set(finished)) and amid == 5
    shown = launch(two, 2)
    text, _ = shown.communicate()
    assert shown.returncode == 0, text
    assert "600 latents (4, 8, 8) of 2 classes" in text and "checksums: 100%" in text
    assert shards(two.out) == shards(one.out) and len(shards(one.out)) == 30
    metadata = [json.loads((out / "latents.json").read_text()) for out in (one.out, two.out)]
    assert metadata[0] == metadata[1] and not progress.exists()


def test_kill_amid_the_writing_of_a_shard_leaves_nothing_that_reads(options, monkeypatch):
    """Stopped before the shard is on the disk and renamed: the next start writes it anew."""

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("caching.shards.sync", stop)
    with pytest.raises(KeyboardInterrupt):
        cache(options)
    monkeypatch.undo()
    assert not shards(options.out) and list((options.out / ".progress").glob("*.tmp"))
    cache(options)
    assert read_metadata(options.out)["count"] == 40


def test_unreadable_images_end_the_work_unless_they_may_be_skipped(options, photos, tmp_path, capfd):
    save_photos(tmp_path / "images", 6)
    (tmp_path / "images/flower/002.jpg").write_bytes(b"no image")
    options = replace(options, images=str(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"flower/002.jpg is no readable image: .* --skip-unreadable leaves"):
        cache(options)
    cache(replace(options, skip_unreadable=True))  # goes on where it stopped
    metadata = read_metadata(options.out)
    assert metadata["count"] == 11 and metadata["count_per_class"] == [6, 5]
    cache(replace(options, skip_unreadable=True))
    shown = capfd.readouterr()
    assert "is finished already" in shown.out
    assert "1 images skipped" in shown.out and "skipped: " in shown.err and "flower/002.jpg" in shown.err


def test_verify_reads_a_finished_cache_again(options, capsys):
    cache(options)
    main(Options(out=options.out, verify=True))
    assert "40 latents, every checksum as written" in capsys.readouterr().out
    path = options.out / "data-00002.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="data-00002.arrow is damaged"):
        main(Options(out=options.out, verify=True))


def test_other_settings_are_refused_and_a_finished_cache_is_left_alone(options, tmp_path, capsys):
    cache(replace(options, out=tmp_path / "done"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "done").iterdir()}
    cache(replace(options, out=tmp_path / "done"))
    assert "is finished already; --verify checks it" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is a cache of something else .*resolution 32 there, 64 here"):
        cache(replace(options, out=tmp_path / "done", resolution=64))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "done").iterdir()} == before
    with pytest.raises(ValueError, match="is not empty and holds no cache"):
        cache(replace(options, out=Path(options.images)))


def test_unfinished_cache_of_something_else_is_refused(options, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images/a.png")
    (tmp_path / "images/b.png").write_bytes(b"no image")
    options = replace(options, images=str(tmp_path / "images"))
    with pytest.raises(ValueError, match="b.png is no readable image"):
        cache(options)
    other = save_vae(tmp_path / "other", seed=1)
    for changes, message in (({"resolution": 64}, "resolution 32 there, 64 here"), ({"vae": str(other)}, "vae_sha256")):
        with pytest.raises(ValueError, match=f"is a cache of something else .*{message}"):
            cache(replace(options, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": None}, "images must be given"),
        ({"images": "./nowhere"}, "./nowhere: no such file or folder"),
        ({"images": "random:8", "resolution": 36}, "resolution must be a multiple of 8, got 36"),
        ({"images": "random:many"}, "random:COUNT must have a COUNT >= 1, got random:many"),
        ({"vae": "./nowhere"}, "vae: ./nowhere: no such folder"),
        ({"resolution": 36}, "resolution must be a multiple of the VAE's 8, got 36"),
        ({"resolution": 0}, "resolution must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changes, message, options):
    with pytest.raises(ValueError, match=message):
        main(replace(options, **changes))
    assert not options.out.exists()


def test_too_little_disk_is_refused(options, monkeypatch):
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="needs 2.05e-05 GB more and has 1e-05 GB free"):
        cache(options)
    assert not options.out.exists()


def test_the_program_ends_with_one_line_and_an_error_code(tmp_path):
    command = ["tools/cache_latents.py", "./nowhere", "--vae", "./nowhere", "--out", str(tmp_path / "out")]
    shown = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 2 and "error: ./nowhere: no such file or folder" in shown.stderr
    assert "Traceback" not in shown.stderr and not (tmp_path / "out").exists()
