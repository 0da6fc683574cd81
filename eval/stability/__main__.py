"""python -m eval.stability"""

import sys

from periln.start import start

from ..arguments.stability import check, parse

if __name__ == "__main__":
    sys.exit(start("eval.stability", parse, check))
