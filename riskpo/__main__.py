"""`python -m riskpo`."""

import sys

from riskpo.cli import main

sys.exit(main())
