import numpy as np
import pytest
import torch
from conftest import tiny_pipeline

from dit_hf.sampling.generate import batches, generate_images, to_uint8


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_image_is_in_one_batch_on_any_number_of_ranks(num_ranks):
    whole = batches(10, 4)
    assert whole == [range(4), range(4, 8), range(8, 10)]
    shared = [batch for rank in range(num_ranks) for batch in batches(10, 4, rank, num_ranks)]
    assert sorted(shared, key=lambda batch: batch.start) == whole


def test_an_image_is_a_function_of_seed_and_number():
    pipeline, rows = tiny_pipeline(), [{"Smiling": True}, {"class": "owl"}, {}]
    options = {"num_inference_steps": 2, "eta": 1.0}
    together = generate_images(pipeline, range(2, 6), rows, 7, **options)
    assert together.shape == (4, 16, 16, 3)
    assert together.dtype == np.uint8
    for place, image in enumerate(range(2, 6)):
        alone = generate_images(pipeline, [image], rows, 7, **options).astype(int)
        assert np.abs(alone[0] - together[place]).max() <= 1
    again = generate_images(pipeline, [4], [rows[1]], 7, **options).astype(int)
    assert np.abs(again[0] - together[2]).max() <= 1
    assert np.abs(generate_images(pipeline, [4], rows, 8, **options).astype(int)[0] - together[2]).max() > 10


def test_images_are_rounded_as_diffusers_does_for_pil():
    pixels = torch.rand(2, 3, 5, 4) * 1.2 - 0.1
    expected = [
        tiny_pipeline().image_processor.numpy_to_pil(p.permute(1, 2, 0).clamp(0, 1).numpy())[0] for p in pixels
    ]
    assert np.array_equal(to_uint8(pixels), np.stack([np.asarray(image) for image in expected]))
