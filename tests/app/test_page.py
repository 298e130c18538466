import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

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
import ipaddress, signal, sys

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = args[1] if event == "socket.connect" else args
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1", None):
            print("OUTSIDE", event, host, flush=True)

sys.addaudithook(watch)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells disable it for what they start with &
from dit_hf_cli import main
sys.exit(main(sys.argv[1:]))
"""

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
        for _ in range(600):
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
            folder, executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1360, "height": 950}
        )
        page, outside = browser.new_page(), []
        own = (url, "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else outside.append(request.url))
        page.goto(url)
        page.set_default_timeout(180_000)
        expect.set_options(timeout=180_000)
        yield page, outside
        browser.close()


@pytest.mark.slow
def test_a_person_generates_edits_and_inpaints_in_a_browser(tmp_path):
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

            def images(click, gallery, count):
                page.click(click)
                page.wait_for_function(SHOWN, arg=[f"{gallery} .grid-container img", count])
                return page.locator(f"{gallery} .grid-container img").first.get_attribute("src")

            def choose(name, word):
                page.locator("fieldset.choice", has_text=name).get_by_text(word, exact=True).click()

            # 1. Choose attributes and generate images by a click; another click generates others.
            expect(page).to_have_title("dit_hf: model")
            expect(page.locator("#draw")).to_be_visible()
            choose("Smiling", "no")
            expect(page.get_by_text("Requested: not Smiling")).to_be_visible()
            first = images("#draw", "#drawn", 8)
            seed = page.get_by_label("Seed", exact=True).input_value()
            page.screenshot(path=tmp_path / "draw.png")
            page.click("#draw")
            expect(page.get_by_label("Seed", exact=True)).not_to_have_value(seed)
            expect(page.locator("#drawn .grid-container img").first).not_to_have_attribute("src", first)
            # 2. Vary a generated image; then upload one and edit its attributes.
            page.get_by_text("Edit the selected image").click()
            images("#change", "#changed", 9)
            page.locator("#upload input[type=file]").set_input_files(tmp_path / "good.png")
            page.get_by_text("Edit attributes", exact=True).click()
            images("#change", "#changed", 2)
            # 3. Upload a file that is not an image.
            page.locator("#upload input[type=file]").set_input_files(tmp_path / "bad.png")
            expect(page.get_by_text("bad.png cannot be opened as an image").first).to_be_visible()
            expect(page.locator("#upload img")).to_have_count(0)
            page.screenshot(path=tmp_path / "change.png")
            # 4. Inpaint: a message without a stroke, new images with one.
            page.get_by_role("tab", name="Generate").click()
            page.get_by_text("Inpaint the selected image").click()
            expect(page.locator("#editor canvas").first).to_be_visible()
            page.wait_for_timeout(1500)  # the canvas settles, without any sign in the page
            page.click("#inpaint")
            expect(page.get_by_text("paint over the part of the image").first).to_be_visible()
            box = page.locator("#editor canvas").first.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x - 60, y)
            page.mouse.down()
            page.mouse.move(x + 60, y, steps=12)
            page.mouse.up()
            page.wait_for_timeout(500)
            images("#inpaint", "#painted", 8)
            page.screenshot(path=tmp_path / "paint.png")
            assert outside == []
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    assert "OUTSIDE" not in log.read_text()
    assert "Traceback" not in log.read_text()
