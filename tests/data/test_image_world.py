"""The made image world: what it says about its pictures is true of their pixels."""

from pathlib import Path

import numpy as np
import pytest

from broadsheet.data.detectors import (
    Detector,
    annotate,
    detector_maps,
    made_detectors,
    named_attributes,
    sentence,
)
from broadsheet.data.image_world import COLOURS, GLYPH, PLACES, ImageWorld, stamp
from broadsheet.data.milannotations import load_milannotations
from broadsheet.errors import DataMissing, InvalidInput


def test_masks_and_words_fit_the_pixels() -> None:
    scenes = ImageWorld(noise=0.0, textures=("plain",)).sample(40, seed=1)
    pictures = scenes.images.transpose(0, 2, 3, 1) / 255
    for name, colour in COLOURS.items():
        mask = scenes.concept(name)
        near = np.abs(pictures - np.array(colour)).max(-1) < 0.01
        assert mask.any() and (near[mask]).all()
        assert not near[~scenes.masks.any(1)].any()  # the ground has no colour
    half = scenes.images.shape[-1] // 2
    assert not scenes.concept("top")[:, half:].any() and not scenes.concept("right")[:, :, :half].any()
    assert (scenes.concept(GLYPH) == (scenes.masks & (scenes.digits >= 0)[..., None, None]).any(1)).all()
    both = scenes.concept(("red", "circle"))
    assert (both <= (scenes.concept("red") & scenes.concept("circle"))).all()
    assert (scenes.masks.sum(1) <= 1).all()  # nothing covers anything else


def test_shapes_differ_in_their_outlines() -> None:
    world = ImageWorld()
    draw = np.random.default_rng(0)
    kinds = np.full((5, 4, 3), -1)
    kinds[:, 0] = [[0, shape, 0] for shape in range(5)]
    scenes = world.paint(kinds, np.full((5, 4), -1), draw)
    area = scenes.masks[:, 0].sum((1, 2))
    box = [np.ptp(np.nonzero(m)[0]) * np.ptp(np.nonzero(m)[1]) for m in scenes.masks[:, 0]]
    filled = dict(zip(world.shapes, area / box, strict=True))
    assert filled["square"] > filled["circle"] > filled["triangle"]
    assert filled["ring"] < filled["circle"] and len(scenes[:2]) == 2


def test_the_same_seed_gives_the_same_world() -> None:
    a, b = ImageWorld().sample(5, seed=3), ImageWorld().sample(5, seed=3)
    assert (a.images == b.images).all() and not (a.images == ImageWorld().sample(5, seed=4).images).all()


def test_stamps_write_in_the_corner_only() -> None:
    scenes = ImageWorld().sample(6, seed=0)
    stamped, mask = stamp(scenes.images, np.array([0, 1, 2, 3, 4, -1]))
    changed = (stamped != scenes.images).any(1)
    assert changed[:5].any((1, 2)).all() and not changed[5].any() and not mask[5].any()
    assert not changed[:, :20].any() and not changed[:, :, :20].any()
    assert (stamped.astype(int)[:5] >= scenes.images[:5].astype(int) - 1).all()  # white ink only lightens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 9}, "size=9"),
        ({"colours": ("mauve",)}, "mauve"),
        ({"filled": 2.0}, "filled=2"),
        ({"shapes": ()}, "nothing"),
    ],
)
def test_wrong_worlds_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ImageWorld(**wrong)


def test_unknown_words_and_digits_are_refused() -> None:
    scenes = ImageWorld().sample(2)
    with pytest.raises(InvalidInput, match="mauve"):
        scenes.where("mauve")
    with pytest.raises(InvalidInput, match="-1 to 9"):
        stamp(scenes.images, np.array([10, 0]))
    with pytest.raises(InvalidInput, match="grid=7"):
        detector_maps(made_detectors(2), scenes, grid=7)
    with pytest.raises(InvalidInput, match="no word"):
        Detector()


def test_every_detector_says_what_it_is() -> None:
    draw = np.random.default_rng(0)
    units = made_detectors(300, seed=2)
    assert len(set(units)) == 300
    for unit in units:
        assert named_attributes(sentence(unit, draw)) == unit.attributes
        for text in annotate(unit, draw):
            assert named_attributes(text) <= unit.attributes | {GLYPH}
    assert sum(bool(unit.any_of) for unit in units) > 5 and sum(bool(unit.none_of) for unit in units) > 5
    assert any(PLACES[0] in unit.all_of for unit in units)


def test_negation_ends_with_its_clause() -> None:
    assert named_attributes("crosses that are not red or blue at the top") == {"cross", "not red", "not blue", "top"}


def test_maps_are_high_where_the_detector_finds_its_things() -> None:
    scenes = ImageWorld().sample(60, seed=0)
    units = [Detector(("red", "circle")), Detector((), ("red", "blue")), Detector(("circle",), (), ("red",))]
    maps = detector_maps(units, scenes, noise=0.0)
    for i, unit in enumerate(units):
        found = unit.where(scenes).any(1)
        peak = maps[:, i].max((1, 2))
        assert found.any() and peak[found].min() > peak[~found].max() and (unit.mask(scenes).any((1, 2)) == found).all()
    assert maps.min() >= 0


def write_source(root: Path, source: str, layers: int = 1, units: int = 3, k: int = 2, size: int = 8) -> None:
    """A source in the published form."""
    draw = np.random.default_rng(0)
    rows = ["layer,unit,summary"]
    for layer in range(layers):
        folder = root / source / f"layer{layer}"
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", draw.integers(0, 256, (units, k, 3, size, size)).astype(np.uint8))
        np.save(folder / "masks.npy", (draw.random((units, k, 1, size, size)) > 0.5).astype(np.uint8))
        for unit in range(units):
            rows += [f"layer{layer},{unit},red round things {unit % 2}", f'layer{layer},{unit},"edges, of objects"']
    (root / source / "annotations.csv").write_text("\n".join(rows))


def test_milannotations_are_read_as_published(tmp_path: Path) -> None:
    write_source(tmp_path, "some-net", layers=2)
    layers = load_milannotations(tmp_path, "some-net")
    assert [layer.layer for layer in layers] == ["layer0", "layer1"]
    assert layers[0].units == (0, 1, 2) and layers[0].sentences[1] == ("red round things 1", "edges, of objects")
    assert isinstance(layers[0].images, np.memmap)
    with pytest.raises(DataMissing, match=r"other-net.annotations\.csv"):
        load_milannotations(tmp_path, "other-net")
    (tmp_path / "some-net" / "layer1" / "masks.npy").unlink()
    with pytest.raises(DataMissing, match=r"layer1.masks\.npy"):
        load_milannotations(tmp_path, "some-net")
    np.save(tmp_path / "some-net" / "layer1" / "masks.npy", np.zeros((3, 2, 1, 4, 4)))
    with pytest.raises(InvalidInput, match="do not fit"):
        load_milannotations(tmp_path, "some-net")
    (tmp_path / "some-net" / "annotations.csv").write_text("layer,unit\n")
    with pytest.raises(InvalidInput, match="summary"):
        load_milannotations(tmp_path, "some-net")
