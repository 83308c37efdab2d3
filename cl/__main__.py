"""`python -m cl` is `cl-run`."""

from cl.cli import main

if __name__ == "__main__":
    main()
