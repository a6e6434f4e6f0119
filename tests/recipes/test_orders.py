from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krontune.recipes.orders import CORRECTIONS, QUANTITIES, TEMPLATES, Order, is_exact, make_items


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 20))
def test_test_items_are_unseen(seed: int, n_train: int, n_test: int) -> None:
    training, test = make_items(n_train, n_test, seed)
    assert (len(training), len(test)) == (n_train, n_test)
    assert len({item.completion for item in training + test}) == n_train + n_test
    assert not {item.prompt for item in training} & {item.prompt for item in test}
    assert make_items(n_train, n_test, seed) == (training, test)


@given(st.integers(0, 2**31))
def test_the_answer_can_be_read_off_the_order(seed: int) -> None:
    """What the answer holds stands in the order, and a corrected value stands after the wrong one."""
    for item in make_items(10, 1, seed)[0]:
        wanted = json.loads(item.completion)
        said = f" {item.prompt.lower()} "
        for value in (QUANTITIES[wanted["qty"]], wanted["size"], wanted["item"], wanted["name"].lower()):
            assert value in said
        assert wanted["milk"] is None or f"{wanted['milk']} milk" in said


def test_about_half_the_orders_are_corrected() -> None:
    items = make_items(400, 1, 0)[0]
    starts = tuple({correction.partition("{}")[0] for field in CORRECTIONS.values() for correction in field})
    corrected = sum(any(f" {start}" in item.prompt for start in starts) for item in items)
    assert 0.4 < corrected / len(items) < 0.6


def test_a_sentence() -> None:
    order = Order(1, "small", "flat white", None, "Ben")
    assert order.text(TEMPLATES[0]) == "A small flat white for Ben, please."
    assert json.loads(order.json) == {"qty": 1, "size": "small", "item": "flat white", "milk": None, "name": "Ben"}


@pytest.mark.parametrize(
    ("reply", "exact"),
    [
        ('{"qty":2,"milk":null}', True),
        ('{ "milk": null, "qty": 2 }', True),
        ('{"qty":2,"milk":null}.', False),
        ('{"qty":"2","milk":null}', False),
        ('{"qty":2}', False),
        ("Sure! Here is your order", False),
        ("", False),
    ],
)
def test_exact_match_is_about_the_value(reply: str, exact: bool) -> None:
    assert is_exact(reply, '{"qty":2,"milk":null}') is exact
