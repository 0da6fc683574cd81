"""python -m eval.stability"""

import sys

from periln.eval.arguments.stability import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.stability", parse, check))
