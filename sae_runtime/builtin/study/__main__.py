"""Measures what features of the builtin model do, and prints the tables of STUDY.md.

    python -m sae_runtime.builtin.study              # all of it: a few minutes on one core
    python -m sae_runtime.builtin.study --speed      # only the speed of the shared prefix

Everything comes from the package: the builtin model, its dictionaries and its held-out text. Documents are split in
two by a seed: features are found (and the strength of their edits is chosen) on one half, effects are measured on the
other.
"""

import argparse

from sae_runtime.builtin.study.measure import Study
from sae_runtime.builtin.study.speed import speed_table
from sae_runtime.builtin.study.tables import tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the halves and of the bootstrap")
    parser.add_argument("--speed", action="store_true", help="measure the speed only")
    arguments = parser.parse_args()
    study = Study(arguments.seed)
    print(speed_table(study) if arguments.speed else tables(study))


if __name__ == "__main__":
    main()
