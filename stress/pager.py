"""``python -m stress.pager NAME UUID [--standby]``: a pager of a segment, which ends with the segment's owner.

As ``shmroute pager``, but it neither creates a segment nor outlives the owner. Prints a line at every change of its
role, and its outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from shmroute.errors import ShmrouteError
from shmroute.pager.process import run_pager
from shmroute.shared.kernel import load_kernels
from shmroute.shared.layout import HEADER_OWNER
from shmroute.shared.segment import attach_segment


def main() -> int:
    """Be the pager, or its standby, until the end."""
    parser = argparse.ArgumentParser(prog="python -m stress.pager")
    parser.add_argument("name", help="of the segment")
    parser.add_argument("uuid", help="of the segment")
    parser.add_argument("--standby", action="store_true", help="wait for the end of the pager at work")
    arguments = parser.parse_args()
    try:
        load_kernels()
        with contextlib.closing(attach_segment(arguments.name)) as segment:
            if segment.uuid != arguments.uuid:
                print(f"{arguments.name!r} is another segment by now", file=sys.stderr)
                return 1
            outcome = run_pager(
                segment,
                owner=segment.read(HEADER_OWNER),
                standby=arguments.standby,
                announce=lambda message: print(message, flush=True),
            )
    except ShmrouteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"outcome {outcome.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
