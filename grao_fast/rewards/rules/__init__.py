"""Ready-made rewards that check a text by a rule.

Each scores a completion from 0 to 1, and takes text and messages alike. Columns of the dataset are
named by an argument.
"""

from grao_fast.rewards.rules.exact_match import ExactMatch
from grao_fast.rewards.rules.json_schema import JSONSchema
from grao_fast.rewards.rules.lengths import Length
from grao_fast.rewards.rules.mathematics import Math
from grao_fast.rewards.rules.patterns import Regex

__all__ = ["ExactMatch", "JSONSchema", "Length", "Math", "Regex"]
