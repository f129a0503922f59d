"""B batch, T tokens, N targets."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_core.modeling.batches import IGNORED, join, micro_batches, pack, plan_order
from peft_core.planning.cost_model import micro_capacity
from tests.tiny_models import tiny_documents

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(0, 512))
def test_packing_uses_every_document_once_within_the_capacity(lengths: list[int], capacity: int) -> None:
    groups = pack(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[index] for index in group) <= capacity


@given(st.lists(st.integers(1, 512), min_size=1, max_size=60))
def test_no_two_packed_groups_would_fit_into_one(lengths: list[int]) -> None:
    sums = sorted(sum(lengths[index] for index in group) for group in pack(lengths, 512))
    assert len(sums) == 1 or sums[0] + sums[1] > 512


@given(examples=st.integers(1, 40), batch_size=st.integers(1, 12), epochs=st.floats(0.1, 4), seed=st.integers(0, 5))
def test_each_epoch_shows_every_example_once(examples: int, batch_size: int, epochs: float, seed: int) -> None:
    order = plan_order(examples=examples, batch_size=batch_size, num_epochs=epochs, max_steps=None, seed=seed)
    shown = [index for step in range(1, order.total_steps + 1) for index in order.step(step)]
    assert len(shown) == max(1, round(epochs * examples))
    for start in range(0, len(shown), examples):
        epoch = shown[start : start + examples]
        assert len(set(epoch)) == len(epoch)
    for step in range(order.total_steps + 1):
        so_far = [index for number in range(1, step + 1) for index in order.step(number)]
        assert order.shown_by(step) == len(so_far)
        assert order.seen_by(step) == sorted(set(so_far))
    lengths = [7 * n + 1 for n in range(examples)]
    assert order.tokens(lengths) == sum(lengths[index] for index in shown)


def test_max_steps_fills_every_step() -> None:
    order = plan_order(examples=3, batch_size=4, num_epochs=None, max_steps=5, seed=0)
    assert [len(order.step(step)) for step in range(1, order.total_steps + 1)] == [4] * 5


def test_one_epoch_is_the_default_and_the_seed_decides_the_order() -> None:
    orders = [plan_order(examples=50, batch_size=50, num_epochs=None, max_steps=None, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (order.step(1) for order in orders)
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


def test_packed_documents_restart_positions_and_predict_only_their_own_tokens() -> None:
    documents = tiny_documents((5, 3))
    batch = join(documents, CPU)
    assert batch.positions_1T.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.lengths == (5, 3)
    assert 4 not in batch.source_N  # the last token of the first document predicts nothing
    assert torch.equal(batch.ids_1T[0, batch.source_N + 1], batch.target_N)
    assert len(batch.target_N) == sum(document.targets for document in documents)


def test_micro_batches_hold_every_token_within_the_capacity() -> None:
    documents = tiny_documents(tuple(range(2, 150)))
    batches = list(micro_batches(documents, 200, CPU))
    assert all(batch.tokens <= 200 for batch in batches)
    assert sum(batch.tokens for batch in batches) == sum(range(2, 150))


def test_the_longest_document_fits_into_a_micro_batch() -> None:
    assert micro_capacity(128, "cpu") == 512
    assert micro_capacity(2048, "cpu") == 2048


@given(st.lists(st.integers(2, 90), min_size=1, max_size=20))
def test_padding_to_a_multiple_gives_few_shapes_and_the_same_targets(lengths: list[int]) -> None:
    documents = tiny_documents(tuple(lengths))
    own = list(micro_batches(documents, 128, CPU))
    filled = list(micro_batches(documents, 128, CPU, multiple_of=64))
    assert {tuple(batch.ids_1T.shape) for batch in filled} <= {(1, 64), (1, 128)}
    for plain, batch in zip(own, filled, strict=True):
        assert sum(batch.lengths) == batch.tokens == len(batch.source_N) == len(batch.target_N)
        learned_N = batch.target_N != IGNORED
        assert torch.equal(batch.source_N[learned_N], plain.source_N)
        assert torch.equal(batch.target_N[learned_N], plain.target_N)
