"""python -m eval.report"""

import sys

from periln.start import start

from ..arguments.report import check, parse

if __name__ == "__main__":
    sys.exit(start("eval.report", parse, check))
