"""``python -m shmroute.pager``: the pager that an owner starts. Users start one with ``shmroute pager``."""

from __future__ import annotations

import argparse
import sys

from shmroute.errors import ShmrouteError
from shmroute.pager.process import run_pager
from shmroute.shared.kernel import load_kernels
from shmroute.shared.segment import attach_segment


def main() -> int:
    """Serve one segment until it is destroyed or its owner and workers are gone."""
    parser = argparse.ArgumentParser(prog="python -m shmroute.pager")
    parser.add_argument("name", help="of the segment")
    parser.add_argument("--uuid", required=True, help="of the segment, in case its name was taken over")
    parser.add_argument("--owner", required=True, type=int, help="identity word of the owner")
    arguments = parser.parse_args()
    try:
        load_kernels()
        segment = attach_segment(arguments.name)
        if segment.uuid != arguments.uuid:
            print(f"shmroute pager: {arguments.name!r} is another segment by now", file=sys.stderr)
            return 1
        run_pager(segment, owner=arguments.owner)
    except ShmrouteError as error:
        print(f"shmroute pager: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
