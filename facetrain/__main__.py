"""`python -m facetrain CMD` equals `facetrain CMD`."""

from facetrain.cli import main

main()
