"""`python -m fetal_flax …` is `fetal-flax …`."""

import sys

from fetal_flax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
