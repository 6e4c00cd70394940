"""Every batch is of one shape and of exact task counts, no row is lost but those that are counted, and a square plan is the old one."""

from __future__ import annotations

import pytest

from dreamlite_data.dataset import DatasetError
from trainers.batch_plan import Plan, bucket_panels, crop_box, nearest_panel

SQUARE, WIDE, TALL, RARE = (64, 64), (32, 96), (96, 32), (64, 96)


def pools() -> dict[tuple[int, int], dict[str, list[int]]]:
    """Three shapes that fill batches of 2 + 2, and one of which only one edit row is there."""
    return {
        SQUARE: {"generate": list(range(0, 9)), "edit": list(range(100, 105))},
        WIDE: {"generate": list(range(10, 14)), "edit": list(range(110, 117))},
        TALL: {"generate": list(range(20, 22)), "edit": list(range(120, 122))},
        RARE: {"generate": list(range(30, 33)), "edit": [130]},
    }


def shape_of(row: int) -> tuple[int, int]:
    return next(panel for panel, pool in pools().items() if any(row in rows for rows in pool.values()))


def test_a_batch_has_one_shape_and_exact_counts_and_only_counted_rows_are_lost(capsys):
    plan = Plan(pools(), {"generate": 0.5, "edit": 0.5}, 4, (3,))
    seen: set[int] = set()
    shapes = set()
    for step in range(60):
        chosen, positions = plan.indices(step)
        assert len({shape_of(row) for row in chosen}) == 1
        assert [row >= 100 for row in chosen] == [False, False, True, True]
        assert positions == list(range(4 * step, 4 * step + 4))
        assert len(set(chosen)) == 4 or shape_of(chosen[0]) == SQUARE  # an odd pool repeats a row at the end of its epoch
        seen |= set(chosen)
        shapes.add(shape_of(chosen[0]))
    everything = {row for pool in pools().values() for rows in pool.values() for row in rows}
    lost = everything - seen
    assert shapes == {SQUARE, WIDE, TALL}
    assert plan.lost == {(RARE, "generate"): 3, (RARE, "edit"): 1} and lost == {30, 31, 32, 130}
    assert capsys.readouterr().err.startswith("4 rows have shapes too rare")
    assert plan.indices(7) == Plan(pools(), {"generate": 0.5, "edit": 0.5}, 4, (3,)).indices(7), "a resumed plan is the same"
    assert any(plan.indices(step) != Plan(pools(), {"generate": 0.5, "edit": 0.5}, 4, (4,)).indices(step) for step in range(5))


def test_every_row_of_a_pool_is_seen_before_one_is_seen_again():
    plan = Plan({panel: {"generate": pool["generate"]} for panel, pool in pools().items()}, {"generate": 1.0}, 2, (0,))
    counts = {row: 0 for pool in pools().values() for row in pool["generate"]}
    for step in range(40):
        for row in plan.indices(step)[0]:
            counts[row] += 1
            same = [counts[other] for other in pools()[shape_of(row)]["generate"]]
            assert max(same) - min(same) <= 1
    assert not plan.lost and min(counts.values()) >= 2


def test_shares_and_shapes_that_no_batch_can_hold_are_refused():
    with pytest.raises(ValueError, match="exactly"):
        Plan(pools(), {"generate": 0.5, "edit": 0.5}, 5, (0,))
    with pytest.raises(DatasetError, match="hold none"):
        Plan({SQUARE: {"edit": [1, 2]}}, {"generate": 1.0}, 2, (0,))
    with pytest.raises(DatasetError, match=r"no aspect bucket has the 32 generate rows.*64x64 \(9\)"):
        Plan(pools(), {"generate": 1.0}, 32, (0,))


@pytest.mark.parametrize("size_px", [256, 512, 1024])
def test_panels_are_divisible_of_one_area_and_few(size_px):
    panels = bucket_panels(size_px)
    assert panels[0] == (size_px, size_px) and len(set(panels)) == len(panels) <= 12
    for height, width in panels:
        assert height % 32 == 0 and width % 32 == 0
        assert 0.75 < height * width / size_px**2 < 1.25


def test_an_image_goes_to_the_nearest_ratio_and_loses_little():
    panels = bucket_panels(512)
    assert nearest_panel(900, 900, panels) == (512, 512)
    wide = nearest_panel(1920, 1080, panels)
    assert wide[1] > wide[0] and nearest_panel(1080, 1920, panels) == wide[::-1]
    for size in ((1920, 1080), (600, 800), (3000, 1000), (501, 499)):
        panel = nearest_panel(*size, panels)
        left, top, right, bottom = crop_box(*size, panel)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert (right - left) / (bottom - top) == pytest.approx(panel[1] / panel[0], rel=0.01)
        if 0.5 <= size[0] / size[1] <= 2:
            assert (right - left) * (bottom - top) > 0.85 * size[0] * size[1]
    square_loss = 1 - 1080 / 1920
    assert square_loss > 0.4, "what a square crop of the wide one would lose"
