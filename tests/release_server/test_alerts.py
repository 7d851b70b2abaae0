"""The alerts of `deploy/prometheus`: taken by Prometheus, and none speaks up before its number."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
RULES = HOUSE / "deploy" / "prometheus" / "relfleet.rules.yml"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Debian's prometheus, is not here")


def promtool(*words, given=None):
    found = subprocess.run([PROMTOOL, *words], input=given, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@needs_promtool
def test_promtool_takes_the_rules_the_scrape_job_and_what_is_scraped(
    client, token, accept, trusted, make_jobs, tmp_path
):
    accept(trusted.targets())
    assert make_jobs().tick()
    promtool("check", "rules", str(RULES))
    page = (HOUSE / "docs" / "operations.md").read_text()
    block = next(
        each for each in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "scrape_configs" in each
    )
    (tmp_path / "relfleet.rules.yml").write_text(RULES.read_text())
    (tmp_path / "reader.token").write_text("rft_x")
    (tmp_path / "prometheus.yml").write_text(block.replace("/etc/prometheus/", ""))
    promtool("check", "config", str(tmp_path / "prometheus.yml"))
    answer = client.get("/metrics", headers={"Authorization": f"Bearer {token('reader')}"})
    promtool("check", "metrics", given=answer.text)


ALARMS = {
    "RelfleetRoleExpired": ('relfleet_role_expires_in_seconds{role="root"}', 0, 1),
    "RelfleetOnlineRoleStalled": ('relfleet_role_expires_in_seconds{role="timestamp"}', 43_199, 43_201),
    "RelfleetTargetsExpire": ('relfleet_role_expires_in_seconds{role="targets"}', 1_209_599, 1_209_601),
    "RelfleetRootExpires": ('relfleet_role_expires_in_seconds{role="root"}', 5_183_999, 5_184_001),
    "RelfleetSignerAway": ("relfleet_signer_up", 0, 1),
    "RelfleetJobsAway": ("relfleet_jobs_lease_age_seconds", 121, 120),
    "RelfleetWebhookWaits": ("relfleet_webhook_oldest_pending_seconds", 3601, 3600),
    "RelfleetMetricsAway": ('up{job="relfleet"}', 0, None),
}


def test_each_alert_has_its_row():
    assert set(re.findall(r"alert: (\w+)", RULES.read_text())) == set(ALARMS)


@needs_promtool
@pytest.mark.parametrize("alert", ALARMS)
def test_an_alert_speaks_up_at_its_number_and_not_before(alert, tmp_path):
    series, bad, good = ALARMS[alert]
    tests = []
    for value, speaks in [(bad, True)] + ([(good, False)] if good is not None else []):
        query = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) > bool 0'
        expected = [{"labels": "{}", "value": 1}] if speaks else []
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": f"{value}x180"}],
                "promql_expr_test": [{"expr": query, "eval_time": "2h", "exp_samples": expected}],
            }
        )
    (tmp_path / "tests.yml").write_text(json.dumps({"rule_files": [str(RULES)], "tests": tests}))
    promtool("test", "rules", str(tmp_path / "tests.yml"))
