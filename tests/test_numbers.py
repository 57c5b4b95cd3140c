"""Numbers in answers."""

from fractions import Fraction

import pytest

from jaxchat.tasks.numbers import last_number, read_number


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, value",
    [
        ("18", 18),
        ("18.", 18),
        ("18.00", 18),
        ("$18", 18),
        ("$ 18", 18),
        ("1,800", 1800),
        ("-3", -3),
        ("-$3", -3),
        ("5%", 5),
        ("18 dollars", 18),
        ("\u22123", -3),
        ("- 3", -3),
        ("1/2.", Fraction(1, 2)),
        ("12-5", 12),
        (".5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("8 000", 8000),
        ("8\u00a0000 dollars", 8000),
        ("1\u202f234\u202f567.5", Fraction("1234567.5")),
        ("8'000", 8000),
        ("8\u2007000", 8000),
        ("8\u200a000", 8000),
        ("8\\;000", 8000),
        ("8\\ 000", 8000),
        ("1~234~567", 1234567),
        ("3~5", 3),
        ("+5", 5),
        ("\u20135", -5),
        ("5\u201310", 5),
        ("12,34,567", 1234567),
        ("1.234.567", 1234567),
        ("-12.345.678,5 Euro", Fraction(-24691357, 2)),
        ("1.234", Fraction(617, 500)),
        ("1.2.3", Fraction(6, 5)),
        ("5\u00d710\u00b3", 5000),
        ("5 \u22c5 10^\u22123", Fraction(1, 200)),
        ("2.5 x 10\u207b\u00b9\u2070 m", Fraction(1, 4 * 10**9)),
        ("8{,}000", 8000),
        ("10,\\!000", 10_000),
        ("\\$8\\,000", 8000),
        ("\u20ac18", 18),
        ("1,2,3", 1),
        ("8 0000", 8),
        ("2020 300", 2020),
        ("1,000 2,000", 1000),
        ("1.5e3", 1500),
        ("-2E+2", -200),
        ("1.5 x 10^3", 1500),
        ("1.5 \\times 10^{-1}", Fraction(3, 20)),
        ("1e999999999", None),
        ("5eggs", 5),
        ("2 1/2", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("2\u00bd", Fraction(5, 2)),
        ("\u00be", Fraction(3, 4)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("2\\frac12", Fraction(5, 2)),
        ("3/1,000", Fraction(3, 1000)),
        ("2 16/2.5", 2),
        ("1/0", None),
        ("eighteen", None),
        ("", None),
        (".", None),
    ],
)
def test_a_number_is_read_however_it_is_written(text, value):
    assert read_number(text) == value


@pytest.mark.quick
def test_the_last_number_is_the_last_however_it_ends():
    assert last_number("He had 5 and then 1,800. That is $3.50.") == Fraction(7, 2)
    assert last_number("so 12 / 4 = 3.") == 3
    assert last_number("That is one half: 1/2.") == Fraction(1, 2)
    assert last_number("It fell to -3.") == -3 and last_number("Option 2 \u2013 it fell to \u20133.") == -3
    assert last_number("Es sind 1.234.567.") == 1234567 and last_number("About 5\u00d710\u00b3.") == 5000
    assert last_number("1,2,3") == 3 and last_number("It is 1, 2 or 3,000.") == 3000
    assert last_number(r"\boxed{8{,}000}") == 8000 and last_number(r"Thus $-\frac{1}{2}$.") == Fraction(-1, 2)
    assert last_number("In all 2 1/2 cups.") == Fraction(5, 2) and last_number("2 and 1/2.") == Fraction(1, 2)
    assert last_number("none") is None and last_number("1" * 5000 + "/" + "1" * 5000) is None


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    ["7 + 512", "10 - 3", "10-3", "16 / 2", "(1 + 2) * 4", "3 x 4 apples", "3 \u00d7 4", r"3 \times 4", r"3\div 4"],
)
def test_the_end_of_a_calculation_is_no_answer(text):
    assert last_number(text) is None
