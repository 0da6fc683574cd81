"""python -m eval.retrofit"""

import sys

from periln.eval.arguments.retrofit import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.retrofit", parse, check))
