"""python -m eval.bounds"""

import sys

from periln.eval.arguments.bounds import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.bounds", parse, check))
