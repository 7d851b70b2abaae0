"""Who gets a release, and when."""

import agent_core.late_signers  # noqa: F401 - before anything loads securesystemslib
