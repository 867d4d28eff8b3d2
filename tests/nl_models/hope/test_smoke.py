"""The model runs forward, backward and in ``generate``."""

import torch


def test_forward_backward_and_generate(make_model, tokens):
    for kind in ("gated_delta_net", "full_attention"):
        model, ids = make_model(kind), tokens(2, 9)
        model(ids, labels=ids).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert torch.equal(
            model.generate(ids, max_new_tokens=5, do_sample=False),
            model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False),
        )
