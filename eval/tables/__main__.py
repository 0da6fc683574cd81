"""python -m eval.tables"""

import sys

from periln.start import start

from ..arguments.tables import check, parse

if __name__ == "__main__":
    sys.exit(start("eval.tables", parse, check))
