"""`python -m sdpctl`."""

from sdpctl.cli import main

if __name__ == "__main__":
    main()
