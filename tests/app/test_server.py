"""The served page: whom it answers, which files it opens, and how much it takes."""

import http.client
import json
import socket
from urllib.parse import urlsplit

import pytest
from conftest import tiny_pipeline
from PIL import Image

from dit_hf.app.page import build_page
from dit_hf.app.server import MAX_FILE_BYTES, MAX_WAITING, check_address, serve
from dit_hf.app.studio import Studio

FORM = "multipart/form-data; boundary=x"
FILE = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'


class Client:
    """Requests to the app, in the name of any host."""

    def __init__(self, url):
        self.address = urlsplit(url).netloc

    def request(self, method, path, body=b"", **headers):
        connection = http.client.HTTPConnection(self.address, timeout=30)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"/gradio_api{path}", body, {"Host": self.address, **headers})
        response = connection.getresponse()
        return response.status, response.read().decode()

    def call(self, name, data):
        """Return the events of one call."""
        body = json.dumps({"data": data}).encode()
        status, answer = self.request("POST", f"/call{name}", body, Content_Type="application/json")
        assert status == 200, answer
        return self.request("GET", f"/call{name}/{json.loads(answer)['event_id']}")[1]

    def upload(self, content, **headers):
        return self.request("POST", "/upload", FILE % content, Content_Type=FORM, **headers)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The app of a tiny model, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        # What the app changes in Pillow, for the whole process, is put back.
        patch.setattr(Image, "ID", list(Image.ID))
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        studio = Studio(tiny_pipeline())
        page = build_page(studio, "model", "dit_hf: model", "# model")
        yield Client(serve(page, "127.0.0.1", None))
        page.close()
        studio.close()


def calls_with_images(client):
    """Name, data and positions of images, of each call that takes an image, as its documentation shows them."""
    endpoints = json.loads(client.request("GET", "/info")[1])["named_endpoints"]
    for name, endpoint in endpoints.items():
        parameters = endpoint["parameters"]
        images = [i for i, p in enumerate(parameters) if p["component"] in ("Image", "Gallery", "Imageeditor")]
        if images:
            data = [p.get("parameter_default") if p.get("parameter_has_default") else 0 for p in parameters]
            yield name, data, [(i, parameters[i]["component"]) for i in images]


def forms(component, path):
    """Every form in which a request may name a file for a component."""
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}, {"path": path, "url": "/x"}]
    for file in files:
        if component == "Gallery":
            yield from ([{"image": file, "caption": None}], [{"image": file}], [[file, None]])
        elif component == "Imageeditor":
            yield from ({"background": file, "layers": [], "composite": None}, {"background": None, "layers": [file]})
        else:
            yield file


def test_files_that_were_not_uploaded_are_not_opened(served, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (16, 16), "red").save(secret)
    tried = 0
    for name, data, images in calls_with_images(served):
        for position, component in images:
            others = [next(forms(component, path)) for path in ("/dev/zero", "http://127.0.0.1:9/x.png")]
            for form in [*forms(component, str(secret)), *others]:
                answer = served.call(name, [*data[:position], form, *data[position + 1 :]])
                assert "event: error" in answer, (name, form, answer)
                tried += 1
    assert tried > 30


def test_uploaded_images_are_opened_by_the_same_calls(served, tmp_path):
    Image.radial_gradient("L").resize((16, 16)).save(tmp_path / "a.png")
    (path,) = json.loads(served.upload((tmp_path / "a.png").read_bytes())[1])
    for name, data, images in calls_with_images(served):
        for position, component in images:
            # Inpainting without a stroke and an edit of nothing are refused, after their images were opened.
            answer = served.call(name, [*data[:position], next(forms(component, path)), *data[position + 1 :]])
            # An image is handed over from the results, of which none is selected here.
            refused = ("paint over the part of the image", "choose at least one attribute", "choose an image of the")
            assert "event: complete" in answer or any(text in answer for text in refused), (name, answer)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n", b"8BPS"])
def test_ghostscript_is_not_started_for_an_upload(served, tmp_path, monkeypatch, content):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (path,) = json.loads(served.upload(content)[1])
    for name, data, images in calls_with_images(served):
        for position, component in images:
            form = next(forms(component, path))
            assert "event: error" in served.call(name, [*data[:position], form, *data[position + 1 :]])
    assert not (tmp_path / "started").exists()


def test_only_pages_of_this_machine_are_answered(served):
    port = served.address.rpartition(":")[2]
    evil, own = f"evil.example:{port}", f"localhost:{port}"
    for host, origin, status in [
        (evil, None, 403),
        (evil, f"http://{evil}", 403),
        (own, f"http://{evil}", 403),
        (own, "null", 403),
        ("127.0.0.1.evil.example", None, 403),
        (own, None, 200),
        (own, f"http://{own}", 200),
        (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}", 200),
    ]:
        headers = {"Host": host, **({"Origin": origin} if origin else {})}
        assert served.request("GET", "/info", **headers)[0] == status, headers
        assert served.upload(b"x", **headers)[0] == status, headers


def test_large_uploads_are_refused(served):
    assert served.upload(bytes(MAX_FILE_BYTES + 1))[0] == 413
    assert served.request("POST", "/upload", b"", Content_Length=str(10**12), Content_Type=FORM)[0] == 413


def test_images_that_are_too_large_together_are_not_decoded(served, tmp_path, monkeypatch):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    (path,) = json.loads(served.upload((tmp_path / "a.png").read_bytes())[1])
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    monkeypatch.setattr("dit_hf.app.server.MAX_REQUEST_PIXELS", 3 * 256)
    settings = [1, 1, 1.0, 0, False, 2, 3]
    for layers, answer in ((1, "event: complete"), (100, "images of more than 768 pixels together")):
        editor = {"background": file, "layers": [file] * layers, "composite": None}
        assert answer in served.call("/inpaint", [editor, *settings]), layers
    monkeypatch.setattr("dit_hf.app.server.MAX_PIXELS", 255)
    assert "an image of more than 255 pixels" in served.call("/fit", [file])


def test_what_cannot_be_read_is_one_line(served, tmp_path):
    Image.effect_noise((64, 64), 99).save(tmp_path / "a.png")
    (path,) = json.loads(served.upload((tmp_path / "a.png").read_bytes()[:2000])[1])
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    editor = {"background": file, "layers": [], "composite": None}
    assert "cannot be read: image file is truncated" in served.call("/uploaded", [editor])
    assert "cannot be read: '<' not supported" in served.call("/generate", ["x", 1, 1.0, 0, False, 2, 3])
    assert "is greater than maximum value" in served.call("/generate", [1, 1, 1.0, 2**64, False, 2, 3])


def test_a_broken_upload_is_named(served):
    broken = {"path": json.loads(served.upload(b"no image")[1])[0], "orig_name": "bad.png"}
    calls = [(name, data, images[0][0]) for name, data, images in calls_with_images(served) if images[0][1] == "Image"]
    assert len(calls) == 4
    for name, data, position in calls:
        data[position] = {**broken, "meta": {"_type": "gradio.FileData"}}
        assert "bad.png cannot be opened as an image; take a PNG or JPEG" in served.call(name, data)


def test_a_full_queue_says_so(served):
    parameters = json.loads(served.request("GET", "/info")[1])["named_endpoints"]["/generate"]["parameters"]
    body = json.dumps({"data": [parameter.get("parameter_default") for parameter in parameters]}).encode()
    answers = [
        served.request("POST", "/call/generate", body, Content_Type="application/json") for _ in range(4 * MAX_WAITING)
    ]
    assert any(status != 200 and "ueue is full" in answer for status, answer in answers), answers


def test_an_address_of_another_machine_is_one_line():
    with pytest.raises(ValueError, match=r"host 192\.0\.2\.1: not an address of this machine"):
        check_address("192.0.2.1", None)
    check_address("127.0.0.1", None)
    check_address("localhost", None)


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"^port {port}: address already in use; give another --port"):
            check_address("127.0.0.1", port)
