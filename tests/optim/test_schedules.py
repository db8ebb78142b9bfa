"""Schedules against the tables recorded from the original, and the options it did not have."""

import json

import pytest

from src.optim.schedules import learning_rate, learning_rate_factor, masked_share, sequence_length


@pytest.fixture(scope="module")
def tables(golden_dir):
    return json.loads((golden_dir / "schedules.json").read_text())


def test_learning_rate_reproduces_default_table(tables):
    defaults = tables["learning_rate"]["defaults"]
    for epoch, factor in tables["learning_rate"]["values"]:
        assert learning_rate_factor(epoch) == pytest.approx(factor, abs=1e-12), epoch
        assert learning_rate(epoch) == pytest.approx(factor * defaults["learning_rate"], abs=1e-12), epoch


def test_learning_rate_reproduces_tables_of_other_options(tables):
    for case in tables["learning_rate_other"]:
        options = {name: value for name, value in case.items() if name != "values"}
        for epoch, factor in case["values"]:
            assert learning_rate_factor(epoch, **options) == pytest.approx(factor, abs=1e-12), (options, epoch)


def test_sequence_length_reproduces_default_table(tables):
    for epoch, length in tables["sequence_length"]["values"]:
        assert sequence_length(epoch) == length, epoch
    for epoch, length in tables["sequence_length"]["transitions"][1:]:
        assert sequence_length(epoch) == length and sequence_length(epoch - 1) < length, epoch


def test_sequence_length_reproduces_tables_of_other_options(tables):
    for case in tables["sequence_length_other"]:
        for epoch, length in case["values"]:
            assert sequence_length(epoch, **case["arguments"]) == length, (case["arguments"], epoch)


def test_learning_rate_without_zero_steps_or_floor_is_a_triangle():
    options = {"warmup_steps": 10, "total_steps": 20, "num_zero_steps": 0, "min_lr_ratio": 0.0}
    factors = [learning_rate_factor(epoch, **options) for epoch in (0, 5, 10, 15, 20, 25)]
    assert factors == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]


def test_wsd_is_one_until_the_last_epochs_fall_linearly():
    options = {"warmup_steps": 10, "total_steps": 100, "num_zero_steps": 0, "min_lr_ratio": 0.1}
    for decay_steps in (1, 20, 90):
        for epoch in range(120):
            expected = epoch / 10 if epoch < 10 else min(1.0, max(0.1, (100 - epoch) / decay_steps))
            assert learning_rate_factor(epoch, decay_steps=decay_steps, **options) == pytest.approx(expected), epoch
    whole = [learning_rate_factor(epoch, decay_steps=90, **options) for epoch in range(120)]
    assert whole == [learning_rate_factor(epoch, **options) for epoch in range(120)], "linear falls all the way"
    with pytest.raises(ValueError, match=r"^decay_steps must be between 0 and total_steps - warmup_steps \(90\)"):
        learning_rate_factor(5, decay_steps=91, **options)


def test_masked_share_lies_on_a_line_between_its_ends():
    shares = [masked_share(epoch, mlm_probability=0.4, final_mlm_probability=0.15, total_steps=10)
              for epoch in (0, 4, 10, 99)]  # fmt: skip
    assert shares == pytest.approx([0.4, 0.3, 0.15, 0.15])
    assert masked_share(7, mlm_probability=0.4, final_mlm_probability=None, total_steps=10) == 0.4


def test_learning_rate_honours_min_learning_rate_over_the_ratio():
    options = {
        "peak_learning_rate": 1e-3,
        "warmup_steps": 10,
        "total_steps": 100,
        "num_zero_steps": 0,
        "min_lr_ratio": 0.5,
    }
    assert learning_rate(100, min_learning_rate=1e-5, **options) == pytest.approx(1e-5)
    assert learning_rate(98, min_learning_rate=1e-5, **options) == pytest.approx(1e-3 * 2 / 90)
    assert learning_rate(100, **options) == pytest.approx(5e-4)


def test_sequence_length_grows_monotonically_within_its_bounds():
    lengths = [
        sequence_length(
            epoch,
            max_sequence_length=1000,
            initial_sequence_length=200,
            sequence_length_warmup_steps=77,
            pad_to_multiple_of=64,
        )
        for epoch in range(100)
    ]
    assert lengths == sorted(lengths) and lengths[0] == 200 and set(lengths[77:]) == {1000}
    assert all(length % 64 == 0 for length in lengths if length not in (200, 1000))


@pytest.mark.parametrize(
    "option, value",
    [
        ("warmup_steps", -1),
        ("total_steps", 0),
        ("total_steps", 3000),
        ("num_zero_steps", -1),
        ("min_lr_ratio", 1.5),
        ("min_learning_rate", 1.0),
    ],
)
def test_learning_rate_error_names_the_bad_option(option, value):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        learning_rate(0, **{option: value})


def test_learning_rate_error_names_the_flag_of_the_peak():
    with pytest.raises(ValueError, match=r"^learning_rate must be positive"):
        learning_rate(0, peak_learning_rate=0.0)


@pytest.mark.parametrize(
    "option, value",
    [
        ("max_sequence_length", 0),
        ("initial_sequence_length", 4096),
        ("initial_sequence_length", 0),
        ("sequence_length_warmup_steps", -5),
        ("pad_to_multiple_of", 0),
    ],
)
def test_sequence_length_error_names_the_bad_option(option, value):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        sequence_length(0, **{option: value})
