"""What an attention module cannot do, with the reason: the one table that the contract's tests and the catalogue read.

A promise that is listed here is expected to fail; one that holds after all must leave the table, or its test fails.
"""

from __future__ import annotations

# (registered name, check of tests/contract/test_attention_contract.py): the reason in a sentence
LIMITS: dict[tuple[str, str], str] = {}
