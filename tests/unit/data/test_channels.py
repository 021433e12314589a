"""Images of one, four and more channels and of 16 bits: reading, augmenting, loading, looking at them."""

import struct
import types

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.affine import warp_image
from data.augment.colour import colour_note, hsv
from data.augment.flips import flip
from data.augment.letterbox import letterbox
from data.augment.mixup import mixup
from data.dataset_spec import load_dataset_spec
from data.images import tiff
from data.images.bands import as_grey_or_rgb, without_stored_arrays
from data.images.depth import depth_of
from data.images.pixels import brightened, fill_of, resized
from data.images.reading import ImageError, is_image, probe_image, read_image
from data.images.store import ImageStore
from data.images.tiff import TiffError, read_pages
from data.loader import LoaderOptions, build_loader
from tests.bands import square_image, write_image, write_squares, write_tiff
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.instances import Instances
from utils.types import to_unit_range
from utils.visual.draw import viewable
from utils.visual.plots import as_rgb

KINDS = [(1, np.uint8), (1, np.uint16), (3, np.uint16), (4, np.uint8), (5, np.uint16), (9, np.uint8)]
EVERYTHING = Hyperparameters(degrees=20.0, shear=4.0, perspective=0.0005, mixup=1.0, flipud=0.5, copy_paste=1.0, hsv_v=0.4)


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(channels, dtype, hw=(31, 45)):
    return rng().integers(0, np.iinfo(dtype).max, (*hw, channels), endpoint=True).astype(dtype)


class TestReading:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    @pytest.mark.parametrize("channels", [2, 4, 5, 8])
    @pytest.mark.parametrize("how", [{}, {"planar": True}, {"alpha": True}, {"tile": 16}, {"tile": 16, "planar": True, "order": ">"}])
    def test_tiff_of_many_bands_is_read_unchanged(self, tmp_path, channels, dtype, how):
        image = noise(channels, dtype)
        path = write_tiff(tmp_path / "a.tif", [image], **how)
        assert probe_image(path, channels=channels) == (31, 45)
        found = read_image(path, channels=channels, dtype=None)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, image)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_pages_of_a_tiff_are_channels(self, tmp_path, dtype):
        image = noise(5, dtype)
        path = write_image(tmp_path / "a.tif", image)
        np.testing.assert_array_equal(read_image(path, channels=5, dtype=None), image)
        two_of_three = write_tiff(tmp_path / "b.tif", [image[:, :, :3], image[:, :, 2:]])
        assert read_image(two_of_three, channels=6).shape == (31, 45, 6)

    def test_the_first_page_is_enough_if_it_has_all_channels(self, tmp_path):
        image = noise(4, np.uint16)
        path = write_tiff(tmp_path / "a.tif", [image, image[:10, :10]])
        np.testing.assert_array_equal(read_image(path, channels=4, dtype=None), image)
        with pytest.raises(ImageError, match="2 pages differ in size, and the first has 4 channels, not 5"):
            read_image(path, channels=5)

    @pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
    @pytest.mark.parametrize("predictor", [1, 2])
    def test_compressed_tiffs_are_read(self, tmp_path, compression, predictor):
        ramp = (np.mgrid[:40, :60].sum(0)[..., None] * (1, 2, 1) + rng().integers(0, 9, (40, 60, 3))).astype(np.uint8)
        tags = {} if compression == "packbits" else {317: predictor}
        Image.fromarray(ramp).save(tmp_path / "a.tif", compression=compression, tiffinfo=tags)
        np.testing.assert_array_equal(read_pages(np.fromfile(tmp_path / "a.tif", np.uint8))[0], ramp)

    def test_sixteen_bits_with_predictor(self, tmp_path):
        deep = noise(3, np.uint16)
        parameters = [cv2.IMWRITE_TIFF_COMPRESSION, 5, cv2.IMWRITE_TIFF_PREDICTOR, 2]
        cv2.imwrite(str(tmp_path / "a.tif"), deep[:, :, ::-1], parameters)
        np.testing.assert_array_equal(read_pages(np.fromfile(tmp_path / "a.tif", np.uint8))[0], deep)

    @pytest.mark.parametrize("keep", [3, 60, 500, 0.5, -4])
    def test_truncated_tiff_gives_one_line(self, tmp_path, keep):
        path = write_image(tmp_path / "a.tif", noise(5, np.uint16))
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
        with pytest.raises(ImageError) as caught:
            probe_image(path, channels=5)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    def test_damaged_directories_never_loop_or_crash(self, tmp_path):
        data = np.fromfile(write_image(tmp_path / "a.tif", noise(5, np.uint16, (12, 12))), np.uint8)
        for seed in range(300):
            broken, r = data.copy(), rng(seed)
            broken[r.integers(4, len(data), 6)] = r.integers(0, 256, 6)
            try:
                pages = read_pages(broken)
            except TiffError:
                continue
            assert all(page.ndim == 3 for page in pages)

    def test_unsupported_compression_suggests_an_alternative(self, tmp_path):
        data = bytearray(write_tiff(tmp_path / "a.tif", [noise(5, np.uint8)]).read_bytes())
        at = data.index(bytes((3, 1, 3, 0, 1, 0, 0, 0)))  # tag 259, SHORT, one
        data[at + 8 : at + 10] = (50001).to_bytes(2, "little")
        (tmp_path / "a.tif").write_bytes(data)
        with pytest.raises(ImageError, match="TIFF compression 50001 with 5 channels is not read; save it with one of none, LZW, deflate"):
            read_image(tmp_path / "a.tif", channels=5)

    def test_alpha_channels_are_read(self, tmp_path):
        image = noise(4, np.uint8)
        for suffix in (".png", ".webp"):
            Image.fromarray(image).save(tmp_path / f"a{suffix}", lossless=True, exact=True)
            np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}", channels=4), image)
        deep = noise(4, np.uint16)
        np.testing.assert_array_equal(read_image(write_image(tmp_path / "b.png", deep), channels=4, dtype=None), deep)
        Image.fromarray(image[:, :, :2], "LA").save(tmp_path / "c.png")
        np.testing.assert_array_equal(read_image(tmp_path / "c.png", channels=2), image[:, :, :2])

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_is_applied_as_to_rgb(self, tmp_path, orientation):
        stored = noise(8, np.uint8)
        flat = stored.swapaxes(0, 1)
        mirrored = (stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1])
        seen = (*mirrored, flat, flat[:, ::-1], flat[::-1, ::-1], flat[::-1])[orientation - 1]
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix, channels in ((".png", 3), (".png", 4), (".png", 2), (".webp", 3), (".webp", 4)):
            path = tmp_path / f"{channels}{suffix}"
            mode = {2: "LA", 3: "RGB", 4: "RGBA"}[channels]
            options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
            Image.fromarray(stored[:, :, :channels], mode).save(path, exif=exif, **options)
            np.testing.assert_array_equal(read_image(path, channels=channels), seen[:, :, :channels])
            assert probe_image(path, channels=channels) == seen.shape[:2]
        for i, how in enumerate(({}, {"planar": True, "order": ">"}, {"tile": 16})):
            path = write_tiff(tmp_path / f"{i}.tif", [stored], orientation=orientation, **how)
            np.testing.assert_array_equal(read_image(path, channels=8), seen)
            assert probe_image(path, channels=8) == seen.shape[:2]
        Image.fromarray(stored[:, :, :4], "CMYK").save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
        assert np.abs(read_image(tmp_path / "a.jpg", channels=4).astype(int) - seen[:, :, :4]).max() < 24

    @pytest.mark.parametrize("layout", [(0, 1, 2), (2, 0, 1)])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_npy_arrays_are_read_in_every_layout(self, tmp_path, layout, dtype):
        image = noise(5, np.uint16)
        stored = (image / 65535).astype(dtype) if dtype == np.float32 else image.astype(dtype)
        np.save(tmp_path / "a.npy", stored.transpose(layout))
        found = read_image(tmp_path / "a.npy", channels=5, dtype=None)
        np.testing.assert_array_equal(found, image if dtype == np.float32 else stored)
        assert probe_image(tmp_path / "a.npy", channels=5) == (31, 45)
        with pytest.raises(ImageError, match="5 channels, 4 are expected"):
            read_image(tmp_path / "a.npy", channels=4)

    def test_damaged_and_foreign_arrays_are_refused(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array(["text"]))
        (tmp_path / "b.npy").write_bytes(b"\x93NUMPY")
        np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
        for name in "abc":
            with pytest.raises(ImageError, match=rf"{name}\.npy"):
                probe_image(tmp_path / f"{name}.npy", channels=5)

    def test_wrong_number_of_channels_names_file_and_counts(self, tmp_path):
        path = write_image(tmp_path / "rgb.png", noise(3, np.uint8))
        for read in (probe_image, read_image):
            with pytest.raises(ImageError, match=r"rgb\.png: 3 channels, 4 are expected"):
                read(path, channels=4)
        many = write_tiff(tmp_path / "five.tif", [noise(5, np.uint16)])
        for channels in (1, 3, 4):
            with pytest.raises(ImageError, match=rf"five\.tif: 5 channels, {channels} are expected"):
                probe_image(many, channels=channels)

    def test_grey_and_rgb_are_converted_from_any_channels(self, tmp_path):
        deep = noise(3, np.uint16)
        grey = cv2.cvtColor(deep, cv2.COLOR_RGB2GRAY)[:, :, None]
        for path in (
            write_image(tmp_path / "a.png", deep), write_tiff(tmp_path / "a.tif", [deep]), write_image(tmp_path / "a.npy", deep),
            write_tiff(tmp_path / "b.tif", [deep], planar=True),
        ):  # fmt: skip
            np.testing.assert_array_equal(read_image(path, channels=3, dtype=None), deep)
            np.testing.assert_allclose(read_image(path, channels=1, dtype=None), grey, atol=8)  # libpng rounds its own way
        one = write_image(tmp_path / "c.png", grey)
        np.testing.assert_array_equal(read_image(one, channels=3, dtype=None), np.repeat(grey, 3, 2))
        np.testing.assert_array_equal(as_grey_or_rgb(grey, 3), np.repeat(grey, 3, 2))

    def test_images_keep_their_own_depth(self, tmp_path):
        Image.fromarray(noise(3, np.uint8)).save(tmp_path / "a.jpg")
        assert read_image(tmp_path / "a.jpg", dtype=None).dtype == np.uint8
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", dtype=None), read_image(tmp_path / "a.jpg"))
        assert read_image(write_image(tmp_path / "a.png", noise(1, np.uint16)), dtype=None).dtype == np.uint16

    def test_npy_files_beside_images_are_ignored(self):
        assert without_stored_arrays(["a.jpg", "a.npy", "b.npy"]) == ["a.jpg"]
        assert without_stored_arrays(iter(["a.npy", "b.npy"])) == ["a.npy", "b.npy"]
        store = ImageStore(("x/a.tif",), imgsz=320, channels=5, dtype=np.uint16)
        assert not is_image(store._disk_path(0))


class TestDepth:
    def test_depth_of_the_majority_is_used_unless_bits_is_given(self, tmp_path):
        deep = [str(write_image(tmp_path / f"{i}.png", noise(1, np.uint16))) for i in range(3)]
        flat = [str(write_image(tmp_path / f"{i}.bmp", noise(1, np.uint8))) for i in range(2)]
        assert depth_of(deep + flat, channels=1) is np.uint16
        assert depth_of(deep[:2] + flat, channels=1) is np.uint8
        assert depth_of(flat, channels=1, bits=16) is np.uint16
        assert depth_of([str(tmp_path / "gone.png")], channels=1) is np.uint8
        assert depth_of([str(write_image(tmp_path / "a.tif", noise(5, np.uint16)))], channels=5) is np.uint16

    def test_channels_and_bits_are_read_from_the_yaml(self, tmp_path):
        path = write_squares(tmp_path, channels=1, dtype=np.uint16, suffix=".png", train=2, val=1)
        spec = load_dataset_spec(path)
        assert (spec.ch, spec.ch_given, spec.bits) == (1, True, None)
        path.write_text(path.read_text().replace("ch: 1", "bits: 8"))
        spec = load_dataset_spec(path)
        assert (spec.ch, spec.ch_given, spec.bits) == (3, False, 8)
        path.write_text(path.read_text().replace("bits: 8", "bits: 12"))
        with pytest.raises(UserError, match="bits: 12, 8 or 16 is expected"):
            load_dataset_spec(path)

    def test_colour_augmentation_is_reported_in_one_line(self):
        assert colour_note(3, np.uint8, EVERYTHING) == ""
        assert colour_note(1, np.uint16, EVERYTHING).startswith("images of 1 channel, 16 bits: hsv_v 0.4 changes their brightness")


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
class TestAugmentation:
    def test_border_value_scales_with_the_depth(self, channels, dtype):
        boxed = letterbox(noise(channels, dtype), (64, 64), auto=False)
        assert boxed.image.dtype == dtype
        assert boxed.image.shape == (64, 64, channels)
        assert (boxed.image[0] == fill_of(dtype)).all()
        assert fill_of(dtype) / np.iinfo(dtype).max == 114 / 255

    @pytest.mark.parametrize("matrix", [[[0.9, 0.1, 9], [-0.1, 0.9, 9], [0, 0, 1]], [[0.9, 0.1, 9], [-0.1, 0.9, 9], [1e-4, 0, 1]]])
    def test_warp_is_equal_for_all_channels(self, channels, dtype, matrix):
        image = noise(channels, dtype)
        warped = warp_image(image, np.array(matrix), (64, 64))
        assert warped.dtype == dtype
        assert (warped[0, 0] == fill_of(dtype)).all()
        for i in range(channels):
            np.testing.assert_array_equal(warped[:, :, i : i + 1], warp_image(image[:, :, i : i + 1], np.array(matrix), (64, 64)))

    def test_resize_flip_and_blend_are_equal_for_all_channels(self, channels, dtype):
        image, empty = noise(channels, dtype), Instances.empty()
        change = types.SimpleNamespace(flipud=1.0, fliplr=1.0)
        operations = (
            lambda x: resized(x, (20, 12)),
            lambda x: resized(x, (20, 12), interpolation=cv2.INTER_AREA),
            lambda x: flip(x, empty, change, rng())[0],
            lambda x: mixup((x, empty), (x[::-1], empty), rng())[0],
        )
        for operation in operations:
            whole = operation(image)
            assert whole.dtype == dtype
            np.testing.assert_array_equal(whole, np.concatenate([operation(image[:, :, i : i + 1]) for i in range(channels)], 2))

    def test_colour_augmentation_scales_brightness(self, channels, dtype):
        image = noise(channels, dtype)
        before = image.copy()
        factor = 1 + 0.4 * rng(3).uniform(-1, 1, 3)[2]
        found = hsv(image, EVERYTHING, rng(3))
        top = np.iinfo(dtype).max
        np.testing.assert_allclose(found.astype(float), np.clip(image * factor, 0, top), atol=1)
        assert found.dtype == dtype
        np.testing.assert_array_equal(image, before)
        assert (brightened(np.full((2, 2, channels), top, dtype), 1.5) == top).all()


def test_brightness_equals_hsv_value_on_grey_rgb():
    grey = noise(1, np.uint8)
    change = Hyperparameters(hsv_h=0.0, hsv_s=0.0, hsv_v=0.4)
    np.testing.assert_array_equal(hsv(np.repeat(grey, 3, 2), change, rng())[:, :, :1], hsv(grey, change, rng()))


class TestLoader:
    def open(self, path, **changes):
        given = {"imgsz": 64, "batch_size": 4, "hyp": EVERYTHING, "augment": True, "workers": 0, "seed": 1} | changes
        return build_loader(load_dataset_spec(path), "train", LoaderOptions(**given))

    @pytest.mark.parametrize(
        ("channels", "dtype", "suffix"), [(1, np.uint16, ".png"), (4, np.uint8, ".png"), (5, np.uint16, ".tif"), (6, np.uint8, ".npy")]
    )
    def test_labels_equal_those_of_rgb(self, tmp_path, channels, dtype, suffix):
        ours = self.open(write_squares(tmp_path / "ours", channels=channels, dtype=dtype, suffix=suffix, train=6))
        rgb = self.open(write_squares(tmp_path / "rgb", channels=3, dtype=np.uint8, suffix=".png", train=6))
        for mine, theirs in zip(ours, rgb, strict=True):
            assert mine.images.shape == (len(theirs.images), channels, 64, 64)
            assert mine.images.dtype == getattr(torch, np.dtype(dtype).name)
            assert torch.equal(mine.targets.rows(), theirs.targets.rows())
            assert mine.max_boxes == theirs.max_boxes

    @pytest.mark.parametrize("cache", ["ram", "disk"])
    def test_caches_change_nothing(self, tmp_path, cache):
        path = write_squares(tmp_path, channels=5, dtype=np.uint16, suffix=".tif", train=6)
        plain = [batch.images for batch in self.open(path, imgsz=48)]
        for _ in range(2):  # the second time from the files of the first
            kept = [batch.images for batch in self.open(path, imgsz=48, cache=cache)]
            assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
        assert len(list((tmp_path / "images" / "train").glob("*.48r5w.npy"))) == (6 if cache == "disk" else 0)

    def test_workers_return_16_bit_images(self, tmp_path):
        path = write_squares(tmp_path, channels=5, dtype=np.uint16, suffix=".tif", train=6)
        alone, helped = self.open(path), self.open(path, workers=1)
        for a, b in zip(alone, helped, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.targets.rows(), b.targets.rows())

    def test_pixels_equal_those_of_a_single_channel(self, tmp_path):
        """A channel's fate does not hang on its neighbours."""
        r, images = rng(), []
        for name in ("one", "five"):
            write_squares(tmp_path / name, channels=1 if name == "one" else 5, dtype=np.uint16, suffix=".tif", train=4)
        for i in range(4):
            image, row = square_image(r, 1, np.uint16, i % 2)
            images.append(image)
            for name, repeats in (("one", 1), ("five", 5)):
                write_image(tmp_path / name / "images" / "train" / f"{i}.tif", np.repeat(image, repeats, 2))
                (tmp_path / name / "labels" / "train" / f"{i}.txt").write_text(row)
        for one, five in zip(self.open(tmp_path / "one" / "data.yaml"), self.open(tmp_path / "five" / "data.yaml"), strict=True):
            assert torch.equal(one.targets.rows(), five.targets.rows())
            assert torch.equal(one.images.int().expand(-1, 5, -1, -1), five.images.int())

    def test_bad_images_are_skipped_with_one_line_each(self, tmp_path, capsys):
        path = write_squares(tmp_path, channels=4, dtype=np.uint8, suffix=".png", train=6)
        folder = tmp_path / "images" / "train"
        write_image(folder / "0.png", noise(3, np.uint8, (64, 64)))
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
        for _ in range(2):  # read, then from the label cache
            loader = self.open(path)
            said = capsys.readouterr().out
            assert "4 images, 4 objects, 0 images without objects, 2 images left out" in said
            assert said.count("0.png: 3 channels, 4 are expected") == said.count("train/1.png") == 1
            assert len(loader.dataset) == 4
        path.write_text(path.read_text().replace("ch: 4", "ch: 3"))  # the same images, other channels: no stale cache
        assert len(self.open(path).dataset) == 5

    def test_data_set_without_usable_images_stops_the_run(self, tmp_path):
        path = write_squares(tmp_path, channels=3, dtype=np.uint8, suffix=".png", train=2)
        path.write_text(path.read_text().replace("ch: 3", "ch: 5"))
        with pytest.raises(UserError, match=r"none of the 2 images of 'train' can be used, first: .*3 channels, 5 are expected"):
            self.open(path)

    def test_image_damaged_later_is_replaced_by_grey(self, tmp_path, capsys):
        path = write_squares(tmp_path, channels=5, dtype=np.uint16, suffix=".tif", train=2)
        loader = self.open(path, augment=False)
        (tmp_path / "images" / "train" / "0.tif").unlink()
        (batch,) = loader
        assert "1 image(s) replaced by grey: " in capsys.readouterr().err
        assert (batch.images[0].int() == fill_of(np.uint16)).all()


class TestLooking:
    @pytest.mark.parametrize(("channels", "dtype"), KINDS)
    def test_any_image_can_be_displayed(self, channels, dtype):
        seen = viewable(noise(channels, dtype))
        assert seen.shape == (31, 45, 3)
        assert seen.dtype == np.uint8
        assert (seen[:, :, 0] == seen[:, :, 2]).all() == (channels == 1)

    def test_8_bit_images_are_kept_and_16_bit_ones_stretched(self):
        image = noise(3, np.uint8)
        assert viewable(image) is image
        np.testing.assert_array_equal(viewable(noise(4, np.uint8)), noise(4, np.uint8)[:, :, :3])
        dark = np.linspace(3000, 3500, 31 * 45).reshape(31, 45, 1).astype(np.uint16)
        assert viewable(dark).min() == 0
        assert viewable(dark).max() == 255

    def test_batches_with_borders(self):
        images = torch.full((5, 32, 32), fill_of(np.uint16), dtype=torch.int32)
        images[:, 8:24, 8:24] = torch.linspace(500, 900, 256).reshape(16, 16).int()
        assert as_rgb(images.to(torch.uint16))[8:24, 8:24].std() > 60  # the border, much brighter, does not flatten it

    def test_unit_range(self):
        images = torch.tensor([0, 65535, fill_of(np.uint16)], dtype=torch.int32).to(torch.uint16).reshape(1, 3, 1, 1)
        torch.testing.assert_close(to_unit_range(images).flatten(), torch.tensor([0, 1, 114 / 255]))


class TestHostileTiff:
    def tiff(self, entries, following=8):
        """A little-endian TIFF of one directory at byte 8; its last word names the next directory."""
        head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
        body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return np.frombuffer(head + body + struct.pack("<I", following), np.uint8)

    def test_directories_in_a_cycle_are_read_once(self):
        data = self.tiff([(254, 4, 1, 1)])  # a reduced copy, which is no page
        assert len(list(tiff._directories(memoryview(data.tobytes()), "<"))) == 1
        with pytest.raises(TiffError, match="without pages"):
            read_pages(data)

    def test_unknown_tags_are_not_read_into_memory(self):
        data = self.tiff([(40000 + i, 1, 4000, 8) for i in range(20000)], following=0)
        (tags,) = tiff._directories(memoryview(data.tobytes()), "<")
        assert tags == {}
