"""``python -m shmroute``: the command line."""

from shmroute.cli import main

if __name__ == "__main__":
    main()
