"""`python -m finetrainers VERB`, so that `torchrun ... -m finetrainers VERB` works."""

import sys

from finetrainers.cli import main

sys.exit(main())
