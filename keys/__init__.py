"""Why anyone believes a release."""

import agent_core.late_signers  # noqa: F401 - before anything loads securesystemslib
