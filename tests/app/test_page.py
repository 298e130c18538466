import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import tiny_pipeline
from PIL import Image
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    # The page must work where no name can be looked up.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
# The command, in a process that prints when any of its code connects to another machine.
SERVER = """
import functools, ipaddress, signal, sys, time

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = args[1] if event == "socket.connect" else args
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1", None):
            print("OUTSIDE", event, host, flush=True)

sys.addaudithook(watch)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells disable it for what they start with &
# A step takes as long as one of a real model does, so that a call can be stopped.
from dit_hf import CosineLatentScheduler

def slow(step):
    return functools.wraps(step)(lambda *args, **options: time.sleep(0.1) or step(*args, **options))

CosineLatentScheduler.step = slow(CosineLatentScheduler.step)
from dit_hf_cli import main
sys.exit(main(sys.argv[1:]))
"""

TABS = ("Generate", "Edit", "Image to image", "Inpaint", "Interpolate")
LOW_CONTRAST = Path(__file__).with_name("contrast.js").read_text()
# Check that there are `count` images, all loaded and of the model's size.
SHOWN = """([selector, count]) => {
    const images = [...document.querySelectorAll(selector)]
    return images.length === count && images.every(image => image.naturalWidth === 16)
}"""


@contextlib.contextmanager
def serving(model, log):
    """`dit-hf app` in a process of its own; yields it and its address."""
    with open(log, "w") as out:
        command = [sys.executable, "-c", SERVER, "app", str(model)]
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent, env=os.environ)
    try:
        for _ in range(3000):
            if (found := re.search(r"at (http://\S+)", log.read_text())) or server.poll() is not None:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.1)
        assert found, log.read_text()
        yield server, found[1]
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def browsing(folder, url):
    """A page of a Chromium with an empty profile, and a list of its requests to other hosts than the app."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            folder, executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1280, "height": 800}
        )
        page, outside = browser.new_page(), []
        own = (url, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else outside.append(request.url))
        page.goto(url)
        page.set_default_timeout(180_000)
        expect.set_options(timeout=180_000)
        yield page, outside
        browser.close()


def audit(page):
    """Check what every first screen must have: nothing cut off, readable text, named groups, Generate near the top."""
    for width, height in ((1280, 800), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.reload()
            expect(page.locator("#results .grid-container img")).to_have_count(8)
            expect(page.locator("#run-generate")).to_be_in_viewport(ratio=1)
            for name in TABS:
                expect(page.get_by_role("tab", name=name, exact=True)).to_be_in_viewport(ratio=1)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(LOW_CONTRAST) == [], (width, theme)
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 384) == (theme == "dark")
    expect(page.get_by_role("group", name="Smiling")).to_have_count(1)
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "run-generate":
            break
    else:
        pytest.fail("Generate is not within ten tab stops")


@pytest.mark.slow
def test_a_person_generates_edits_inpaints_and_interpolates_in_a_browser(tmp_path):
    if CHROMIUM is None:
        reason = "there is no chromium on this machine"
        (pytest.fail if os.environ.get("DIT_HF_BROWSER") == "required" else pytest.skip)(reason)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "bad.png").write_text("no image")
    Image.radial_gradient("L").resize((60, 40)).save(tmp_path / "good.png")
    log = tmp_path / "log.txt"
    with serving(tmp_path / "model", log) as (server, url):
        listening = {c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        with browsing(tmp_path / "profile", url) as (page, outside):
            # 1. The first screen in both widths and themes, with images.
            expect(page).to_have_title("dit_hf: model")
            audit(page)
            page.set_viewport_size({"width": 1280, "height": 800})

            def tab(name):
                page.get_by_role("tab", name=name, exact=True).click()

            def images(mode, count):
                """Run a mode, with a new seed, and wait for its images."""
                status = page.locator("#status").inner_text()
                page.click(f"#run-{mode}")
                expect(page.locator("#status")).not_to_have_text(status)
                expect(page.locator("#status")).to_have_text(re.compile("Seed"))
                page.wait_for_function(SHOWN, arg=["#results .grid-container img", count])

            # 2. Stop a call: the page still shows the step where it stopped.
            page.get_by_label("number input for Steps").fill("100")
            page.click("#run-generate")
            expect(page.locator("#status")).to_have_text(re.compile(r"Step \d+ of 100"))
            page.click("#stop-generate")
            page.wait_for_timeout(1000)
            expect(page.locator("#status")).to_have_text(re.compile(r"Step \d+ of 100"))
            page.get_by_label("number input for Steps").fill("25")
            # 3. Choose attributes and generate; the seed is shown, and can be used again.
            page.locator("fieldset.choice", has_text="Smiling").get_by_text("no", exact=True).click()
            expect(page.get_by_text("Requested: not Smiling")).to_be_visible()
            images("generate", 8)
            seed = page.get_by_label("Seed", exact=True).input_value()
            page.get_by_text("Randomize seed").click()
            page.get_by_label("number input for Images").fill("4")
            page.click("#run-generate")
            page.wait_for_function(SHOWN, arg=["#results .grid-container img", 4])
            expect(page.locator("#status")).to_have_text(re.compile(f"Seed {seed}"))
            page.get_by_text("Randomize seed").click()
            page.get_by_label("number input for Images").fill("8")
            images("generate", 8)
            seed = page.get_by_label("Seed", exact=True).input_value()
            page.get_by_text("Copy as Python").click()
            expect(page.locator(".cm-content")).to_contain_text(f"generator=generators({seed}, range(8))")
            # 4. An image must be chosen to be handed over; it is marked, and its file carries its settings.
            page.get_by_text("Vary this image").click()
            expect(page.get_by_text("choose an image of the results first").first).to_be_visible()
            page.locator("#results .grid-container button").nth(2).click()
            expect(page.locator("#results .preview .thumbnail-item.selected")).to_have_count(1)
            with page.expect_download() as download:
                page.locator("#results .preview").get_by_label("Download", exact=True).click()
            with Image.open(download.value.path()) as image:
                assert json.loads(image.text["dit_hf"])["image_number"] == 2
            # 5. Vary it, and edit one of the results, which are the image before and those after.
            page.get_by_text("Vary this image").click()
            expect(page.locator("#run-img2img")).to_be_visible()
            images("img2img", 9)
            page.locator("#results .grid-container button").nth(1).click()
            page.get_by_text("Edit this image").click()
            expect(page.locator("#run-edit")).to_be_visible()
            images("edit", 2)
            # 6. Upload a file that is not an image, then one that is.
            page.locator(".upload input[type=file]:visible, .upload:visible input[type=file]").first.set_input_files(
                tmp_path / "good.png"
            )
            images("edit", 2)
            page.locator(".upload:visible input[type=file]").first.set_input_files(tmp_path / "bad.png")
            expect(page.get_by_text("bad.png cannot be opened as an image").first).to_be_visible()
            # 7. Inpaint: a message without a stroke, new images with one.
            page.locator("#results .grid-container button").first.click()
            page.get_by_text("Inpaint this image").click()
            expect(page.locator("#editor canvas").first).to_be_visible()
            page.wait_for_timeout(1500)  # the canvas settles, without any sign in the page
            page.click("#run-inpaint")
            expect(page.get_by_text("paint over the part of the image").first).to_be_visible()
            box = page.locator("#editor canvas").first.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x - 60, y)
            page.mouse.down()
            page.mouse.move(x + 60, y, steps=12)
            page.mouse.up()
            page.wait_for_timeout(500)
            images("inpaint", 8)
            # 8. A film and its frames.
            tab("Interpolate")
            images("interpolate", 13)
            assert outside == []
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    assert "OUTSIDE" not in log.read_text()
    assert "Traceback" not in log.read_text()
