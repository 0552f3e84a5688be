"""`python -m lowsearch` is the `lowsearch` command."""

from lowsearch.cli import main

main()
