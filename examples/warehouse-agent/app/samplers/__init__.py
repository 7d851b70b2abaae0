"""Every module in here is a sampler: its `sample(settings)` returns what goes under its name in each line.

To add one, add a file. Nothing else has to know it.
"""

from importlib import import_module
from pkgutil import iter_modules

SAMPLERS = {
    module.name: import_module(f"{__name__}.{module.name}").sample
    for module in sorted(iter_modules(__path__), key=lambda module: module.name)
}
