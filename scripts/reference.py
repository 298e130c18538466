"""Run `dit-hf reference` on every rank: `accelerate launch scripts/reference.py SOURCE ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["reference", *sys.argv[1:]]))
