from dit_hf.seeds import mixed_seed


def test_seeds_differ_for_every_pair_and_stay_the_same():
    assert len({mixed_seed(seed, number) for seed in range(20) for number in range(20)}) == 400
    # Images of a series and resumed runs depend on them.
    assert (mixed_seed(0, 0), mixed_seed(3, 7)) == (7896617691693857887, 4782766539338417736)
