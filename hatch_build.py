"""The README in the package's metadata: its links lead to the repository, once pyproject.toml has its address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Markdown's and HTML's links and images whose target is a file of the repository.
_RELATIVE = re.compile(r'(?P<before>(?P<image>!?)\[[^]]*\]\(|src=")(?P<path>(?!https?:|#)[^)"]+)')


class ReadmeHook(MetadataHookInterface):
    """Fill in `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read the README, with absolute links if `[project.urls]` has a `Repository`."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        if repository is not None:
            text = absolute_links(text, repository.rstrip("/"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute_links(text: str, repository: str) -> str:
    """Return Markdown with the relative links and images in it leading to the main branch of a repository."""

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] or link["before"].startswith("src") else "blob"
        return f"{link['before']}{repository}/{kind}/main/{link['path']}"

    return _RELATIVE.sub(absolute, text)
