"""Words that change what the number beside them says: `not 5`, `half of 7`, `7 below zero`, 7的一半."""

from __future__ import annotations

import re

_DENIAL = (
    r"not|never|no|none|nor|neither|isn't|aren't|cannot|can't|n't|except|excluding|excludes?|excluded|exclude|without|unless|"
    r"instead|rather|but|wrong|false|incorrect|impossible|eliminated?|rule out|ruled out|unlikely"
)
_HEDGE = r"or|oder|maybe|perhaps|possibly|alternatively|either|versus|vs|else|if|guess"
_COMPARISON = r"than|least|most|greater|more|less|fewer|below|above|under|exceeds?|between|within|up to|minimum|maximum"
_OPERATION = (
    r"minus|negative|plus|times|multiplied|divided|multiply|divide|squared?|cubed?|root|half|halves|twice|double|triple|thrice|"
    r"third|quarter|power|powers|raised|log|logarithm|factorial|inverse|reciprocal|opposite|mod|modulo|remainder|choose|over|by|"
    r"point|sum|difference|product|quotient|pi|infinity|percent of|to the|of"
)
_NUMERAL = (
    r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|fifty|hundreds?|thousands?|millions?|billions?|"
    r"trillions?|dozens?|tenths?|hundredths?|thousandths?|thirds|quarters|fourths|fifths|sixths|sevenths|eighths|ninths"
)
_CHINESE_DENIAL = "不|非|没|未|错|除了|除去|除外|排除|否"
_CHINESE_TWIST = (
    "大于|小于|多于|少于|超过|至少|至多|最多|最少|以上|以下|以内|不足|或|可能|也许|负|零下|减|加|乘|除|平方(?!米|厘米|分米|千米|公里)|"
    "立方(?!米|厘米|分米)|次方|倒数|相反数|一半|半|打|根|阶乘|分之|余|点|的|亏|又|[零一二两三四五六七八九十百千万亿]"
)

DENIES = re.compile(rf"(?<![a-z])(?:{_DENIAL})(?![a-z])|n't\b|{_CHINESE_DENIAL}", re.IGNORECASE)
"""The text takes something back."""
HEDGES = re.compile(rf"(?<![a-z])(?:{_HEDGE})(?![a-z])|或|可能|也许|还是|若|如果", re.IGNORECASE)
"""The text offers something else."""
TWISTS = re.compile(
    rf"(?<![a-z])(?:{_DENIAL}|{_HEDGE}|{_COMPARISON}|{_OPERATION}|{_NUMERAL})(?![a-z])|n't\b|{_CHINESE_DENIAL}|{_CHINESE_TWIST}",
    re.IGNORECASE,
)
"""A denial, a hedge, a comparison, an operation or another number: what stands beside it is not the number alone."""


def is_noun(words: str) -> bool:
    """May the words after a number name what is counted? Not a bare `times`: 7 times is a count."""
    return words.strip() in ("times", "倍") or (TWISTS.search(words) is None and re.search(r"\d", words) is None)
