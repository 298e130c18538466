import pickle
import threading

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from datasets import load_from_disk

from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.reader import BatchPrefetcher, LatentReader


def test_reads_the_same_latents_as_datasets(latents):
    reader, cache = LatentReader(latents), load_from_disk(str(latents))
    rows = np.array([5, 0, 59, 5])
    for name in ("latent_mean", "latent_std", "latent_mean_flip"):
        expected = np.array([cache[int(row)][name] for row in rows], np.float16).reshape(4, 4, 8, 8)
        assert np.array_equal(reader.read(name, rows), expected)


def test_an_epoch_is_every_training_image_once_in_another_order(latents):
    reader = LatentReader(latents)
    n = len(reader)
    first, second = reader.rows(0, 0, n), reader.rows(0, n, n)
    assert sorted(first) == sorted(second) == reader.indices.tolist()
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, reader.rows(1, 0, n))
    splits = np.array(load_from_disk(str(latents))["split"])
    assert set(splits[first]) == {"train"}


def test_the_order_does_not_depend_on_the_batches(latents):
    reader = LatentReader(latents)
    whole = reader.rows(7, 0, 200)
    assert np.array_equal(np.concatenate([reader.rows(7, i, 25) for i in range(0, 200, 25)]), whole)
    assert np.array_equal(LatentReader(latents).rows(7, 130, 70), whole[130:])


def test_batches_flip_only_the_requested_images(latents):
    reader = LatentReader(latents)
    flip = np.array([True, False, True, False])
    plain, flipped = reader.batch(0, 3, 4), reader.batch(0, 3, 4, flip)
    rows = reader.rows(0, 3, 4)
    assert np.array_equal(flipped["latent_mean"][~flip], plain["latent_mean"][~flip])
    assert np.array_equal(flipped["latent_mean"][flip], reader.read("latent_mean_flip", rows[flip]))
    assert plain["condition_ids"].dtype == np.int64
    assert plain["condition_ids"].shape == (4, 22)


def test_conditions_are_chosen_and_ordered_by_name(latents):
    reader = LatentReader(latents, conditions=["Smiling", "Male"])
    cache = load_from_disk(str(latents))
    row = reader.rows(0, 0, 1)[0]
    ids = reader.batch(0, 0, 1)["condition_ids"][0].tolist()
    assert ids == [cache[int(row)]["Smiling"], cache[int(row)]["Male"]]
    first = int(reader.indices[0])
    assert reader.attributes(1) == [{"Smiling": cache[first]["Smiling"], "Male": cache[first]["Male"]}]
    assert LatentReader(latents, conditions=[]).attributes(3) is None
    with pytest.raises(ValueError, match="no condition Tall"):
        LatentReader(latents, conditions=["Tall"])


def test_classes_of_a_cache_are_matched_by_name(cats_and_owls, tmp_path, vae_folder):
    """The model has cats, dogs and owls; in the cache owls are the second of two."""
    cache = prepare_latents(str(cats_and_owls), str(tmp_path / "cache"), str(vae_folder), "16")
    reader = LatentReader(cache, conditions=["class"])
    labels = tiny_pipeline().config.condition_labels
    assert {row["class"] for row in reader.attributes(6)} == {0, 1}
    assert {row["class"] for row in reader.attributes(6, labels)} == {0, labels["class"].index("owl")}
    with pytest.raises(ValueError, match="class='owl' is unknown to the model; valid names are cat, dog"):
        reader.attributes(6, {"class": ["cat", "dog"]})


def test_can_be_pickled(latents):
    reader = LatentReader(latents, "train", ["Male"])
    reader.batch(0, 0, 2)
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy.batch(0, 0, 8)["latent_mean"], reader.batch(0, 0, 8)["latent_mean"])
    assert list(copy.conditions) == ["Male"]


def test_the_error_names_an_empty_split(latents):
    with pytest.raises(ValueError, match="no test images"):
        LatentReader(latents, "test")


def test_the_next_batch_is_read_while_the_current_one_is_used():
    read, begun = [], threading.Event()

    def batch(key):
        read.append(key)
        if key == (1, 0):
            begun.set()
        return {"x": np.full(2, key[0])}

    batches = BatchPrefetcher(batch, torch.device("cpu"))
    assert batches.get((0, 0), (1, 0))["x"].tolist() == [0, 0]
    assert begun.wait(10)  # before it is requested
    assert batches.get((1, 0), (2, 0))["x"].tolist() == [1, 1]
    assert batches.get((7, 0), (8, 0))["x"].tolist() == [7, 7]  # not the announced one
    assert read[:2] == [(0, 0), (1, 0)]
    assert read.count((1, 0)) == 1


def test_an_error_in_the_thread_is_raised_in_the_caller():
    def fail(key):
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        BatchPrefetcher(fail, torch.device("cpu")).get((0, 0), (1, 0))
