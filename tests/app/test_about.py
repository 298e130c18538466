"""The lines at the top of the page."""

import pytest
from conftest import tiny_pipeline

from dit_hf.app.about import about
from dit_hf.app.studio import Studio
from dit_hf_cli import main

CARD = """---
license: mit
---

# faces

![samples](samples.png)

| a | table |

Faces that
nobody has. They are drawn.

Another paragraph.
"""


@pytest.fixture
def studio():
    studio = Studio(tiny_pipeline())
    yield studio
    studio.close()


def test_the_header_is_the_cards_first_sentence_and_the_facts(studio, tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    size = f"{studio.num_parameters / 1e6:.1f} M parameters"
    expected = f"# faces\nFaces that nobody has.  \n16 x 16 px · {size} · licence mit"
    assert about(str(tmp_path), "faces", studio) == expected


def test_a_model_without_a_card_has_a_header_too(studio, tmp_path):
    assert "Images from a latent Diffusion Transformer." in about(str(tmp_path), "faces", studio)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe no text")
    assert "Images from a latent Diffusion Transformer." in about(str(tmp_path), "faces", studio)


def test_a_model_on_the_hub_is_linked(hub, model, studio, capsys):
    assert main(["push", model, "you/faces", "--license", "mit"]) == 0
    header = about("you/faces", "you/faces", studio)
    assert "\nA latent Diffusion Transformer (" in header
    assert header.endswith(" · licence mit · [model card](https://huggingface.co/you/faces)")


def test_a_revision_is_described_by_its_own_card(hub, studio):
    hub.repositories["you/faces@refs/pr/1"] = {"README.md": CARD.encode()}
    hub.repositories["you/faces"] = {}
    header = about("you/faces@refs/pr/1", "you/faces@refs/pr/1", studio)
    assert "\nFaces that nobody has." in header
    assert header.endswith(" · licence mit · [model card](https://huggingface.co/you/faces/tree/refs%2Fpr%2F1)")
