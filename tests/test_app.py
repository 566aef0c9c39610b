"""The page of tools/app.py in a real browser: what a visitor sees, and that nothing outside is asked for."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import perturbed, small_dit

from meanflow.config import ImprovedMeanFlowConfig
from meanflow.noise import arc
from meanflow.objectives.improved import ImprovedMeanFlow
from meanflow.publishing.pipeline import MeanFlowPipeline
from models.dit import DiT

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = ["tench", "goldfish", "great white shark"]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """An export that is told the CFG scale, of 8 x 8 pixels."""
    net = perturbed(DiT(8, 2, 1, 32, 2, 2, num_classes=3, takes_omega=True), 0.2)
    sampling = ImprovedMeanFlow.sampling(ImprovedMeanFlowConfig(guidance_scale=2.0))._asdict()
    MeanFlowPipeline(net, None, sampling, dict(enumerate(NAMES))).save_pretrained(tmp_path / "animals")
    return tmp_path / "animals"


@pytest.fixture
def address(checkpoint):
    """The page's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "tools/app.py", str(checkpoint), "--port", str(port)]
    page = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    line = page.stdout.readline()
    assert f"animals: http://127.0.0.1:{port}/ (Ctrl-C ends it)" in line, line + page.stdout.read()
    yield f"http://127.0.0.1:{port}/"
    page.terminate()
    page.wait()


@pytest.fixture
def page(address):
    """A browser at the page, which may ask only this machine, and the addresses that it asked."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page, asked
        browser.close()


def sample(page) -> bytes:
    """Presses the button, and returns the new picture."""
    before = page.locator("#took").inner_text()
    page.get_by_role("button", name="Sample", exact=True).click()
    page.wait_for_function("before => document.querySelector('#took').innerText != before", arg=before)
    page.wait_for_timeout(500)  # until the picture is exchanged
    source = page.locator("#samples img").get_attribute("src")
    return page.request.get(source).body()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_a_visitor_chooses_a_class_and_sees_images_that_the_seed_repeats(page):
    page, asked = page
    page.get_by_label("Class").click()
    page.get_by_role("option", name="goldfish").click()
    first = sample(page)
    assert first.startswith(b"\x89PNG") and re.search(r"8 images, 1 step: .* s, ", page.locator("#took").inner_text())
    assert sample(page) == first
    page.get_by_label("Seed").first.fill("1")
    other = sample(page)
    assert other != first
    page.get_by_label("Seed").first.fill("0")
    assert sample(page) == first
    scale = page.get_by_role("spinbutton", name="CFG scale")
    scale.fill("6")
    scale.press("Tab")
    assert sample(page) != first
    for tab, button in (("One step beside fifty", "Compare"), ("A walk between two noises", "Walk")):
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name=button, exact=True).click()
        page.get_by_text(re.compile("8 images, (50 steps|1 step): .* s")).last.wait_for()
    host = re.match(r"http://[^/]+/", page.url)[0]
    outside = [url for url in asked if not url.startswith((host, "data:", "blob:"))]
    assert asked and not outside


@pytest.mark.slow
def test_the_same_file_is_a_space(checkpoint, hub, tmp_path, tool):
    """It needs no part of this project: it runs in a folder of its own, and loads the model from the Hub."""
    said = tool("push_to_hub", checkpoint, "user/animals", "--revision", "v1", "--space", "user/animals-page")
    assert "spaces/user/animals-page" in said
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download("user/animals-page", repo_type="space", local_dir=tmp_path / "space"))
    assert {path.name for path in folder.iterdir()} >= {"app.py", "README.md", "requirements.txt", "space.json"}
    assert "sdk: gradio" in (folder / "README.md").read_text()
    assert "meanflow" not in (folder / "requirements.txt").read_text()
    assert "give the Space a secret HF_TOKEN" in said
    code = "import app, sys; app.show = lambda pipe, *_: print(type(app.Page(pipe).build('x')).__name__);"
    code += "app.main_of_space(); print('meanflow' in sys.modules)"
    with open(os.devnull) as nowhere:
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": ""}
        shown = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, stdin=nowhere,
                               capture_output=True, text=True)  # fmt: skip
    assert shown.stdout.split() == ["Blocks", "False"], shown.stderr


@pytest.mark.parametrize(
    "repo_id, space, message",
    [
        ("animals", "user/page", "repo_id must be user/name with --space"),
        ("user/animals", "page", "space must be a Hub id, user/name"),
        ("user/animals", "user/animals", "space must be a Hub id, user/name, and not the model's"),
    ],
)
def test_ids_that_no_space_can_have_are_refused_before_a_push(repo_id, space, message, checkpoint, hub, tool):
    assert message in tool("push_to_hub", checkpoint, repo_id, "--space", space)
    assert not hub.repos


def test_a_walk_begins_and_ends_at_its_noises_and_keeps_their_length():
    a, b = torch.randn(2, 3, 64, 64)
    assert torch.allclose(arc(a, b, 0.0), a) and torch.allclose(arc(a, b, 1.0), b, atol=1e-5)
    lengths = [arc(a, b, share).norm() / a.norm() for share in (0.25, 0.5, 0.75)]
    assert all(abs(length - 1) < 0.02 for length in lengths)
    assert torch.equal(arc(a, a, 0.3), a)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--port", "0"], "port must be in [1, 65535], got 0"),
        ([], "makes no pictures, but samples of 4x4x4"),
        (["--device", "abacus"], "device abacus is not there"),
    ],
)
def test_what_cannot_be_shown_is_refused(flags, message, tool, tmp_path):
    sampling = ImprovedMeanFlow.sampling(ImprovedMeanFlowConfig())._asdict()
    net = small_dit(in_channels=4, takes_omega=True)
    MeanFlowPipeline(net, None, sampling, {}).save_pretrained(tmp_path / "latents")
    assert message in tool("app", tmp_path / "latents", *flags)


def test_a_port_that_is_taken_is_said(tool, checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        begin = time.monotonic()
        said = tool("app", checkpoint, "--port", taken.getsockname()[1])
    assert "cannot be listened at: choose another --port" in said and said.startswith("error: ")
    assert time.monotonic() < begin + 60
