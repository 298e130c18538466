"""Run `dit-hf demo`: `python scripts/demo.py ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
