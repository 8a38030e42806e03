"""The entry point of `python -m sdpctl` and of the installed command."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the import below must not print a traceback

from sdpctl.cli import main

if __name__ == "__main__":
    main()
