"""A live page of running pretrainings: `python -m eval.live RUNS`."""

import sys

from periln.eval.arguments.live import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.live", parse, check))
