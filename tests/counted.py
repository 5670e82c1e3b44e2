"""How many inputs the tests of failures try: the same few in each run, many new ones at night.

A test with the marker `failure` names what could fail. It reports the number of its inputs with
`record_property("inputs", number)`; without a number, each of its parameters is one input.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

NIGHTLY = os.environ.get("COMPACTER_NIGHTLY") == "1"


def budget(every_run: int, nightly: int) -> int:
    """The number of inputs, or of training steps."""
    return nightly if NIGHTLY else every_run


def tries(every_run: int, nightly: int) -> settings:
    """Settings of hypothesis for that many inputs. Each night has others."""
    return settings(
        max_examples=budget(every_run, nightly),
        stateful_step_count=30,
        derandomize=not NIGHTLY,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
