"""python -m eval.formats"""

import sys

from periln.eval.arguments.formats import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.formats", parse, check))
