"""Which rows form a batch, and the arrays built from them."""

import itertools

import numpy as np
import pytest

from instructax.data import batches
from instructax.data.batches import NO_ROW


class Rows(list):
    """An in-memory source that records its reads."""

    def __init__(self, rows):
        super().__init__(rows)
        self.read = []

    def __getitems__(self, keys):
        self.read += keys
        return [self[key] for key in keys]


def ints(*values):
    return np.array(values, np.int32)


def packed(count, first):
    """Rows of one document each; the row's two tokens identify it."""
    return Rows(
        {
            "tokens": ints(first + i, first + i),
            "lengths": ints(2),
            "loss_mask": np.array([False, True]),
        }
        for i in range(count)
    )


def philox(counter, key):
    """Philox 4x64 with ten rounds, after Salmon et al. (2011)."""
    c = list(counter)
    k = list(key)
    for _ in range(10):
        low = 0xD2E7470EE14C6C93 * c[0]
        high = 0xCA5A826395121157 * c[2]
        c = [
            (high >> 64) ^ c[1] ^ k[0],
            high % 2**64,
            (low >> 64) ^ c[3] ^ k[1],
            low % 2**64,
        ]
        k = [(k[0] + 0x9E3779B97F4A7C15) % 2**64, (k[1] + 0xBB67AE8584CAA73B) % 2**64]
    return c


def test_row_order_sorts_philox_bits_and_is_stable():
    assert batches.row_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert batches.row_order(0, 1, 8).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
    assert batches.row_order(7, 0, 8).tolist() == [4, 1, 6, 3, 2, 7, 5, 0]
    bits = [word for block in range(1, 4) for word in philox([block, 0, 0, 0], [11, 5])][
        :10
    ]
    assert batches.row_order(11, 5, 10).tolist() == sorted(range(10), key=bits.__getitem__)


def test_row_orders_are_different_permutations():
    orders = [batches.row_order(seed, epoch, 50) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 9
    with pytest.raises(ValueError, match="read-only"):
        orders[0][0] = 1
    with pytest.raises(ValueError, match="seed -1 is negative"):
        batches.row_order(-1, 0, 3)


@pytest.mark.parametrize(
    ("size", "batch_size"), [(10, 4), (10, 10), (3, 8), (1, 2), (7, 1)]
)
def test_the_stream_is_one_epoch_after_another(size, batch_size):
    rows = np.concatenate(
        [batches.batch_row_ids(i, batch_size, size, 3) for i in range(3 * size)]
    )
    assert len(rows) == 3 * size * batch_size
    assert batches.stream_row_ids(2, 5, size, 3).tolist() == rows[2:5].tolist()
    for epoch in range(3 * batch_size):
        of_epoch = slice(epoch * size, (epoch + 1) * size)
        assert rows[of_epoch].tolist() == batches.row_order(3, epoch, size).tolist()
        assert sorted(rows[of_epoch].tolist()) == list(range(size))


def test_batches_without_rows_are_refused():
    for index, batch_size, size in ((0, 4, 0), (0, 0, 4), (-1, 4, 4)):
        places = f"{index * batch_size} .. {(index + 1) * batch_size - 1}"
        with pytest.raises(
            ValueError, match=f"no places {places} in a stream of {size} rows"
        ):
            batches.batch_row_ids(index, batch_size, size, 0)


def test_process_slices_make_the_whole_batch():
    rows = batches.batch_row_ids(5, 12, 100, 0)
    for count in (1, 2, 3, 4, 6, 12):
        slices = [batches.process_slice(rows, index, count) for index in range(count)]
        assert {len(part) for part in slices} == {12 // count}
        assert np.concatenate(slices).tolist() == rows.tolist()
    with pytest.raises(
        ValueError,
        match="a batch of 12 rows cannot be shared by 5 processes: change batch_size",
    ):
        batches.process_slice(rows, 0, 5)
    with pytest.raises(
        ValueError, match=r"process 2 is not one of 2: allowed are 0 \.\. 1"
    ):
        batches.process_slice(rows, 2, 2)


def test_evaluation_visits_each_row_once_in_batches_of_one_shape():
    rows = list(batches.evaluation_rows(5, 2))
    assert [len(part) for part in rows] == [2, 2, 2]
    assert np.concatenate(rows).tolist() == [*batches.row_order(0, 0, 5).tolist(), NO_ROW]
    assert (
        np.concatenate(list(batches.evaluation_rows(4, 2))).tolist()
        == batches.row_order(0, 0, 4).tolist()
    )
    assert batches.row_order(0, 0, 5).tolist() != list(range(5))
    assert list(batches.evaluation_rows(0, 2)) == []


def test_golden_lm_batch():
    loss_mask = np.array([False, True, True, False, True])
    source = Rows(
        [{"tokens": ints(5, 6, 7, 8, 9), "lengths": ints(3, 2), "loss_mask": loss_mask}]
    )
    batch = batches.lm_batch(source, np.array([0, NO_ROW]), 7)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0], [0] * 7]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0, 0], [0] * 7]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7]
    assert batch.loss_mask.tolist() == [
        [False, True, True, False, True, False, False],
        [False] * 7,
    ]
    assert [array.dtype for array in vars(batch).values()] == [
        np.int32,
        np.int32,
        np.int32,
        bool,
    ]
    with pytest.raises(ValueError, match="a row of 5 does not fit length = 4"):
        batches.lm_batch(source, np.array([0]), 4)


def test_prompts_are_padded_on_the_left():
    source = Rows([{"tokens": ints(1, 2)}, {"tokens": ints(0, 0, 0)}, {"tokens": ints(7)}])
    batch = batches.prompt_batch(source, np.array([2, 1, NO_ROW, 0]), 3)
    assert batch.tokens.tolist() == [[0, 0, 7], [0, 0, 0], [0, 0, 0], [0, 1, 2]]
    assert batch.mask.tolist() == [
        [False, False, True],
        [True] * 3,
        [False] * 3,
        [False, True, True],
    ]
    assert source.read == [2, 1, 0]
    with pytest.raises(ValueError, match="a row of 3 does not fit"):
        batches.prompt_batch(source, np.array([1]), 2)


COMPARISON = {
    "prompt": ints(4, 5),
    "responses": ints(1, 9, 2, 2, 9),
    "lengths": ints(2, 3),
    "ranks": ints(1, 0),
    "labeler": np.int32(6),
}


def test_golden_comparison_batch():
    read = {"prompt_tokens": 3, "completions": 3, "response_tokens": 4}
    batch = batches.comparison_batch(Rows([COMPARISON]), np.array([NO_ROW, 0]), **read)
    empty = [[0] * 4] * 3
    assert batch.prompts.tokens.tolist() == [[0, 0, 0], [0, 4, 5]]
    assert batch.prompts.mask.tolist() == [[False] * 3, [False, True, True]]
    assert batch.responses.tolist() == [empty, [[1, 9, 0, 0], [2, 2, 9, 0], [0] * 4]]
    assert batch.mask.astype(int).tolist() == [empty, [[1, 1, 0, 0], [1, 1, 1, 0], [0] * 4]]
    assert batch.ranks.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert batch.valid.tolist() == [[False] * 3, [True, True, False]]
    assert batch.labeler.tolist() == [-1, 6]
    dtypes = [
        batch.responses.dtype,
        batch.mask.dtype,
        batch.ranks.dtype,
        batch.valid.dtype,
        batch.labeler.dtype,
    ]
    assert dtypes == [np.int32, bool, np.int32, bool, np.int32]


@pytest.mark.parametrize("name", ["prompt_tokens", "completions", "response_tokens"])
def test_a_comparison_that_does_not_fit_names_the_value(name):
    read = {"prompt_tokens": 2, "completions": 2, "response_tokens": 3}
    batches.comparison_batch(Rows([COMPARISON]), np.array([0]), **read)
    with pytest.raises(
        ValueError, match=f"a row of {read[name]} does not fit .* = {read[name] - 1}"
    ):
        batches.comparison_batch(
            Rows([COMPARISON]), np.array([0]), **read | {name: read[name] - 1}
        )


def mixed(index, process_index=0, process_count=1, fraction=0.3, batch_size=8):
    demonstrations = packed(20, first=100)
    text = packed(5, first=200)
    batch = batches.mixed_lm_batch(
        demonstrations,
        text,
        index,
        batch_size=batch_size,
        text_fraction=fraction,
        length=3,
        seed=1,
        process_index=process_index,
        process_count=process_count,
    )
    return batch, demonstrations, text


# ⌊3/10⌋ of the first 8, 16, 24, 32 rows are text. With a tenth, only every few batches of 4
# have a text row.
@pytest.mark.parametrize(
    ("fraction", "batch_size", "ends"),
    [(0.3, 8, [0, 2, 4, 7, 9]), (0.1, 4, [0, 0, 0, 1, 1, 2, 2]), (0.1, 10, range(9))],
)
def test_mixed_batches_take_their_fraction_from_each_stream(fraction, batch_size, ends):
    for index, (start, stop) in enumerate(itertools.pairwise(ends)):
        batch, _, _ = mixed(index, fraction=fraction, batch_size=batch_size)
        own = index * batch_size - start, (index + 1) * batch_size - stop
        expected = [100 + row for row in batches.stream_row_ids(*own, 20, 1)]
        expected += (
            [200 + row for row in batches.stream_row_ids(start, stop, 5, 1)]
            if start < stop
            else []
        )
        assert batch.tokens[:, 0].tolist() == expected
        assert batch.loss_mask.tolist() == [[False, True, False]] * batch_size


@pytest.mark.parametrize("count", [2, 4, 8])
def test_each_process_reads_its_own_rows_of_the_mix(count):
    whole, _, _ = mixed(3)
    parts = [mixed(3, index, count) for index in range(count)]
    for name, array in vars(whole).items():
        assert (
            np.concatenate([vars(part)[name] for part, _, _ in parts]).tolist()
            == array.tolist()
        )
    assert all(
        len(demonstrations.read) + len(text.read) == 8 // count
        for _, demonstrations, text in parts
    )


def test_mixes_of_one_source():
    assert (mixed(0, fraction=0)[0].tokens[:, 0] < 200).all()
    assert (mixed(0, fraction=1)[0].tokens[:, 0] >= 200).all()
