"""`Retry-After` as servers and proxies say it, and as nobody should."""

from __future__ import annotations

from datetime import timedelta
from email.utils import format_datetime

from agent_core import clock
from agent_core.retry_after import retry_after_s


def test_retry_after_may_be_a_date_and_nonsense_is_none() -> None:
    soon = clock.now() + timedelta(seconds=90)
    assert 80 < (retry_after_s(format_datetime(soon, usegmt=True)) or 0) <= 90
    assert retry_after_s(format_datetime(soon - timedelta(days=1), usegmt=True)) == 0
    assert retry_after_s("99999999999") == 86_400
    odd = (None, "", "soon", "-5", "٣", "\x1e2", "Wed, 21 Oct 2026 07:28:00 +" + "9" * 30)
    assert [retry_after_s(text) for text in odd] == [None] * len(odd)
    assert retry_after_s(" 2\t") == 2
