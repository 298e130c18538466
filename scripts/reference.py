"""`accelerate launch scripts/reference.py SOURCE ...` is `dit-hf reference` on every rank."""

import sys

from dit_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["reference", *sys.argv[1:]]))
