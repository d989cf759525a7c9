"""How conditional and unconditional arguments share a batch."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

from pydiff.run.conditions import check_condition, copy_into, join, map_tensors, structure


def test_tensors_are_stacked_unconditional_first() -> None:
    cond, uncond = torch.tensor([1, 2, 3]), torch.tensor([10, 11, 12])
    assert join({"y": uncond}, {"y": cond}, 3)["y"].tolist() == [10, 11, 12, 1, 2, 3]


def test_one_row_serves_the_batch() -> None:
    text = torch.arange(12.0).reshape(3, 2, 2)
    joined = join({"text": text[:1]}, {"text": text}, 3)["text"]
    assert torch.equal(joined, torch.cat([text[:1].expand(3, 2, 2), text]))
    assert join(torch.tensor(7), torch.tensor([1, 2]), 2).tolist() == [7, 7, 1, 2]


def test_a_number_fills_what_it_stands_for() -> None:
    assert join(10, torch.tensor([1, 2]), 2).tolist() == [10, 10, 1, 2]
    assert join(torch.tensor([1.0, 2.0]), 0, 2).tolist() == [1, 2, 0, 0]
    assert join(0, torch.ones(2, 3), 2).shape == (4, 3)


def test_nested_structures_keep_their_shape() -> None:
    a, b = torch.zeros(2, 1), torch.ones(2, 1)
    cond = {"added": {"text": b, "ids": [b, (b, b)]}, "mode": "xl", "scale": 2.0, "none": None}
    uncond = {"added": {"text": a, "ids": [a, (a, a)]}, "mode": "xl", "scale": 2.0, "none": None}
    joined = join(uncond, cond, 2)
    assert joined["mode"] == "xl" and joined["scale"] == 2.0 and joined["none"] is None
    for leaf in (joined["added"]["text"], joined["added"]["ids"][0], joined["added"]["ids"][1][1]):
        assert leaf.flatten().tolist() == [0, 0, 1, 1]
    assert isinstance(joined["added"]["ids"], list) and isinstance(joined["added"]["ids"][1], tuple)


DIFFERENT = {
    "names": ({"y": torch.ones(2)}, {"x": torch.ones(2)}, "same names; x, y stands in one"),
    "values": ({"mode": "a"}, {"mode": "b"}, r"cond\['mode'\] differs between cond and uncond .* 'b' and 'a'"),
    "numbers": ({"y": 1}, {"y": 2}, r"cond\['y'\] differs"),
    "kinds": ({"y": True}, {"y": 1}, r"cond\['y'\] differs"),
    "lengths": ({"y": [torch.ones(2)]}, {"y": [torch.ones(2)] * 2}, "differs"),
    "rows": ({"y": torch.ones(2)}, {"y": torch.ones(3)}, r"cond\['y'\] must have 1 or 2 rows .* got shape \[3\]"),
    "uncond rows": ({"y": torch.ones(4)}, {"y": torch.ones(2)}, r"uncond\['y'\] must have 1 or 2 rows"),
    "a mapping in one of them": ({"y": {"a": 1}}, {"y": 1}, r"cond\['y'\] differs"),
    "one missing": ({"y": None}, {"y": torch.ones(2)}, "differs"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_cannot_share_a_batch_is_named(case) -> None:
    uncond, cond, message = DIFFERENT[case]
    with pytest.raises(ValueError, match=message):
        join(uncond, cond, 2)


def test_conditions_are_mappings() -> None:
    given = {"y": 1}
    checked = check_condition("cond", given)
    assert checked == given and checked is not given and check_condition("cond", None) == {}
    with pytest.raises(TypeError, match=r"uncond must be a mapping .*uncond=\{'labels': y\}, got Tensor"):
        check_condition("uncond", torch.ones(2))


class Pair(NamedTuple):
    a: torch.Tensor
    b: list


def test_structure_is_what_contents_of_tensors_do_not_change() -> None:
    cond = {"text": torch.ones(2, 3), "pair": Pair(torch.zeros(2), [1, "x", None]), "scale": 2.0}
    same = {"text": torch.zeros(2, 3), "pair": Pair(torch.ones(2), [1, "x", None]), "scale": 2.0}
    assert structure(cond) == structure(same) and hash(structure(cond)) == hash(structure(same))
    others = [
        {"text": torch.ones(3, 3)},
        {"text": torch.ones(2, 3).half()},
        {"text": None},
        {"scale": 2},
        {"scale": 3.0},
        {"pair": (torch.ones(2), [1, "x", None])},
        {"more": None},
    ]
    for changed in others:
        assert structure(cond) != structure(cond | changed)
    unhashable = {"controller": {1, 2}}
    assert structure(unhashable) == structure(unhashable) != structure({"controller": {1, 2}})


def test_copies_are_made_leaf_by_leaf() -> None:
    cond = {"text": torch.ones(2, 3), "pair": Pair(torch.ones(2), [torch.ones(1), "x"]), "scale": 2.0}
    target = map_tensors(cond, torch.zeros_like)
    assert isinstance(target["pair"], Pair) and target["scale"] == 2.0 and target["text"].sum() == 0
    leaf = target["pair"].b[0]
    copy_into(target, cond)
    assert target["text"].sum() == 6 and target["pair"].a.sum() == 2 and leaf.item() == 1


class Named(dict):
    """A dictionary with an attribute, as libraries have them."""

    name = "none"


def test_a_dictionary_of_its_own_class_stays_one() -> None:
    given = Named(text=torch.ones(2))
    given.name = "prompt"
    made = map_tensors(given, torch.zeros_like)
    assert type(made) is Named and made.name == "prompt" and made["text"].sum() == 0 and given["text"].sum() == 2


def test_a_mapping_that_cannot_be_written_becomes_a_dictionary() -> None:
    given = MappingProxyType({"text": torch.ones(2)})
    made = map_tensors({"added": given}, torch.zeros_like)["added"]
    assert type(made) is dict and made["text"].sum() == 0 and given["text"].sum() == 2
