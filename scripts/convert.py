"""Run `dit-hf convert ...`: `python scripts/convert.py ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
