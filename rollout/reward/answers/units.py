r"""Units at the end of a value, in English, Chinese and LaTeX; each with one name, so that 厘米, cm and centimetres are the same.

A single letter is surely a unit in \text alone: `5 m` and `5m` may be a product.
"""

from __future__ import annotations

import re

from rollout.reward.answers.phrases import is_noun

_NAMES = {
    "m": "m metre metres meter meters 米", "cm": "cm centimetre centimetres centimeter centimeters 厘米 公分",
    "mm": "mm millimetre millimetres millimeter millimeters 毫米", "dm": "dm decimetre decimeter decimeters 分米",
    "km": "km kilometre kilometres kilometer kilometers 千米 公里", "nm": "nm nanometer nanometers 纳米",
    "um": r"um μm \mum micron microns 微米", "ft": "ft foot feet 英尺", "in": "inch inches 英寸",
    "yd": "yd yds yard yards 码", "mi": "mi mile miles 英里", "g": "g gram grams 克", "kg": "kg kgs kilogram kilograms 千克 公斤",
    "mg": "mg milligram milligrams 毫克", "t": "t ton tons tonne tonnes 吨", "lb": "lb lbs pound pounds 磅",
    "oz": "oz ounce ounces",
    "jin": "斤", "L": "L l litre litres liter liters 升", "mL": "mL ml millilitre milliliter milliliters millilitres 毫升",
    "gal": "gal gallon gallons 加仑", "s": "s sec secs second seconds 秒 秒钟", "min": "min mins minute minutes 分钟",
    "h": "h hr hrs hour hours 小时 时", "day": "day days 天 日", "week": "week weeks 周 星期", "month": "month months 月 个月",
    "year": "yr yrs year years 年", "ms": "ms millisecond milliseconds 毫秒", "m^2": "平方米 平米", "cm^2": "平方厘米",
    "dm^2": "平方分米", "km^2": "平方千米 平方公里", "mm^2": "平方毫米", "ha": "hectare hectares 公顷", "m^3": "立方米",
    "cm^3": "立方厘米 cc", "dm^3": "立方分米", "mm^3": "立方毫米", "mu": "亩", "ft^2": "sqft",
    "yuan": "元 yuan RMB 块 块钱 人民币",
    "jiao": "角", "fen": "分", "dollar": "dollar dollars USD 美元",
    "cent": "cent cents 美分", "euro": "€ euro euros EUR 欧元", "pound sterling": "£ GBP 英镑", "rupee": "₹ rupee rupees Rs",
    "degree": r"^\circ degree degrees deg 度", "radian": "rad radian radians 弧度", "Celsius": r"^\circC 摄氏度 Celsius",
    "Fahrenheit": r"^\circF 华氏度 Fahrenheit", "K": "K kelvin kelvins", "N": "N newton newtons 牛 牛顿",
    "J": "J joule joules 焦 焦耳",
    "W": "W watt watts 瓦", "kW": "kW kilowatt kilowatts 千瓦", "V": "V volt volts 伏", "A": "A amp amps ampere amperes 安",
    "Pa": "Pa pascal pascals 帕", "kPa": "kPa 千帕", "Hz": "Hz hertz 赫兹", "kHz": "kHz", "MHz": "MHz", "eV": "eV", "keV": "keV",
    "MeV": "MeV", "ohm": r"ohm ohms \Omega 欧姆", "mol": "mol mole moles 摩尔", "C": "C coulomb coulombs 库仑", "T": "T tesla",
    "m/s": "mps 米每秒", "km/h": "kmh kmph kph 千米每小时 公里每小时", "mi/h": "mph", "erg": "erg ergs", "AU": "AU",
    "pc": "pc parsec parsecs",
    "kpc": "kpc", "Mpc": "Mpc", "kJ": "kJ", "kN": "kN", "mA": "mA", "cal": "cal calories", "kcal": "kcal",
    "%": r"% \% percent percentage pct 个百分点", "permil": r"\permil",
}  # fmt: skip
UNITS = {spelling: unit for unit, spellings in _NAMES.items() for spelling in spellings.split()}
"""Spelling → unit."""

_LETTERS = {spelling for spelling in UNITS if len(spelling) == 1 and spelling.isascii() and spelling.isalpha()}
_ONE = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
_POWER = r"(?:\^\{?-?\d\}?)?"
_SQUARE = r"(?:(?:square|sq\.?|cubic|cu\.?)\s+)?"
_SIMPLE = rf"{_SQUARE}(?:{_ONE})(?![A-Za-z]){_POWER}"
_COMPOUND = rf"{_SIMPLE}(?:\s*(?:/|\\cdot|\*|per|每|\s)\s*{_SIMPLE}){{0,3}}"
_IN_TEXT = re.compile(r"\s*\\text\{([^{}]*)\}\s*(\^\s*\{?\s*-?\d\s*\}?)?\s*$")
_TEXT_COMPOUND = re.compile(r"\\text\{[^{}]*\}\s*(?:\^\s*\{?-?\d\}?)?\s*(?:/|\\cdot)")
_AT_END = re.compile(rf"(?<![A-Za-z\\_^])\s*({_COMPOUND})\s*$")
_WHOLE = re.compile(rf"\s*({_COMPOUND})\s*")
_IN_PARENTHESES = re.compile(rf"(?P<value>.*[\d}})])\s*\(\s*(?P<unit>{_COMPOUND})\s*\)\s*")
_FACTORS = re.compile(r"[A-Za-z](?:\s+[A-Za-z](?:\^\{?\d\}?)?)+")
"""m g h: variables, unless a power is negative (m s^{-1})."""
_TOKEN = re.compile(rf"({_SQUARE})({_ONE})(?![A-Za-z])(?:\^\{{?(-?\d)\}}?)?|(/|per|每)")
_NUMERIC = re.compile(r"(?:[\d\s.,/^+*()\u4e00-\u9fff{}-]|\\(?:frac|sqrt|pi|times|cdot|pm)(?![a-zA-Z])|(?<=\d)[eE](?=[-+\d]))+")
"""A value that has a unit without \\text: digits, roots and π, no variables."""


def split_unit(text: str) -> tuple[str, str, bool]:
    """(value, unit, surely) of a cleaned text; unit "" where there is none. surely: it cannot be a variable. A \\text{…} that is
    no known unit (apples, per student) is taken off as an unknown one."""
    dollar = re.match(r"(-?\s*)(?:US)?\\?\$\s*(?=[\d.(\\])", text)
    if dollar:
        return dollar[1] + text[dollar.end() :], "dollar", True
    for sign, unit in (("¥", "yuan"), ("￥", "yuan"), ("€", "euro"), ("£", "pound sterling"), ("₹", "rupee")):
        if text.startswith(sign):
            return text[1:].strip(), unit, True
    if re.search(r"[\d}]\s*\\?\$$", text):
        return text.rstrip().rstrip("$").rstrip("\\").strip(), "dollar", True
    if _TEXT_COMPOUND.search(text):
        plain = re.sub(r"\\text\{([^{}]*)\}", r" \1", text)
        found = _AT_END.search(plain)
        if found is not None and _NUMERIC.fullmatch(plain[: found.start(1)]):
            return plain[: found.start(1)].strip(), _canonical(found[1]), True
    if (found := _IN_TEXT.search(text)) and text[: found.start()].strip():
        content = (found[1].strip() + (found[2] or "")).replace(" ^", "^")
        whole = _WHOLE.fullmatch(content)
        if whole is None and not is_noun(content):
            return text, "", True
        value, unit = text[: found.start()].strip(), _canonical(whole[1]) if whole else ""
        inner, inner_unit, _ = split_unit(value) if re.search(r"%\s*$|\\text\{[^{}]*\}\S{0,5}$", value) else (value, "", True)
        return inner, inner_unit or unit, True
    if (found := _IN_PARENTHESES.fullmatch(text)) and _NUMERIC.fullmatch(found["value"]):
        return found["value"].strip(), _canonical(found["unit"]), found["unit"] not in _LETTERS
    found = _AT_END.search(text)
    if found is None or not (value := text[: found.start(1)]).strip() or not _NUMERIC.fullmatch(value):
        return text, "", True
    if _FACTORS.fullmatch(found[1].strip()):
        return text, "", True
    spelling, spaced = found[1].strip(), value != value.rstrip()
    if spelling in _LETTERS and not (spaced or value[-1].isdigit()):
        return text, "", True
    return value.strip(), _canonical(spelling), spelling not in _LETTERS


def _canonical(spelling: str) -> str:
    """km/h and \\text{km} \\cdot h^{-1} the same."""
    powers: dict[str, int] = {}
    sign = 1
    for shape, name, power, per in _TOKEN.findall(spelling):
        if per:
            sign = -1
            continue
        unit = UNITS[name]
        base, _, inner = unit.partition("^")
        exponent = int(power or 1) * int(inner or 1) * (2 if shape.startswith("sq") else 3 if shape.startswith("cu") else 1)
        parts = base.split("/")
        for index, part in enumerate(parts):
            powers[part] = powers.get(part, 0) + sign * exponent * (-1 if index else 1)
        sign = 1
    return " ".join(f"{unit}^{power}" if power != 1 else unit for unit, power in sorted(powers.items()) if power)


def is_unit(text: str) -> bool:
    """Is the whole cleaned text a known unit?"""
    return _WHOLE.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", text)) is not None
