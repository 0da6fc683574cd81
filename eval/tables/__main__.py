"""python -m eval.tables"""

import sys

from periln.eval.arguments.tables import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.tables", parse, check))
