"""Cards that are renewed on the Hub: what their owner changed there stays, everything else is written anew.

A block of a card stands between two comments, `<!-- dit_hf: begin NAME HASH -->` and `<!-- dit_hf: end NAME -->`. The
hash is that of its text, by which an edited one is known.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

import yaml
from huggingface_hub.utils import yaml_dump

_BLOCK = re.compile(
    r"<!-- dit_hf: begin (?P<name>\w+)(?: (?P<hash>[0-9a-f]+))? -->\n(?P<text>.*?)<!-- dit_hf: end (?P=name) -->",
    re.DOTALL,
)
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(?P<yaml>(?:[^\n]*\n)*?)---[ \t]*(?:\n|$)(?P<body>.*)", re.DOTALL)
LICENSE = ("license", "license_name", "license_link")


def renew_card(
    new: str,
    theirs: str,
    base: dict[str, Any] | None,
    renewed: Collection[str] = (),
    is_only_file: bool = False,
) -> tuple[str, list[str]]:
    """Renew a card on the Hub, and keep what its owner changed.

    Args:
        new: The new card, its blocks signed or not.
        theirs: The card on the Hub.
        base: The metadata of the card that was pushed last; None if that is not known, and all of theirs is kept.
        renewed: Keys of the metadata that are always taken from the new card.
        is_only_file: Whether the repository holds nothing else, so that a card without blocks is no earlier one: the
            new card follows its text.

    Returns:
        The card, and names of what was kept though the new card has something else there.
    """
    theirs = theirs.replace("\r\n", "\n")
    old_yaml, old_body = _split(theirs)
    try:
        old = yaml.safe_load(old_yaml) or {}
        if not isinstance(old, dict):
            raise ValueError("not a mapping")
    except (yaml.YAMLError, ValueError):
        return theirs, ["its metadata, which cannot be read"]
    new_yaml, new_body = _split(sign_blocks(new))
    metadata, kept = _merge_metadata(yaml.safe_load(new_yaml) or {}, old, base, renewed)

    # Blocks that are there are renewed; one that was deleted stays so.
    blocks = {block["name"]: block for block in _BLOCK.finditer(new_body)}

    def renew(block: re.Match[str]) -> str:
        newer = blocks.get(block["name"])
        if newer is not None and newer["text"] == block["text"]:
            return block[0]
        if newer is None or block["hash"] != _hash(block["text"]):
            kept.append(f"the section {block['name']}")
            return block[0]
        return newer[0]

    if _BLOCK.search(old_body):
        body = _BLOCK.sub(renew, old_body)
    elif is_only_file:
        body = "\n\n".join(filter(None, (old_body.strip(), new_body.strip()))) + "\n"
    else:
        body = old_body
        kept.append("its text, which has no sections of ours (delete README.md there to have it written anew)")
    # Comments in their metadata survive if nothing changes.
    front_matter = (old_yaml if metadata == old else yaml_dump(metadata)).rstrip()
    return f"---\n{front_matter}\n---\n\n{body.lstrip()}", kept


def sign_blocks(card: str) -> str:
    """Write the hash of each block's text into the comment before it."""

    def sign(block: re.Match[str]) -> str:
        name, text = block["name"], block["text"]
        return f"<!-- dit_hf: begin {name} {_hash(text)} -->\n{text}<!-- dit_hf: end {name} -->"

    return _BLOCK.sub(sign, card)


def card_metadata(card: str) -> dict[str, Any]:
    """Return the metadata of a card of ours."""
    return yaml.safe_load(_split(card)[0]) or {}


def _split(card: str) -> tuple[str, str]:
    """Return the YAML at the beginning of a card, '' if there is none, and the text after it."""
    found = _FRONT_MATTER.fullmatch(card)
    return (found["yaml"], found["body"]) if found else ("", card)


def _merge_metadata(
    new: dict[str, Any], old: dict[str, Any], base: dict[str, Any] | None, renewed: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata that is pushed, and the keys whose values were kept though ours differ."""
    if base is None:
        changed = {*old} - {*renewed}
    else:
        changed = {key for key in {*old, *base} if old.get(key) != base.get(key)} - {*renewed}
    # The name and the link of a licence belong to it.
    if "license" in changed:
        changed |= {*LICENSE}
    theirs = {key: value for key, value in old.items() if key in changed}
    ours = {key: value for key, value in new.items() if key not in changed}
    order = [*old, *(key for key in new if key not in old)]
    merged = {key: (theirs | ours)[key] for key in order if key in theirs or key in ours}
    return merged, [key for key in new if key in theirs and theirs[key] != new[key]]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
