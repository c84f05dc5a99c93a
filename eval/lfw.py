"""`python -m eval.lfw ...` equals `facetrain lfw ...`."""

import sys

from facetrain.cli import main

if __name__ == "__main__":
    main(["lfw", *sys.argv[1:]])
