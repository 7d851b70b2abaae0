"""The library's rarer signers are loaded when they are used, and are then what they always were."""

from __future__ import annotations

import subprocess
import sys

from agent_core.late_signers import LATE, PACKAGE


def fresh(code: str) -> str:
    """What the code prints in an interpreter that has loaded nothing yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_agent_and_a_release_manager_load_none_of_them():
    for module in ("updater.catalog", "keys.signers"):
        loaded = f"import sys, {module}; print([n for n in sys.modules if 'pkcs11' in n or '_gpg' in n])"
        assert fresh(loaded) == "['securesystemslib.signer._gpg_signer']", "the stand-in alone"


def test_each_stands_for_a_class_of_the_library_under_its_own_scheme():
    known = {scheme for classes in LATE.values() for scheme in classes.values() if scheme}
    # By the library itself, where no stand-in was put first.
    table = fresh(
        f"from {PACKAGE} import SIGNER_FOR_URI_SCHEME as all;"
        "import json; print(json.dumps({s: c.__name__ for s, c in all.items()}))"
    )
    late = fresh(
        f"import keys; from {PACKAGE} import SIGNER_FOR_URI_SCHEME as all;"
        "import json; print(json.dumps({s: c.__name__ for s, c in all.items()}))"
    )
    assert late == table
    assert {scheme for scheme in known if f'"{scheme}"' in table} == known - {"sigstore"}


def test_what_is_asked_of_one_is_answered_by_the_library():
    key = '{"keytype": "rsa", "scheme": "pgp+rsa-pkcsv1.5", "keyval": {"public": "x"}}'
    code = (
        f"import json, keys; from {PACKAGE} import Key, GPGKey, HSMSigner;"
        f"key = Key.from_dict('a', json.loads('{key}'));"
        "print(type(key).__module__, isinstance(key, GPGKey), HSMSigner.import_.__qualname__)"
    )
    assert fresh(code) == f"{PACKAGE}._gpg_signer True HSMSigner.import_"
