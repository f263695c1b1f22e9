"""The metrics page that the front door puts together."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from roundhouse.openai.metrics import merged

SERVER = """# HELP requests_total Requests
# TYPE requests_total counter
requests_total{model="a"} 3
# HELP free Free blocks
# TYPE free gauge
free 7
"""
OWN = """# HELP requests_total Requests
# TYPE requests_total counter
requests_total{model="openai"} 4.0
# HELP seconds Seconds
# TYPE seconds histogram
seconds_sum 1.0
seconds_bucket{le="+Inf"} 1.0
seconds_count 1.0
"""


def test_families_of_both_pages_get_one_header() -> None:
    page = merged([SERVER, OWN])
    assert page.count("# TYPE requests_total") == page.count("# HELP requests_total") == 1
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert [sample.value for sample in families["requests"].samples] == [3, 4]
    assert len(families["seconds"].samples) == 3


def test_a_page_that_cannot_be_had_leaves_the_other() -> None:
    assert merged(["", OWN]) == merged([OWN])
