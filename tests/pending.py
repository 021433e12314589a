"""Golden vectors of features that this project does not have yet; tests read this table through tests/golden.py.

A row is a prefix of ``folder/name``, in which ``*`` matches anything. A suffix ``:values`` limits it to the test of that part (``values``,
``names``, ``assignment``, ``biases``); the other parts must pass. A vector is pending while any row matches it, and its test must fail
(strict xfail). A row that matches no vector fails test_coverage.py.
"""

from __future__ import annotations

PENDING: dict[str, str] = {}
