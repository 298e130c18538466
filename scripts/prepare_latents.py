"""Run `dit-hf prepare-latents`: `python scripts/prepare_latents.py ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare-latents", *sys.argv[1:]]))
