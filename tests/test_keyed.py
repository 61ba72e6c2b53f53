import pytest
import torch

from flowalign.keyed import INITIAL, POINT, STEP, keyed_generator, keyed_randn

SHAPE = (4, 8, 8)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    together = keyed_randn(1, 2, [5, 6, 7], INITIAL, SHAPE)
    alone = torch.cat([keyed_randn(1, 2, [i], INITIAL, SHAPE) for i in (7, 5)])
    assert torch.equal(together[[2, 0]], alone)


def test_sample_ids_may_be_a_tensor():
    assert torch.equal(keyed_randn(0, 0, torch.tensor([3, 1]), 0, SHAPE), keyed_randn(0, 0, [3, 1], 0, SHAPE))


@pytest.mark.parametrize("key", [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4), (1, 2, 4, 3)])
def test_every_part_of_the_key_and_their_order_matter(key):
    seed, epoch, sample, stream = key
    a, b = keyed_randn(1, 2, [3], 4, SHAPE), keyed_randn(seed, epoch, [sample], stream, SHAPE)
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.3


def test_noise_is_standard_normal_in_float32():
    noise = keyed_randn(0, 0, range(200), STEP, SHAPE)
    assert noise.dtype == torch.float32
    assert noise.shape == (200, *SHAPE)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_global_random_state_is_neither_read_nor_moved():
    state = torch.get_rng_state()
    first = keyed_randn(0, 0, [0], POINT, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(keyed_randn(0, 0, [0], POINT, SHAPE), first)


def test_neighbouring_keys_seed_different_generators():
    seeds = {keyed_generator(0, e, s, t).initial_seed() for e in range(8) for s in range(8) for t in range(8)}
    assert len(seeds) == 512
