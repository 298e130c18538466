"""`python -m dit_hf` is `dit-hf`."""

import sys

from .cli import main

sys.exit(main())
