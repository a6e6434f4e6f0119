"""The demo's task: coffee orders in plain English, some with a correction, to be written as one line of JSON."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from typing import NamedTuple

SYSTEM = "Reply in JSON: qty, size, item, milk, name."

QUANTITIES = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five", 6: "half a dozen", 12: "a dozen"}
SIZES = ("small", "medium", "large")
ITEMS = {
    "latte": "lattes",
    "mocha": "mochas",
    "cappuccino": "cappuccinos",
    "flat white": "flat whites",
    "hot chocolate": "hot chocolates",
    "chai": "chais",
}
MILKS = ("oat", "soy", "almond", "whole", None)
NAMES = ("Maria", "Ben", "Aisha", "Tom", "Chen", "Olga", "Sam", "Priya", "Luis", "Nora")
TEMPLATES = (
    "{drink} for {name}, please.",
    "Hi, can I get {drink}? The name is {name}.",
    "It's {name}. I'd like {drink}.",
    "{name} wants {drink} today.",
    "Could you make {drink} and put {name} on it?",
    "Order for {name}: {drink}.",
)
CORRECTIONS = {
    "qty": ("No, make that {}.", "Sorry, I meant {}."),
    "size": ("Make it {}.", "Sorry, {}, I mean."),
    "milk": ("No, {} milk.", "Actually, {} milk is better."),
    "name": ("It's for {}, in fact.", "No, put {} on it."),
}
CORRECTED_SHARE = 0.5


class Order(NamedTuple):
    """One order; `milk` is None when none is asked for."""

    qty: int
    size: str
    item: str
    milk: str | None
    name: str

    @property
    def json(self) -> str:
        """The answer wanted, on one line."""
        return json.dumps(self._asdict(), separators=(",", ":"))

    def text(self, template: str) -> str:
        """The order as a customer says it.

        >>> Order(2, "large", "latte", "oat", "Maria").text(TEMPLATES[0])
        'Two large lattes with oat milk for Maria, please.'
        """
        noun = self.item if self.qty == 1 else ITEMS[self.item]
        milk = f" with {self.milk} milk" if self.milk else ""
        said = template.format(drink=f"{QUANTITIES[self.qty]} {self.size} {noun}{milk}", name=self.name)
        return said[0].upper() + said[1:]


class Item(NamedTuple):
    """What is said and what should be written."""

    prompt: str
    completion: str


def make_items(n_train: int, n_test: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Draw items without repetition; no order of the test items occurs among the training items.

    Returns:
        n_train training items and n_test test items; the same for the same seed, on every platform.
    """
    draw = random.Random(seed)
    orders = [Order(*fields) for fields in itertools.product(QUANTITIES, SIZES, ITEMS, MILKS, NAMES)]
    items = [Item(_say(order, draw), order.json) for order in draw.sample(orders, n_train + n_test)]
    return items[:n_train], items[n_train:]


def is_exact(reply: str, wanted: str) -> bool:
    """Whether the reply is the wanted JSON, whatever its spacing and the order of its keys."""
    try:
        return bool(json.loads(reply) == json.loads(wanted))
    except ValueError:
        return False


def _say(order: Order, draw: random.Random) -> str:
    """The order in one of the templates; half of them say one thing wrong at first and then correct it."""
    template = draw.choice(TEMPLATES)
    correctable = [
        field for field in CORRECTIONS if getattr(order, field) is not None and (field, order.qty) != ("qty", 1)
    ]
    field = draw.choice(correctable)
    choices: Mapping[str, tuple[object, ...]] = {"qty": tuple(QUANTITIES), "size": SIZES, "milk": MILKS, "name": NAMES}
    slip = draw.choice([value for value in choices[field] if value != getattr(order, field)])
    correction = draw.choice(CORRECTIONS[field])
    if draw.random() >= CORRECTED_SHARE:
        return order.text(template)
    right = QUANTITIES[order.qty] if field == "qty" else getattr(order, field)
    slipped = Order(**{**order._asdict(), field: slip})
    return f"{slipped.text(template)} {correction.format(right)}"
