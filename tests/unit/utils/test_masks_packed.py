"""Packed masks, run-length codes, outlines and masks at the size of the original: exact, whatever the masks look like."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from tests.plain_masks import mask_logits, original_masks
from utils.errors import UserError
from utils.masks.coco_outlines import code_of_annotation, mask_of_code, rings_of_annotation
from utils.masks.outlines import cut_bridges, joined, rings_of, rings_of_packed
from utils.masks.packed import pack, pack_tensor, unpack, unpack_tensor
from utils.masks.rasterise import polygon_masks
from utils.masks.render import Placement, _whole_images, axes_of, check_memory, masks_at, prototype_masks_at
from utils.masks.rle import areas_of, codes_to_rows, decode_packed, encode, encode_packed, joined_rows, rows_to_codes, united

SIZES = [(1, 1), (5, 9), (7, 8), (30, 41), (64, 64)]


def noise(hw, *, blur: float = 0.0, seed: int = 0, count: int = 4):
    """Masks (n, h, w) with pieces, holes and thin lines; the last two are empty and full."""
    rng = np.random.default_rng(seed)
    values = [rng.random(hw) for _ in range(count)]
    values = [cv2.GaussianBlur(v, (0, 0), blur) if blur else v for v in values]
    masks = np.stack([v > np.median(v) for v in values]).astype(np.uint8)
    return np.concatenate((masks, np.zeros((1, *hw), np.uint8), np.ones((1, *hw), np.uint8)))


@pytest.mark.parametrize("hw", SIZES)
def test_packing_is_undone_by_unpacking(hw):
    masks = noise(hw)
    assert np.array_equal(unpack(pack(masks), hw[1]), masks)
    assert np.array_equal(pack_tensor(torch.from_numpy(masks)).numpy(), pack(masks))
    assert np.array_equal(unpack_tensor(torch.from_numpy(pack(masks)), hw[1]).numpy(), masks)


@pytest.mark.parametrize("blur", [0, 3])
@pytest.mark.parametrize("hw", SIZES)
def test_codes_of_packed_masks_are_those_of_pycocotools(hw, blur):
    masks = noise(hw, blur=blur)
    codes = encode_packed(pack(masks), hw[1])
    assert [c["counts"] for c in codes] == [c["counts"] for c in encode(masks)]
    assert areas_of(codes).tolist() == masks.sum((1, 2)).tolist()
    rows = joined_rows([codes_to_rows(codes[:2]), codes_to_rows([]), codes_to_rows(codes[2:])])
    assert list(rows_to_codes(rows)) == list(codes)
    assert encode_packed(pack(masks[:0]), hw[1]).shape == (0,)
    assert np.array_equal(decode_packed(codes, hw), pack(masks))


@pytest.mark.parametrize("blur", [0, 3])
@pytest.mark.parametrize("hw", SIZES)
@pytest.mark.parametrize("beyond", [(0, 0, 0, 0), (0, 3, 0, 0), (5, 0, 0, 9), (11, 2, 6, 1)])
def test_codes_of_a_part_are_those_of_the_image(hw, blur, beyond):
    masks = noise(hw, blur=blur)
    top, bottom, left, right = beyond
    around = np.pad(masks, ((0, 0), (top, bottom), (left, right)))
    codes = encode_packed(pack(masks), hw[1], within=around.shape[1:], at_xy=(left, top))
    assert [c["counts"] for c in codes] == [c["counts"] for c in encode(around)]
    assert [c["size"] for c in codes] == [list(around.shape[1:])] * len(codes)
    assert np.array_equal(decode_packed(codes, around.shape[1:]), pack(around))
    assert united(codes[:3])["counts"] == encode(around[:3].max(axis=0, keepdims=True))[0]["counts"]


def test_the_area_of_a_large_mask_does_not_overflow():
    assert areas_of(encode_packed(pack(np.ones((1, 700, 900))), 900)).tolist() == [630_000]


@pytest.mark.parametrize("blur", [0, 1, 4])
def test_rings_fill_to_the_mask_that_they_are_of(blur):
    masks = noise((40, 57), blur=blur)
    assert np.array_equal(polygon_masks([rings_of(m) for m in masks], (40, 57)), masks)
    for whole, packed in zip((rings_of(m) for m in masks), rings_of_packed(pack(masks))):
        assert [r.tolist() for r in whole] == [r.tolist() for r in packed]


def test_bridges_join_rings_and_are_cut_again():
    outer = np.array([(0, 0), (30, 0), (30, 30), (0, 30)], np.float32) + 0.5
    hole, piece = outer / 3 + 10, outer / 2 + 40
    polygon = joined([outer, hole, piece])
    assert len(polygon) == 3 * 4 + 2 * 2  # each bridge repeats two points
    rings = cut_bridges(polygon)
    assert sorted(sorted(map(tuple, r.tolist())) for r in rings) == sorted(sorted(map(tuple, r.tolist())) for r in (outer, hole, piece))
    hw = (60, 60)
    assert np.array_equal(polygon_masks([rings], hw), polygon_masks([[outer, hole, piece]], hw))
    assert cut_bridges(outer)[0] is outer
    assert joined([]).shape == (0, 2)


@pytest.mark.parametrize("original", [(160, 256), (80, 128), (40, 64), (333, 533)])
def test_masks_at_the_original_size_are_the_published_ones(original):
    generator = torch.Generator().manual_seed(0)
    prototypes, coefficients = torch.randn(5, 24, 32, generator=generator), torch.randn(7, 5, generator=generator)
    corner = torch.rand(7, 2, generator=generator) * torch.tensor(original[::-1]) * 0.6
    boxes = torch.cat((corner, corner + torch.tensor(original[::-1]) * 0.35), dim=1)
    input_hw, inner = (96, 128), (80, 128)  # a border of 8 px, two cells, above and below
    place = Placement(original, (inner[1] / original[1], inner[0] / original[0]), (0.0, 8.0))
    found = prototype_masks_at(coefficients, prototypes, boxes, place, cell_px=4)
    expected = original_masks(mask_logits(coefficients, prototypes), boxes, input_hw=input_hw, original_hw=original)
    differing = int((unpack(found.numpy(), original[1]) != expected.numpy()).sum())
    assert differing <= 1e-4 * expected.sum()  # rounding, where a value is zero
    whole = _whole_images(coefficients, prototypes, boxes, *axes_of(place, (24, 32), cell_px=4))  # as on a GPU
    assert int((unpack(whole.numpy(), original[1]) != unpack(found.numpy(), original[1])).sum()) <= 1e-4 * expected.sum()


def test_masks_move_with_their_boxes_and_end_at_them():
    masks = np.zeros((2, 20, 30), np.uint8)
    masks[0, 5:10, 4:12], masks[1, :, :] = 1, 1
    boxes = torch.tensor([[8.0, 10, 24, 20], [0, 0, 30, 20]])
    twice = masks_at(torch.from_numpy(pack(masks)), boxes, Placement((40, 60), (0.5, 0.5), (0.0, 0.0)))
    expected = np.kron(masks, np.ones((1, 2, 2), np.uint8))
    expected[1, 20:], expected[1, :, 30:] = 0, 0  # outside of its box
    assert np.array_equal(unpack(twice.numpy(), 60), expected)
    shifted = masks_at(torch.from_numpy(pack(masks[:1])), torch.tensor([[14.0, 25, 22, 30]]), Placement((33, 50), (1, 1), (-10.0, -20.0)))
    assert unpack(shifted.numpy(), 50)[0].sum() == masks[0].sum()
    assert masks_at(torch.zeros(0, 20, 4, dtype=torch.uint8), torch.zeros(0, 4), Placement((8, 9), (1, 1), (0, 0))).shape == (0, 8, 2)


def test_masks_beyond_the_limit_are_refused_in_one_line():
    check_memory(300, (640, 640))
    with pytest.raises(UserError, match="5000 masks of 20000x20000 px need"):
        check_memory(5000, (20000, 20000))


@pytest.mark.parametrize("hw", SIZES)
def test_codes_of_a_file_are_read_compressed_and_not(hw):
    for mask, code in zip(noise(hw), encode(noise(hw))):
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(flat, prepend=np.uint8(0)))
        runs = np.diff([0, *edges, flat.size]).tolist()
        for counts in (code["counts"].decode(), runs):
            found, fault = mask_of_code({"size": list(hw), "counts": counts}, hw)
            assert not fault
            assert np.array_equal(found, mask)


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([[1, 2, 3, 4]], "a polygon of 2 points, 3 or more are expected"),
        ([[1, 2, 3, 4, 5]], "polygons of x1 y1"),
        ([[1, 2, 3, 4, 5, "6"]], "polygons of x1 y1"),
        ([[1, 2, 3, 4, 5, float("nan")]], "finite numbers"),
        ("text", "polygons or a run-length code"),
        ({"size": [9, 8], "counts": [72]}, r"size \[9, 8\], expected \[8, 9\]"),
        ({"size": [8, 9], "counts": [71]}, "add up to 8 x 9"),
        ({"size": [8, 9], "counts": [-1, 73]}, "add up to 8 x 9"),
        ({"size": [8, 9], "counts": "~~~~"}, "add up to 8 x 9"),
        ({"size": [8, 9], "counts": "oooooooooooo"}, "add up to 8 x 9"),
        ({"size": [8, 9]}, "add up to 8 x 9"),
    ],
)  # fmt: skip
def test_a_broken_segmentation_is_named_and_its_box_used(segmentation, says):
    rings, fault = rings_of_annotation(segmentation, (8, 9))
    assert not rings
    assert re.search(says, fault)
    code, again = code_of_annotation(segmentation, (1, 2, 4, 3), (8, 9))
    assert again
    assert int(coco_mask.area([dict(code)])[0]) == 12


def test_pieces_that_overlap_count_once_and_others_stay_as_they_are():
    one, other = [2, 2, 20, 2, 20, 20, 2, 20], [10, 10, 30, 10, 30, 30, 10, 30]
    rings, _ = rings_of_annotation([one, other], (40, 40))
    separate = polygon_masks([np.reshape(p, (-1, 2)).astype(np.float32) for p in (one, other)], (40, 40))
    assert np.array_equal(polygon_masks([rings], (40, 40))[0], separate.max(0))
    apart, _ = rings_of_annotation([one, [25, 25, 30, 25, 30, 30]], (40, 40))
    assert [r.tolist() for r in apart] == [np.reshape(one, (-1, 2)).tolist(), [[25, 25], [30, 25], [30, 30]]]
