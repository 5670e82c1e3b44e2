"""`python -m compacter_kernels`, the same as the command `compacter-kernels`."""

import sys

from compacter_kernels.cli import main

sys.exit(main())
