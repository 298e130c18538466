"""`accelerate launch scripts/evaluate.py MODEL ...` is `dit-hf evaluate` on every rank."""

import sys

from dit_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
