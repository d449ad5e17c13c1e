"""The ahead-of-time gate from a checkout: `python -m tools.compile_check`."""

import sys

from riskpo_kernels.kernels.compile_check import main

if __name__ == "__main__":
    sys.exit(main())
