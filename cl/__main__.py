"""`python -m cl` is `cl-run`."""

from cl.app.cli import main

if __name__ == "__main__":
    main()
