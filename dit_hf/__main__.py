"""Run `dit-hf` as `python -m dit_hf`."""

import sys

from dit_hf_cli import main

sys.exit(main())
