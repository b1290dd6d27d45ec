"""Holds ``stochgrad.infer`` to other people's posteriors: ``python -m benchmarks.posteriors``.

Without an option but ``--method`` it runs every posterior and writes the results and the page.
"""

import argparse

from . import ENTRIES, beside_nuts, compare, references, tables


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.posteriors", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", nargs="+", choices=sorted(ENTRIES), metavar="NAME")
    parser.add_argument("--method", choices=["sghmc", "auto", "nuts"], default="sghmc")
    parser.add_argument("--references", action="store_true", help="long runs of NUTS instead")
    parser.add_argument("--beside-nuts", action="store_true", help="data of growing size instead")
    parser.add_argument("--rows", nargs="+", type=int, choices=list(beside_nuts.ROWS))
    parser.add_argument("--page", action="store_true", help="the page alone, from saved results")
    options = parser.parse_args()
    names = options.only or list(ENTRIES)
    if options.references:
        references.write(names)
        return
    if options.beside_nuts:
        beside_nuts.run(options.rows)
    elif not options.page:
        compare.run(names, options.method)
    tables.write()


if __name__ == "__main__":
    main()
