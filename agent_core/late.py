"""This module makes dataclasses that cost nothing until the first one is made.

A dataclass is compiled when its module is imported, a millisecond each. A process of the agent imports fifty
of them, uses a dozen, and often ends soon after: they took a quarter of each start. Here the standard
library's own decorator does the same work, only later: the first `C(…)` finishes the class.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["late_dataclass"]

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass as late_dataclass
else:
    C = TypeVar("C", bound=type)
    _finishing = threading.Lock()

    def late_dataclass(**options: Any) -> Callable[[C], C]:
        """`dataclasses.dataclass(**options)`, put off until the first instance is made.

        Until then `dataclasses.fields` does not know the class. Threads that meet at the first instance wait
        for each other.

        Raises:
            TypeError: the class inherits from one that is put off: its fields would be missed.
        """

        def put_off(cls: C) -> C:
            if any("__new__" in vars(base) for base in cls.__mro__[1:-1]):
                raise TypeError(f"{cls.__name__} inherits from a class that may not be finished")
            unfinished = [cls]

            def __new__(asked: type, /, *_: object, **__: object) -> Any:  # noqa: N807 - it is the class's
                if unfinished:
                    with _finishing:
                        if unfinished:
                            dataclasses.dataclass(**options)(cls)
                            unfinished.clear()
                return object.__new__(asked)

            cls.__new__ = __new__
            return cls

        return put_off
