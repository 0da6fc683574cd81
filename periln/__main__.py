"""python -m periln"""

import sys

from periln.command_line import main

if __name__ == "__main__":
    sys.exit(main())
