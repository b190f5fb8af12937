"""`python -m headscope` is the command `headscope`."""

import sys

from .cli import main

sys.exit(main())
