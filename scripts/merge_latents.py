"""Run `dit-hf merge-latents`: `python scripts/merge_latents.py ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["merge-latents", *sys.argv[1:]]))
