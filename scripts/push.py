"""Run `dit-hf push ...`: `python scripts/push.py ...`."""

import sys

from dit_hf_cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
