"""Entry of the console scripts: prepares the process, imports a command quietly interruptible, then runs it.

Imports nothing heavy itself.
"""

from __future__ import annotations

import importlib
import os
import signal

from replacement.allocator import keep_freed_memory


def start(module: str) -> int:
    """Import a module and run its `main`; returns the exit code.

    Ctrl-C while modules are imported, or while the interpreter shuts down, ends the process by the signal, as shells expect,
    because a `KeyboardInterrupt` there would print a traceback of code that is not the user's business. While `main` runs it
    is an exception again, so that scratch files are removed.
    """
    prepare()
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # ignored, as under nohup, or somebody else's
        return int(importlib.import_module(module).main())
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    try:
        signal.signal(signal.SIGINT, handler)
        code = int(main())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        code = 130
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def prepare() -> None:
    """Settings for a process that is going to compute, made before PyTorch is imported; those of the user come first.

    Freed memory is kept, and threads sleep while they wait for each other. By default the threads of OpenMP spin: as soon as
    another program wants a core, they take it from those they wait for, and two threads were several times slower than one.
    """
    keep_freed_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
