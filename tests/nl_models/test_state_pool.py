"""Users in slots of a pool get what they get with a cache of their own."""

import pytest
import torch

from nl_models.layers.state import state_tensors
from nl_models.state_pool import StatePool
from tests.nl_models.test_generation import make, make_cache, tokens


def step(model, ids, cache):
    with torch.no_grad():
        return model(ids, cache=cache).logits


@pytest.mark.parametrize("name", ["self_modifying_titans", "titans", "gated_delta_net", "memories-llama"])
def test_slots_are_users(name):
    model, pool = make(name), StatePool(make(name), 7)
    places = [t.data_ptr() for state in pool._held for t in state_tensors(state)]
    own, chance = [make_cache(model) for _ in range(7)], torch.Generator().manual_seed(3)
    for turn in range(24):
        slots = torch.randperm(7, generator=chance)[: 1 + turn % 4]
        ids = tokens(len(slots), 1 if turn % 5 else 3, seed=turn)
        cache = pool.gather(slots)
        found = step(model, ids, cache)
        pool.scatter(slots, cache)
        alone = [step(model, ids[row : row + 1], own[slot]) for row, slot in enumerate(slots.tolist())]
        torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-9)
        if turn == 12:
            pool.reset([2, 5])
            own[2], own[5] = make_cache(model), make_cache(model)
    assert pool.seen.tolist() == [cache.get_seq_length() for cache in own]
    assert places == [t.data_ptr() for state in pool._held for t in state_tensors(state)]
    assert pool.num_bytes() == 7 * StatePool(model, 1).num_bytes()


def test_what_has_no_place_in_a_pool_is_refused():
    for name in ("full_attention", "hybrid-llama"):
        with pytest.raises(ValueError, match="model: its attention keeps every token"):
            StatePool(make(name), 3)
    model = make("titans")
    with pytest.raises(ValueError, match="slots"):
        StatePool(model, 0)
    pool = StatePool(model, 3)
    with pytest.raises(ValueError, match="expected at least one index from 0 to 2"):
        pool.gather([3])
    cache = pool.gather([0, 1])
    for slots in ([0], [1, 1]):
        with pytest.raises(ValueError, match="slots: expected a different one for each of 2 rows"):
            pool.scatter(slots, cache)
    held = [t.clone() for state in pool._held for t in state_tensors(state)]
    for other in (make("gated_delta_net"), make("memories-llama")):
        foreign = make_cache(other)
        step(other, tokens(2, 3), foreign)
        with pytest.raises(ValueError, match="cache: expected one for the model of this pool"):
            pool.scatter([0, 1], foreign)
    assert all(map(torch.equal, held, (t for state in pool._held for t in state_tensors(state))))
    with pytest.raises(ValueError, match="slots: expected a different one for each of 0 rows"):
        pool.scatter([0], make_cache(model))
    model.generate(tokens(2, 3), cache=cache, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="cache: its last token was written by generate"):
        pool.scatter([0, 1], cache)
