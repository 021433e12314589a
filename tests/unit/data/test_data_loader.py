"""The loader: the same data whoever draws them, batches as promised, and clear words about data that cannot be used."""

import random
import types

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset_spec import load_dataset_spec
from data.loader import LoaderOptions, build_loader
from data.sampler import EpochSampler, SamplerOptions
from utils.errors import UserError
from utils.types import Batch

KEYS = "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic mixup copy_paste"
OFF = dict.fromkeys(KEYS.split(), 0.0)
HYP = types.SimpleNamespace(
    **{**OFF, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "translate": 0.1, "scale": 0.5, "fliplr": 0.5, "mosaic": 1.0, "mixup": 0.3}
)
COUNT = 11


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eleven noisy images of four sizes with one to three objects each; the name has a blank and an umlaut."""
    root = tmp_path_factory.mktemp("Daten für Läufe")
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        rng = np.random.default_rng(len(split))
        for i in range(COUNT):
            h, w = ((40, 64), (64, 40), (64, 64), (50, 100))[i % 4]
            Image.fromarray(rng.integers(0, 255, (h, w, 3)).astype(np.uint8)).save(root / "images" / split / f"bild ä{i:02d}.png")
            rows = [f"{(i + k) % 3} {0.3 + 0.2 * k:.2f} 0.5 0.25 0.5" for k in range(1 + i % 3)]
            (root / "labels" / split / f"bild ä{i:02d}.txt").write_text("\n".join(rows))
    (root / "set.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b, c]\n")
    return root


def loader(root, split="train", **options):
    arguments = {"imgsz": 64, "batch_size": 4, "hyp": HYP, "augment": True, "workers": 0, **options}
    return build_loader(load_dataset_spec(root / "set.yaml"), split, LoaderOptions(**arguments))


def samples(loader, epoch, start_batch=0):
    """Path -> (image, targets) of an epoch."""
    loader.set_epoch(epoch, start_batch)
    found = {}
    for batch in loader:
        for i, path in enumerate(batch.paths):
            found[path] = (batch.images[i].clone(), batch.targets.rows()[batch.targets.rows()[:, 0] == i, 1:].clone())
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert torch.equal(a[path][0], b[path][0]), path
        assert torch.equal(a[path][1], b[path][1]), path


class TestDeterminism:
    def test_samples_do_not_depend_on_worker_count(self, root):
        alone = loader(root)
        crowd = loader(root, workers=2)
        for epoch in (0, 1):
            assert_same(samples(alone, epoch), samples(crowd, epoch))

    def test_samples_do_not_depend_on_rank_count(self, root):
        alone = samples(loader(root), 3)
        parts = [samples(loader(root, rank=r, world_size=2), 3) for r in (0, 1)]
        assert_same(alone, {**parts[0], **parts[1]})

    def test_samples_do_not_depend_on_batch_size(self, root):
        assert_same(samples(loader(root), 2), samples(loader(root, batch_size=3), 2))

    def test_samples_after_a_resume_are_identical(self, root):
        run = loader(root)
        for epoch in range(3):
            full = samples(run, epoch)
        assert_same(full, samples(loader(root), 2))
        whole = list(run)
        resumed = loader(root, workers=1)
        resumed.set_epoch(2, start_batch=1)
        rest = list(resumed)
        assert len(rest) == len(whole) - 1
        for a, b in zip(whole[1:], rest):
            assert a.paths == b.paths
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.targets.rows(), b.targets.rows())

    def test_epochs_and_seeds_differ(self, root):
        run = loader(root)
        first, second, other = samples(run, 0), samples(run, 1), samples(loader(root, seed=1), 0)
        assert list(first) != list(second)
        assert list(first) != list(other)
        for changed in (second, other):
            assert not any(torch.equal(first[p][0], changed[p][0]) for p in first)

    def test_every_sample_has_its_own_random_stream(self, tmp_path):
        for kind in ("images", "labels"):
            (tmp_path / kind).mkdir()
        for i in range(8):
            Image.fromarray(np.full((40, 64, 3), 90, np.uint8)).save(tmp_path / f"images/{i}.png")
            (tmp_path / f"labels/{i}.txt").write_text("0 0.5 0.5 0.25 0.5")
        (tmp_path / "set.yaml").write_text("train: images\nval: images\nnames: [a]\n")
        hyp = types.SimpleNamespace(**{**OFF, "translate": 0.1, "scale": 0.5})
        boxes = [tuple(t[0].tolist()) for _, t in samples(loader(tmp_path, hyp=hyp), 0).values()]
        assert len(set(boxes)) == 8

    def test_global_random_state_is_untouched(self, root):
        before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        list(loader(root, workers=1))
        assert torch.equal(before[0], torch.random.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
        assert before[2] == random.getstate()

    def test_sample_and_order_streams_are_independent(self, root):
        """A sample's generator must not begin as the epoch's order does."""
        from data.dataset import ORDER_STREAM, SAMPLE_STREAM

        assert np.random.default_rng((0, 0, 0, SAMPLE_STREAM)).random() != np.random.default_rng((0, 0, 0, ORDER_STREAM)).random()

    @pytest.mark.parametrize("cache", ["ram", "disk"])
    def test_caches_change_nothing(self, root, cache, capsys):
        plain, cached = loader(root), loader(root, cache=cache)
        for epoch in (0, 1):
            assert_same(samples(plain, epoch), samples(cached, epoch))
        assert "not cached" not in capsys.readouterr().out
        assert_same(samples(plain, 4), samples(loader(root, cache=cache), 4))


class TestBatches:
    def test_batches_have_the_documented_layout(self, root):
        run = loader(root)
        assert len(run) == 3
        for batch in run:
            assert isinstance(batch, Batch)
            assert batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.images.shape[1:] == (3, 64, 64)
            assert batch.targets.rows().dtype == torch.float32
            assert batch.targets.rows().shape[1] == 6
            counts = torch.bincount(batch.targets.rows()[:, 0].long(), minlength=len(batch.paths))
            assert batch.max_boxes == counts.max()
            boxes = batch.targets.rows()[:, 2:]
            assert (boxes[:, :2] - boxes[:, 2:] / 2 > -1e-5).all()
            assert (boxes[:, :2] + boxes[:, 2:] / 2 < 1 + 1e-5).all()
        assert sum(len(b.paths) for b in run) == COUNT

    def test_colours_are_rgb(self, tmp_path):
        for kind in ("images", "labels"):
            (tmp_path / kind).mkdir()
        Image.fromarray(np.full((64, 64, 3), (200, 100, 30), np.uint8)).save(tmp_path / "images/a.png")
        (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
        (tmp_path / "set.yaml").write_text("train: images\nval: images\nnames: [a]\n")
        for augment in (True, False):
            batch = next(iter(loader(tmp_path, augment=augment, hyp=types.SimpleNamespace(**OFF), batch_size=1)))
            assert batch.images[0, :, 32, 32].tolist() == [200, 100, 30]

    def test_validation_maps_back_to_the_original(self, root):
        run = loader(root, "val", augment=False, rect=True, pad=0.5)
        for batch in run:
            h, w = batch.images.shape[2:]
            for i, path in enumerate(batch.paths):
                scale, pad = batch.letterbox.scale_xy[i], batch.letterbox.pad_xy[i]
                original_h, original_w = batch.letterbox.original_hw[i].tolist()
                truth = run.dataset.labels[run.dataset.image_files.index(path)]
                boxes = batch.targets.rows()[batch.targets.rows()[:, 0] == i, 2:] * torch.tensor([w, h, w, h])
                back = (boxes[:, :2] - pad) / scale / torch.tensor([original_w, original_h])
                torch.testing.assert_close(back, torch.from_numpy(truth[:, 1:3]), atol=1e-4, rtol=0)
                inside = batch.images[i][:, int(pad[1]) : h - int(pad[1]), int(pad[0]) : w - int(pad[0])]
                assert inside.float().std() > 10

    def test_rectangular_batches(self, root):
        run = loader(root, "val", augment=False, rect=True, pad=0.0)
        shapes = [tuple(b.images.shape[2:]) for b in run]
        assert all(h % 32 == w % 32 == 0 for h, w in shapes)
        assert shapes[0] == (64, 64)  # 50 x 100 and 40 x 64 images: 0.625 * 64 = 40, in whole strides 64
        aspects = [run.dataset.shapes_hw[run.dataset.image_files.index(p)] for b in run for p in b.paths]
        ratios = [h / w for h, w in aspects]
        assert ratios == sorted(ratios)
        wide = loader(root, "val", augment=False, rect=True, pad=0.0, imgsz=320, batch_size=2)
        assert tuple(next(iter(wide)).images.shape[2:]) == (160, 320)

    def test_validation_order_is_that_of_the_files(self, root):
        run = loader(root, "val", augment=False)
        assert [p for b in run for p in b.paths] == list(run.dataset.image_files)

    def test_mosaic_stops_in_the_last_epochs(self, root):
        hyp = types.SimpleNamespace(**{**OFF, "mosaic": 1.0})
        run = loader(root, hyp=hyp, mosaic_until=2)
        counts = {p: len(t) for p, t in zip(run.dataset.image_files, run.dataset.labels)}
        for epoch, closed in ((1, False), (2, True), (7, True)):
            same = all(len(t) == counts[p] for p, (_, t) in samples(run, epoch).items())
            assert same == closed
        assert_same(samples(run, 2), samples(loader(root, hyp=hyp, mosaic_until=0), 2))

    def test_single_class_and_min_items(self, root):
        run = loader(root, single_cls=True, min_items=2)
        assert len(run.dataset) == 7
        assert all((labels[:, 0] == 0).all() and len(labels) >= 2 for labels in run.dataset.labels)
        with pytest.raises(UserError, match="--min-items 9"):
            loader(root, min_items=9)

    def test_recent_image_cache_is_bounded(self, root):
        run = loader(root)
        store = run.dataset.store
        store.recent_limit = 30_000
        for _ in range(2):
            for i in range(COUNT):
                assert np.array_equal(store.get(i), store.decode(i))
                held = sum(image.nbytes for image in store.recent.values())
                assert held == store.recent_bytes <= 30_000
        assert store.recent

    def test_images_that_do_not_fit_in_memory_are_not_cached(self, root, capsys, monkeypatch):
        monkeypatch.setattr("data.images.store.free_memory", lambda: 1000.0)
        run = loader(root, cache="ram")
        assert "images are not cached" in capsys.readouterr().out
        assert not run.dataset.store.all

    def test_rectangular_training(self, root):
        run = loader(root, rect=True, imgsz=320, batch_size=2)
        shapes = [tuple(b.images.shape[2:]) for b in run]
        assert (160, 320) in shapes
        assert len(set(shapes)) > 2
        first = [b.paths for b in run]
        run.set_epoch(1)
        second = [b.paths for b in run]
        assert first != second
        assert sorted(first) == sorted(second)

    def test_unknown_cache_is_refused(self, root):
        with pytest.raises(UserError, match="ram or disk"):
            loader(root, cache="cloud")


class TestSampler:
    def make(self, count, **options):
        return EpochSampler(count, SamplerOptions(**{"batch_size": 4, "hw": (32, 32), "shuffle": True, **options}))

    @pytest.mark.parametrize("shuffle", [True, False])
    @pytest.mark.parametrize("world_size", [2, 3])
    @pytest.mark.parametrize("count", [1, 5, 12, 13, 14])
    def test_ranks_share_the_batches_of_one_process(self, count, world_size, shuffle):
        alone = list(self.make(count, shuffle=shuffle))
        shares = [list(self.make(count, rank=r, world_size=world_size, shuffle=shuffle)) for r in range(world_size)]
        assert {len(s) for s in shares} == {len(alone)} == {len(self.make(count, rank=1, world_size=world_size))}
        for whole, *parts in zip(alone, *shares):
            counted = [keys for keys in parts if keys[0].step_images]
            assert [k.index for keys in counted for k in keys] == [k.index for k in whole]
            assert {k.step_images for keys in counted for k in keys} == {len(whole)}
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert all(parts)

    @pytest.mark.parametrize("world_size", [2, 3])
    @pytest.mark.parametrize("count", [1, 5, 12, 13])
    def test_ranks_take_batches_in_turn(self, count, world_size):
        alone = [[k.index for k in keys] for keys in self.make(count)]
        runs = [self.make(count, rank=r, world_size=world_size, whole_batches=True) for r in range(world_size)]
        shares = [list(run) for run in runs]
        assert {len(s) for s in shares} == {len(run) for run in runs} == {-(-len(alone) // world_size)}
        assert [[k.index for k in keys] for step in zip(*shares) for keys in step if keys[0].step_images] == alone

    def test_padding_batch_has_no_objects(self, tmp_path):
        TestBadData().make(tmp_path)
        batch = list(loader(tmp_path, augment=False, batch_size=2, rank=1, world_size=2, hyp=types.SimpleNamespace(**OFF)))[1]
        assert (len(batch.images), len(batch.targets), batch.max_boxes, batch.images_of_step) == (1, 0, 0, 0)


class TestBadData:
    def make(self, root, *, labels=True):
        (root / "images").mkdir()
        (root / "labels").mkdir()
        for i in range(3):
            Image.fromarray(np.full((40, 40, 3), 50 * i, np.uint8)).save(root / "images" / f"{i}.jpg")
            if labels:
                (root / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
        (root / "set.yaml").write_text("train: images\nval: images\nnames: [a]\n")
        return root

    def test_data_set_without_labels_is_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"no labels at all .*labels.0\.txt"):
            loader(self.make(tmp_path, labels=False))

    def test_data_set_with_empty_label_files_is_refused_as_such(self, tmp_path):
        for file in (self.make(tmp_path) / "labels").iterdir():
            file.write_text("")
        with pytest.raises(UserError, match="no labels at all for the 3 images of 'train', whose label files are all empty"):
            loader(tmp_path)

    def test_commas_between_columns_are_named(self, tmp_path):
        (self.make(tmp_path) / "labels/1.txt").write_text("0,0.5,0.5,0.5,0.5\n")
        problems = loader(tmp_path).dataset.problems
        assert "1 columns, expected: class cx cy w h" in str(problems[0])
        assert "spaces separate columns, not commas" in str(problems[0])

    def test_unnamed_class_is_refused(self, tmp_path):
        (self.make(tmp_path) / "labels/1.txt").write_text("0 0.5 0.5 0.5 0.5\n3 0.5 0.5 0.4 0.4\n")
        with pytest.raises(UserError, match=r"1\.txt:2: class 3, but .*set\.yaml has 1 classes"):
            loader(tmp_path)

    def test_data_set_without_usable_images_is_refused(self, tmp_path):
        for path in (self.make(tmp_path) / "images").iterdir():
            path.write_text("no image")
        with pytest.raises(UserError, match=r"none of the 3 images .*not an image"):
            loader(tmp_path)

    def test_bad_images_are_skipped(self, tmp_path, capsys):
        (self.make(tmp_path) / "images/1.jpg").write_text("no image")
        run = loader(tmp_path)
        assert [p.rsplit("/")[-1] for p in run.dataset.image_files] == ["0.jpg", "2.jpg"]
        assert len(run.dataset.problems) == 1
        assert capsys.readouterr().out.count("1.jpg") == 1
        assert sum(len(b.paths) for b in run) == 2

    def test_image_damaged_during_the_run_is_replaced_by_grey(self, tmp_path, capsys):
        run = loader(self.make(tmp_path), augment=False, batch_size=3)
        (tmp_path / "images/1.jpg").write_text("no image")
        (batch,) = run
        assert (batch.images[1] == 114).all()
        assert batch.targets.rows()[:, 0].tolist() == [0, 2]
        assert capsys.readouterr().err.count("warning: 1 image(s) replaced by grey") == 1
        list(run)
        assert "1.jpg" not in capsys.readouterr().err  # said once

    def test_background_images_are_supported(self, tmp_path):
        (self.make(tmp_path) / "labels/0.txt").unlink()
        (tmp_path / "labels/1.txt").write_text("")
        for augment in (True, False):
            batches = list(loader(tmp_path, augment=augment, batch_size=1, hyp=types.SimpleNamespace(**OFF)))
            assert sorted(b.max_boxes for b in batches) == [0, 0, 1]
            assert {tuple(b.targets.rows().shape) for b in batches} == {(0, 6), (1, 6)}


def test_grey_data_sets_are_read(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.full((40, 60), 77, np.uint8)).save(tmp_path / "images/a.png")
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "set.yaml").write_text("train: images\nval: images\nch: 1\nnames: [a]\n")
    for augment in (True, False):
        batch = next(iter(loader(tmp_path, augment=augment)))
        assert batch.images.shape == (1, 1, 64, 64)
