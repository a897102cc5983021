"""`python -m albireo` is the command `albireo`."""

from albireo.cli.main import main

if __name__ == "__main__":
    main()
