"""python -m scripts.coordinate_check"""

import sys

from periln.scripts.arguments.coordinate_check import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.coordinate_check", parse, check))
