"""python -m eval.report"""

import sys

from periln.eval.arguments.report import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.report", parse, check))
