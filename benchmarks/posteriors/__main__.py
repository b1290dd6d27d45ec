"""Command line of the collection: ``python -m benchmarks.posteriors --help``."""

import argparse

from . import ENTRIES, references


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(ENTRIES), metavar="NAME")
    parser.add_argument("--references", action="store_true", help="long runs of NUTS")
    options = parser.parse_args()
    names = options.only or list(ENTRIES)
    if options.references:
        references.write(names)


if __name__ == "__main__":
    main()
