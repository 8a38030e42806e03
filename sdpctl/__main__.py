"""`python -m sdpctl`, and what the installed command calls."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the import below: no traceback

from sdpctl.cli import main

if __name__ == "__main__":
    main()
