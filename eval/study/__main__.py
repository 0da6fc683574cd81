"""python -m eval.study"""

import sys

from periln.eval.arguments.study import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.study", parse, check))
