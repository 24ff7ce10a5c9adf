"""The numbers of several ranks as those of one job."""

from wan_sweep.headline import headline, told_together, with_metrics

RANKS = [
    {
        "rank": 0,
        "metrics": {
            "memory/peak/allocated_bytes": 30,
            "memory/peak/denoise/allocated_bytes": 20,
            "memory/peak/encode_text/allocated_bytes": 30,
            "memory/resident/denoise/dit_bytes": 5,
            "memory/resident/denoise/vae_bytes": 2,
            "memory/resident/encode_text/t5_bytes": 11,
            "memory/base/t5_bytes": 11,
            "time/total_s": 3.0,
            "time/save_s": 0.5,
        },
    },
    {
        "rank": 1,
        "metrics": {
            "memory/peak/allocated_bytes": 40,
            "memory/peak/denoise/allocated_bytes": 40,
            "memory/resident/denoise/dit_bytes": 6,
            "time/total_s": 2.0,
        },
    },
]


def test_each_number_is_the_largest_of_all_ranks() -> None:
    found = headline(RANKS)
    assert (found["memory/peak/allocated_bytes"], found["time/total_s"]) == (40, 3.0)
    assert (found["memory/base/t5_bytes"], found["time/save_s"]) == (11, 0.5)


def test_it_is_said_which_rank_was_fullest_and_which_slowest() -> None:
    found = headline(RANKS)
    assert (found["ranks/peak_rank"], found["ranks/slowest_rank"], found["ranks/num"]) == (1, 0, 2)


def test_what_stands_on_the_device_in_a_phase_is_that_of_the_rank_with_its_peak() -> None:
    found = headline(RANKS)
    assert {name: size for name, size in found.items() if name.startswith("memory/resident/")} == {
        "memory/resident/denoise/dit_bytes": 6,
        "memory/resident/encode_text/t5_bytes": 11,
    }


def test_a_rank_that_left_nothing_leaves_the_others_their_numbers() -> None:
    told = told_together({1: {"outcome": "ok", "metrics": {"time/total_s": 1.0}}})
    assert [rank["rank"] for rank in told["ranks"]] == [1]
    assert (told["metrics"]["time/total_s"], told["metrics"]["ranks/num"]) == (1.0, 1)
    assert told_together({}) == {}


def test_numbers_of_another_pass_join_those_of_their_rank() -> None:
    ranks = with_metrics(RANKS, {1: {"collectives/per_step_s": 0.25}})
    assert "collectives/per_step_s" not in ranks[0]["metrics"]
    assert headline(ranks)["collectives/per_step_s"] == 0.25
