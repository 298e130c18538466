"""Run `dit-hf app`: `python scripts/app.py ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))
