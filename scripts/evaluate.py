"""Run `dit-hf evaluate` on every rank: `accelerate launch scripts/evaluate.py MODEL ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
