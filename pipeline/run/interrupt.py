"""Interrupting the thread that a job runs in, from another one."""

from __future__ import annotations

import _thread
import ctypes
import signal
import threading


class Interrupt:
    """Called, it raises KeyboardInterrupt in the thread that made it, as Ctrl-C does in the main
    one. A thread that waits in C is interrupted when it comes back from there.
    """

    def __init__(self) -> None:
        self._thread = threading.current_thread()

    def __call__(self) -> None:
        # A process that a script began in the background ignores SIGINT.
        heard = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        if self._thread is threading.main_thread() and heard:
            _thread.interrupt_main()  # through the handler, and through waits of Ray
        else:
            ident, error = (
                ctypes.c_ulong(self._thread.ident or 0),
                ctypes.py_object(KeyboardInterrupt),
            )
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)
