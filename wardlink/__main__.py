"""`python -m wardlink` is the `wardlink` command."""

import sys

from wardlink.cli import main

sys.exit(main())
