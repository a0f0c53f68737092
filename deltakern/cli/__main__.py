"""``python -m deltakern.cli``."""

import sys

from deltakern.cli import main

sys.exit(main())
