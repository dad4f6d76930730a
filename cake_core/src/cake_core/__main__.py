"""`python -m cake_core` is `cake`, for where scripts are not on the path."""

from cake_core.cli.main import main

if __name__ == "__main__":
    main()
