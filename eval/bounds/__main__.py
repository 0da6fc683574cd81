"""python -m eval.bounds"""

import sys

from periln.start import start

from ..arguments.bounds import check, parse

if __name__ == "__main__":
    sys.exit(start("eval.bounds", parse, check))
