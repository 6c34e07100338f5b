"""`python -m fourierft_export`: the same as the console script."""

from fourierft_export.cli.main import main

if __name__ == "__main__":
    main()
