"""The command as a module: `python -m smartmoe plan ...` where no `smartmoe` is on the path."""

import sys

from smartmoe.cli import main

sys.exit(main())
