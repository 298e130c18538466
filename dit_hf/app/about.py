"""The lines at the top of the page: what the model is, how large, under which licence, and where its card is."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..hub_ids import split_revision
from ..runs import RunFolder
from .studio import Studio

MAX_CHARACTERS = 300


def about(model: str, name: str, studio: Studio) -> str:
    """Return Markdown: the name, the first sentence of the model's card, and a line of facts.

    Args:
        model: What `dit-hf app` was called with.
        name: The title.
        studio: The loaded model.
    """
    height, width = studio.resolution
    facts = [f"{width} x {height} px", f"{studio.num_parameters / 1e6:,.1f} M parameters"]
    card = _card(model)
    if card is not None and (license := card.data.get("license_name") or card.data.get("license")):
        facts.append(f"licence {license}")
    if not Path(model).exists():
        repo_id, revision = split_revision(model)
        place = f"/tree/{quote(revision, safe='')}" if revision else ""
        facts.append(f"[model card](https://huggingface.co/{repo_id}{place})")
    sentence = _first_sentence(card.text) if card is not None else ""
    return f"# {name}\n{sentence or 'Images from a latent Diffusion Transformer.'}  \n{' · '.join(facts)}"


def _card(model: str) -> ModelCard | None:
    """Return the card of a model, or None if it has none that can be read: the page does without it."""
    path = RunFolder(Path(model)).card
    if Path(model).exists() and not path.is_file():
        return None
    try:
        if not path.is_file():
            repo_id, revision = split_revision(model)
            path = Path(hf_hub_download(repo_id, path.name, revision=revision))
        return ModelCard.load(path, ignore_metadata_errors=True)
    except (EntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        return None


def _first_sentence(text: str) -> str:
    """Return the first sentence of a card that is not a heading, image, table, code or HTML; '' if there is none."""
    for paragraph in text.split("\n\n"):
        line = " ".join(paragraph.split())
        if line and line[0] not in "#!|`<[-*>":
            sentence = line.partition(". ")[0].removesuffix(".") + "."
            return sentence[:MAX_CHARACTERS]
    return ""
